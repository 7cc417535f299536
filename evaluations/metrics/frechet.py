"""The Frechet distance between two sets of features, from streamed float64 statistics."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from core.distributed.world import World

INFINITY_SIZES = 15  # sample sizes for the linear fit in 1 / n (Chong and Forsyth 2020)
INFINITY_SEED = 0


class Gaussian(NamedTuple):
    """Mean (d,) and covariance (d, d; divisor n - 1) of n features, float64.

    factor: (d, n) with covariance = factor factor^T, if there are at most d features, else None.
    """

    mean: torch.Tensor
    covariance: torch.Tensor
    factor: torch.Tensor | None = None

    @classmethod
    def of_rows(cls, rows: torch.Tensor) -> "Gaussian":
        """The statistics of features (n, d), n >= 2."""
        rows = rows.double()
        mean = rows.mean(0)
        centred = (rows - mean) / (len(rows) - 1) ** 0.5
        return cls(mean, centred.T @ centred, centred.T if len(rows) <= rows.shape[1] else None)

    def to(self, device: torch.device) -> "Gaussian":
        """Copy to a device."""
        factor = None if self.factor is None else self.factor.to(device)
        return Gaussian(self.mean.to(device), self.covariance.to(device), factor)


@dataclass
class FeatureSums:
    """Count, sum and sum of outer products of features, float64; additive over ranks."""

    count: int
    total: torch.Tensor  # (d,)
    outer: torch.Tensor  # (d, d)

    @classmethod
    def empty(cls, dim: int, device: torch.device) -> "FeatureSums":
        """Sums over zero features."""
        zeros = torch.zeros(dim, dtype=torch.float64, device=device)
        return cls(0, zeros, zeros.new_zeros(dim, dim))

    def add(self, features: torch.Tensor, sign: int = 1) -> None:
        """Add features (n, d); sign -1 removes them."""
        features = features.to(self.total.device).double()
        self.count += sign * len(features)
        self.total += sign * features.sum(0)
        self.outer.addmm_(features.T, features, alpha=sign)

    def merge(self, world: World) -> "FeatureSums":
        """The sums over all ranks."""
        count = sum(world.gather(self.count))
        return FeatureSums(count, world.sum(self.total.clone()), world.sum(self.outer.clone()))

    def gaussian(self) -> Gaussian:
        """Mean and covariance; raises ValueError for fewer than two features."""
        if self.count < 2:
            raise ValueError(f"{self.count} features have no covariance")
        mean = self.total / self.count
        covariance = (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return Gaussian(mean, covariance)


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al. 2017, equation 6), in float64."""
    traces = first.covariance.trace() + second.covariance.trace()
    root = _trace_of_root(first, second)
    return float((first.mean - second.mean).square().sum() + traces - 2 * root)


def _trace_of_root(first: Gaussian, second: Gaussian) -> torch.Tensor:
    """tr (S1 S2)^(1/2), computed from symmetric matrices only, so it stays real.

    With S = F F^T it equals the sum of singular values of F1^T F2, which is accurate for few
    samples; otherwise the sum of square roots of the eigenvalues of F1^T S2 F1, which is faster.
    """
    ours, theirs = _factor(first), _factor(second)
    if max(ours.shape[1], theirs.shape[1]) < len(ours):
        return torch.linalg.svdvals(ours.T @ theirs).sum()
    narrow, other = (ours, second) if ours.shape[1] <= theirs.shape[1] else (theirs, first)
    return torch.linalg.eigvalsh(narrow.T @ other.covariance @ narrow).clamp(min=0).sqrt().sum()


def _factor(gaussian: Gaussian) -> torch.Tensor:
    """F (d, r) with F F^T = S: the known factor, Cholesky, or from the non-zero eigenvalues."""
    if gaussian.factor is not None:
        return gaussian.factor
    factor, failed = torch.linalg.cholesky_ex(gaussian.covariance)
    if not failed:
        return factor
    return _eigenvectors(gaussian.covariance, 0.5)


def _eigenvectors(matrix: torch.Tensor, power: float) -> torch.Tensor:
    """Eigenvectors (d, r) times eigenvalue^power, without eigenvalues within rounding error."""
    values, vectors = torch.linalg.eigh(matrix)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept] ** power


def influence(rows: torch.Tensor, reference: Gaussian) -> torch.Tensor:
    """The influence of each feature (n, d) on the distance to `reference`, to first order -> (n,).

    The mean is 0. The standard deviation over sqrt(n) is the standard error of the distance (delta
    method), without the bias of small n. Removing a share of the features with mean influence h
    lowers the distance by share * h / (1 - share). Requires n > d.
    """
    own = Gaussian.of_rows(rows)
    # The gradient with respect to S1 is I - T, where T is the optimal transport map.
    half = _eigenvectors(own.covariance, 0.25)
    root, inverse = half @ half.T, _eigenvectors(own.covariance, -0.25)
    inverse = inverse @ inverse.T
    middle = _eigenvectors(root @ reference.covariance @ root, 0.25)
    transport = inverse @ middle
    gradient = torch.eye(len(root), dtype=root.dtype, device=root.device) - transport @ transport.T
    centred = rows.double() - own.mean
    change = 2 * centred @ (own.mean - reference.mean)
    change += ((centred @ gradient) * centred).sum(1)
    return change - change.mean()


def frechet_at_infinity(rows: torch.Tensor, reference: Gaussian) -> float:
    """The distance extrapolated to infinitely many samples: a linear fit in 1 / n, at 0.

    rows: Features (n, d). Chong and Forsyth 2020.
    """
    generator = torch.Generator().manual_seed(INFINITY_SEED)
    smallest = min(5000, max(len(rows) // 10, 2))
    sizes = np.linspace(smallest, len(rows), INFINITY_SIZES).astype(int)
    distances = []
    for size in sizes:
        chosen = torch.randperm(len(rows), generator=generator)[:size].to(rows.device)
        distances.append(frechet_distance(Gaussian.of_rows(rows[chosen]), reference))
    return float(np.polyfit(1 / sizes, distances, 1)[1])
