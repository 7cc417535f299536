"""Random numbers that depend on counters alone, never on how much was drawn before.

Training position 12,345 gets the same crop, and sample 7 the same code, on any device, for any
batch size and any number of processes, and a resumed run needs no generator state. The generator
is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA
2014), split once per counter.
"""

import torch

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # as signed 64-bit integers: torch wraps around like uint64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


def _logical_shift(bits: torch.Tensor, by: int) -> torch.Tensor:
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _mix(bits: torch.Tensor) -> torch.Tensor:
    bits = (bits ^ _logical_shift(bits, 30)) * _MIX_1
    bits = (bits ^ _logical_shift(bits, 27)) * _MIX_2
    return bits ^ _logical_shift(bits, 31)


def random_bits(seed: int | torch.Tensor, *counters: torch.Tensor) -> torch.Tensor:
    """64 random bits for each combination of counters (int64, broadcast together) -> int64.

    As a seed, the bits of some counters go on to the next: bits(bits(s, a), b) == bits(s, a, b).
    """
    bits = seed
    if isinstance(bits, int):
        bits = torch.full((), bits, dtype=torch.int64, device=counters[0].device)
    for counter in counters:
        bits = _mix(bits + (counter + 1) * _GOLDEN)
    return bits


def random_uniform(seed: int | torch.Tensor, *counters: torch.Tensor) -> torch.Tensor:
    """Uniform numbers in (0, 1), float32, for each combination of counters (int64, broadcast).

    40 random bits: near 0 the float keeps a relative precision of 2^-24, so that the smallest of
    16,384 draws has no ties. The largest value is 1 - 2^-24, so that log1p(-u) is finite.
    """
    bits = _logical_shift(random_bits(seed, *counters), 24)
    return (bits.float() + 0.5).mul_(2.0**-40).clamp_(max=1 - 2.0**-24)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's generators (dropout) for one optimizer step on one rank.

    Because every step is seeded, a run resumes exactly without any saved generator state.
    """
    counters = torch.tensor([step]), torch.tensor([rank])
    torch.manual_seed(int(random_bits(seed, *counters)) & (2**63 - 1))
