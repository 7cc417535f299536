"""Weights and images for comparing with the goldens: functions of names, shapes and seeds alone.

The published code was filled by the same rule when the goldens were recorded, so that both sides
hold equal weights although no weights are stored. The rule is in tests/goldens/README.md.
"""

import zlib

import numpy as np
import torch
from torch import nn


def weights_of(key: str, shape: tuple[int, ...]) -> torch.Tensor | None:
    """The float32 tensor for a key of a state dict; None for a key that keeps its own value."""
    seed = zlib.crc32(key.encode())
    noise = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    if len(shape) > 1:
        fan_in = np.prod(shape[1:], dtype=np.int64)
        return torch.from_numpy(noise / np.float32(np.sqrt(fan_in)))
    if len(shape) == 1 and key.endswith(("weight", "bias")):
        center = np.float32(key.endswith("weight"))
        return torch.from_numpy(center + np.float32(0.1) * noise)
    return None


@torch.no_grad()
def fill_(model: nn.Module) -> nn.Module:
    """Overwrite the floating-point entries of a model's state dict, in place; return the model."""
    for key, entry in model.state_dict().items():
        values = weights_of(key, tuple(entry.shape)) if entry.is_floating_point() else None
        if values is not None:
            entry.copy_(values)
    return model


def image(seed: int, size: int, batch: int = 1) -> torch.Tensor:
    """Smooth images: (batch, 3, size, size) float32 in [-1, 1], sums of 12 random plane waves."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[:size, :size] / size
    planes = np.zeros((batch * 3, size, size))
    for plane in planes:
        for _ in range(12):
            waves_x, waves_y = random.uniform(-12, 12, 2)
            phase = random.uniform(0, 2 * np.pi)
            amplitude = random.uniform(0.1, 0.5)
            angle = 2 * np.pi * (waves_x * columns + waves_y * rows) + phase
            plane += amplitude * np.sin(angle)
    waves = np.tanh(planes).astype(np.float32)
    return torch.from_numpy(waves.reshape(batch, 3, size, size))
