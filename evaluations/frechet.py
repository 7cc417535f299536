"""The Frechet distance between two sets of features, from streamed float64 statistics."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from core.distributed import World


class Gaussian(NamedTuple):
    """Mean (d,) and covariance (d, d; divisor n - 1) of n features, float64."""

    mean: torch.Tensor
    covariance: torch.Tensor


@dataclass
class FeatureSums:
    """Count, sum and sum of outer products of features, in float64, on the features' device.

    Sums of disjoint sets simply add up, over batches and over ranks.
    """

    count: int
    total: torch.Tensor  # (d,)
    outer: torch.Tensor  # (d, d)

    @classmethod
    def empty(cls, dim: int, device: torch.device) -> "FeatureSums":
        """The sums of no features."""
        zeros = torch.zeros(dim, dtype=torch.float64, device=device)
        return cls(0, zeros, zeros.new_zeros(dim, dim))

    def add(self, features: torch.Tensor) -> None:
        """Add features (n, d)."""
        features = features.double()
        self.count += len(features)
        self.total += features.sum(0)
        self.outer.addmm_(features.T, features)

    def merge(self, world: World) -> "FeatureSums":
        """The sums over all ranks."""
        count = sum(world.gather(self.count))
        return FeatureSums(count, world.sum(self.total.clone()), world.sum(self.outer.clone()))

    def gaussian(self) -> Gaussian:
        """Mean and covariance; raises ValueError below two features."""
        if self.count < 2:
            raise ValueError(f"{self.count} features have no covariance")
        mean = self.total / self.count
        covariance = (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return Gaussian(mean, covariance)


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al. 2017, equation 6), in float64.

    tr (S1 S2)^(1/2) is the sum of the roots of the eigenvalues of R^T S2 R, where S1 = R R^T: a
    symmetric problem, so nothing turns complex. R comes from Cholesky, and where S1 is singular
    (fewer samples than dimensions, dead features) from its eigenvectors.
    """
    factor, failed = torch.linalg.cholesky_ex(first.covariance)
    if failed:
        values, vectors = torch.linalg.eigh(first.covariance)
        factor = vectors * values.clamp(min=0).sqrt()
    roots = torch.linalg.eigvalsh(factor.T @ second.covariance @ factor).clamp(min=0).sqrt()
    traces = first.covariance.trace() + second.covariance.trace()
    return float((first.mean - second.mean).square().sum() + traces - 2 * roots.sum())
