"""Precision, recall, density and coverage, from distances between nearest neighbours.

Features are (n, d) float32, on any device.
"""

from typing import Literal, NamedTuple

import torch

Arithmetic = Literal["adm16", "fp32"]  # adm16: float16 distances, as in ADM's evaluator

NEIGHBOURS = 3  # Kynkaanniemi et al. 2019, and ADM
COVERAGE_NEIGHBOURS = 5  # Naeem et al. 2020
BLOCK = 1024  # rows of the distance matrix that are in memory at a time


class PrecisionRecall(NamedTuple):
    """Precision and recall, both in [0, 1]."""

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """Density (>= 0) and coverage (in [0, 1])."""

    density: float
    coverage: float


def precision_recall(
    samples: torch.Tensor, reference: torch.Tensor, arithmetic: Arithmetic
) -> PrecisionRecall:
    """Precision and recall with 3 neighbours (Kynkaanniemi et al. 2019).

    Recall grows with the number of samples: only compare values for equal numbers.
    """
    real = _radii(reference, NEIGHBOURS, arithmetic)
    fake = _radii(samples, NEIGHBOURS, arithmetic)
    precise = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    recalled = []
    for start in range(0, len(reference), BLOCK):
        distances = squared_distances(reference[start : start + BLOCK], samples, arithmetic)
        precise |= (distances <= real[start : start + BLOCK, None]).any(0)
        recalled.append((distances <= fake).any(1))
    return PrecisionRecall(
        float(precise.double().mean()), float(torch.cat(recalled).double().mean())
    )


def density_coverage(samples: torch.Tensor, reference: torch.Tensor) -> DensityCoverage:
    """Density and coverage with 5 neighbours (Naeem et al. 2020)."""
    radii = _radii(reference, COVERAGE_NEIGHBOURS, "fp32")
    inside, covered = 0, 0
    for start in range(0, len(reference), BLOCK):
        distances = squared_distances(reference[start : start + BLOCK], samples, "fp32")
        hits = distances <= radii[start : start + BLOCK, None]
        inside += int(hits.sum())
        covered += int(hits.any(1).sum())
    return DensityCoverage(inside / (COVERAGE_NEIGHBOURS * len(samples)), covered / len(reference))


def squared_distances(a: torch.Tensor, b: torch.Tensor, arithmetic: Arithmetic) -> torch.Tensor:
    """Features (n, d) and (m, d) -> squared distances (n, m) float32.

    adm16 rounds sums to float16 as ADM does, which creates ties; float32 if a sum overflows.
    """
    if arithmetic == "adm16":
        a16, b16 = a.half().float(), b.half().float()
        left, right = (x.square().half().float().sum(1).half() for x in (a16, b16))
        distances = (left[:, None] - (2 * (a16 @ b16.T).half()) + right).clamp(min=0)
        if distances.isfinite().all():
            return distances.float()
    return (a.square().sum(1)[:, None] - 2 * a @ b.T + b.square().sum(1)).clamp(min=0)


def _radii(rows: torch.Tensor, k: int, arithmetic: Arithmetic) -> torch.Tensor:
    """The squared distance (n,) of each row to its k-th neighbour; the 0-th is the row itself."""
    blocks = (squared_distances(part, rows, arithmetic) for part in rows.split(BLOCK))
    return torch.cat([block.topk(k + 1, largest=False).values[:, -1] for block in blocks])
