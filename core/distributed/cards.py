"""GPUs by their makers' data sheets."""

from dataclasses import dataclass


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
