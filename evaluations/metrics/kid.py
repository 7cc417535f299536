"""Kernel Inception Distance (Binkowski et al. 2018)."""

import numpy as np
import torch

KERNEL_SUBSETS, KERNEL_SIZE, KERNEL_SEED = 100, 1000, 2020  # as torch-fidelity


def kernel_distance(samples: torch.Tensor, reference: torch.Tensor) -> float:
    """KID of features (n, d) and (m, d): the mean unbiased squared MMD over random subsets.

    The kernel is (x y / d + 1)^3. Binkowski et al. 2018; subsets as in torch-fidelity.
    """
    random = np.random.RandomState(KERNEL_SEED)
    samples, reference = samples.double(), reference.double()
    size = min(KERNEL_SIZE, len(samples), len(reference))
    found = []
    for _ in range(KERNEL_SUBSETS):
        fake, real = (
            rows[torch.from_numpy(random.choice(len(rows), size, replace=False)).to(rows.device)]
            for rows in (samples, reference)
        )
        within = _sum_off_diagonal(_kernel(fake, fake)) + _sum_off_diagonal(_kernel(real, real))
        found.append(within / (size * (size - 1)) - 2 * _kernel(fake, real).mean())
    return float(torch.stack(found).mean())


def _kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _sum_off_diagonal(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.sum() - matrix.diagonal().sum()
