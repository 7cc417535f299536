"""Revival of codebook entries that no vector chooses (CVQ-VAE, Zheng and Vedaldi 2023).

An entry moves towards the vector of the batch that is nearest to it: hardly if it is used, and all
the way if it is not.
"""

from typing import NamedTuple

import torch
from torch import distributed as dist
from torch.nn import functional as F

DECAY = 0.99  # of the running frequency of each code
SHARPNESS = 10.0  # how fast the move vanishes with the frequency, in units of uniform use
SCORES = 1 << 25  # distances held at once: 128 MiB in float32


class Revived(NamedTuple):
    """The moved entries (vocab_size, dim), and the frequency of each code (vocab_size,)."""

    entries: torch.Tensor
    frequency: torch.Tensor


@torch.no_grad()
def revive_dead_codes(
    entries: torch.Tensor,
    frequency: torch.Tensor,
    codes: torch.Tensor,
    vectors: torch.Tensor,
    normalize: bool,
) -> Revived:
    """Count the codes of a batch and move the rarely used entries, as new tensors.

    entries: (vocab_size, dim) float32. frequency: (vocab_size,) float32, the running share of each
    code, 0 at first. codes: (n,) int64, those of this batch. vectors: (n, dim) float32, the batch.
    normalize: Whether unit vectors are compared; entries move to the vectors themselves.
    All ranks call it and get the same result, that of one process with the batches of all.
    """
    counts = torch.zeros_like(frequency).scatter_add_(0, codes, torch.ones_like(vectors[:, 0]))
    if dist.is_initialized():
        dist.all_reduce(counts)
    frequency = frequency.lerp(counts / counts.sum(), 1 - DECAY)
    move = (-SHARPNESS * len(entries) * frequency / (1 - DECAY) - 1e-3).exp()
    if normalize:
        nearest = _nearest(F.normalize(entries, dim=-1), F.normalize(vectors, dim=-1), vectors)
    else:
        nearest = _nearest(entries, vectors, vectors)
    return Revived(entries.lerp(nearest, move[:, None]), frequency)


def _nearest(codebook: torch.Tensor, compared: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """For each entry the nearest of the vectors of all ranks: (vocab_size, dim)."""
    best = torch.full_like(codebook[:, 0], torch.inf)
    row = torch.zeros_like(best, dtype=torch.int64)
    start = 0
    for part in compared.split(max(1, SCORES // len(codebook))):
        # Without |entry|^2, which does not change the order of the vectors.
        distance = torch.addmm(part.square().sum(-1), codebook, part.T, alpha=-2)
        value, index = distance.min(-1)
        closer = value < best
        best, row = torch.where(closer, value, best), torch.where(closer, index + start, row)
        start += len(part)
    found = vectors[row]
    if not dist.is_initialized():
        return found
    lowest = best.clone()
    dist.all_reduce(lowest, dist.ReduceOp.MIN)
    # Where ranks tie, the first one decides.
    rank = torch.where(best == lowest, dist.get_rank(), dist.get_world_size())
    first = rank.clone()
    dist.all_reduce(first, dist.ReduceOp.MIN)
    found = torch.where((rank == first)[:, None], found, 0)
    dist.all_reduce(found)
    return found
