"""What every quantizer returns."""

from typing import NamedTuple

import torch


class Quantized(NamedTuple):
    """Codes (b, h, w) int64, their vectors (b, dim, h, w), and the losses by name (scalars)."""

    codes: torch.Tensor
    vectors: torch.Tensor
    losses: dict[str, torch.Tensor]
