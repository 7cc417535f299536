"""Inputs of the quantizers' goldens, and the comparison with a recorded array."""

import numpy as np
import torch


def normal(seed: int, shape: tuple[int, ...], scale: float = 1.0) -> torch.Tensor:
    """Float32 noise by the rule of tests/goldens/variants: N(seed, shape, scale)."""
    draws = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(np.float32(scale) * draws)


def relative_error(found: torch.Tensor, expected: np.ndarray) -> float:
    """The L2 norm of the difference over that of the recorded array."""
    difference = found.detach().numpy() - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected))
