"""What the device offers: its peak arithmetic, its bandwidth and its memory."""

import os
import resource
from pathlib import Path

import torch

from core.distributed.cards import CARDS

CPU_INFO = Path("/proc/cpuinfo")


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
