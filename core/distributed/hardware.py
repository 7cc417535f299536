"""What the device offers: its peak arithmetic, its bandwidth and its memory."""

import os
import resource
from dataclasses import dataclass
from pathlib import Path

import torch

CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Card:
    """A GPU by its maker's data sheet.

    Args:
        flops: Dense bf16 tensor-core FLOP/s.
        bandwidth: Bytes per second between the GPU and its memory.
        memory: Bytes of memory.
        network: Bytes per second in one direction between nodes, per GPU, in the maker's own
            servers (one network port per GPU); 0 if the card has no such server.
    """

    flops: float
    bandwidth: float
    memory: float
    network: float = 0.0


# By a part of the device's name; the first that fits counts.
CARDS = {
    "B200": Card(2250e12, 8.0e12, 180e9, 50e9),
    "H200": Card(989e12, 4.8e12, 141e9, 50e9),
    "H100 PCIe": Card(756e12, 2.0e12, 80e9),
    "H100": Card(989e12, 3.35e12, 80e9, 50e9),
    "A100": Card(312e12, 2.039e12, 80e9, 25e9),
    "L40S": Card(362e12, 0.864e12, 48e9),
    "RTX 4090": Card(165e12, 1.008e12, 24e9),
}


def device_name(device: torch.device) -> str:
    """The device as its maker calls it, for reports."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu" and CPU_INFO.is_file():
        lines = CPU_INFO.read_text().splitlines()
        models = {line.split(": ")[1] for line in lines if line.startswith("model name")}
        return f"{', '.join(sorted(models)) or 'CPU'}, {os.cpu_count()} cores"
    return device.type


def peak_flops(device: torch.device) -> float | None:
    """Peak bf16 FLOP/s, for model FLOPs utilisation; None for a device that is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((card.flops for part, card in CARDS.items() if part in name), None)


def memory_bytes(device: torch.device) -> int:
    """The device's memory for one process; on a CPU, the node's shared out over its processes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    node = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return node // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this process has held so far on the device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
