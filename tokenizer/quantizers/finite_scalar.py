"""Finite scalar quantisation (FSQ): each channel is rounded to one of a few levels.

Mentzer et al. 2023. There is no codebook to learn and no loss, so no code dies. The first channel
varies fastest in the code. iFSQ replaces tanh by a sigmoid that spreads N(0, 1) nearly evenly over
the levels.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from core.errors import InputError
from tokenizer.quantizers.base import Quantized, Quantizer, QuantizerSettings

MARGIN = 1e-3  # tanh ends this share beyond the outer levels, so that they can be reached
SIGMOID_SLOPE = 1.6  # of iFSQ


@dataclass(frozen=True)
class FiniteScalarOptions:
    """Options of the quantizer fsq alone.

    Args:
        levels: Levels of each channel, at least 3: as many as codebook_dim, with the product
            vocab_size. For two levels, the signs, take quantizer lfq or bsq: here the bound of the
            published code would put their border at -3.8.
        bound: tanh (FSQ), or sigmoid (iFSQ; odd levels only).
    """

    levels: tuple[int, ...] = (8, 8, 8, 8, 4)
    bound: Literal["tanh", "sigmoid"] = "tanh"


class FiniteScalarQuantizer(Quantizer):
    """Rounds each channel to its levels, with straight-through gradients."""

    kind = "fsq"
    levels: torch.Tensor
    basis: torch.Tensor

    def __init__(
        self, vocab_size: int, dim: int, entropy_weight: float, options: FiniteScalarOptions
    ) -> None:
        """Raises InputError for levels that do not fit vocab_size, dim or the bound."""
        super().__init__(vocab_size, dim)
        levels = options.levels
        if len(levels) != dim or min(levels) < 3 or math.prod(levels) != vocab_size:
            raise InputError(
                f"model.fsq.levels {list(levels)}: expected codebook_dim = {dim} levels >= 3 whose "
                f"product is vocab_size = {vocab_size}, not {math.prod(levels)}"
            )
        if options.bound == "sigmoid" and not all(count % 2 for count in levels):
            raise InputError(f"model.fsq.levels {list(levels)}: bound sigmoid needs odd levels")
        if entropy_weight:
            raise InputError("model.entropy_weight: fsq has no losses, set it to 0")
        self.bound = options.bound
        # Integers, which a change of the model's dtype leaves as they are.
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        basis = [math.prod(levels[:i]) for i in range(dim)]
        self.register_buffer("basis", torch.tensor(basis), persistent=False)

    @classmethod
    def build(cls, settings: QuantizerSettings) -> "FiniteScalarQuantizer":
        """See Quantizer."""
        s = settings
        return cls(s.vocab_size, s.dim, s.entropy_weight, s.options)

    def forward(self, z: torch.Tensor) -> Quantized:
        """z (b, dim, h, w) -> codes and vectors in about [-1, 1]; no losses."""
        with torch.autocast(z.device.type, enabled=False):
            bounded = self._bounded(z.float().movedim(1, -1))
            rounded = bounded.round()
            half = self.levels // 2
            codes = ((rounded.long() + half) * self.basis).sum(-1)
            vectors = (bounded + (rounded - bounded).detach()) / half
        return Quantized(codes, vectors.movedim(-1, 1), {})

    def lookup(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes (b, h, w) int64 -> vectors (b, dim, h, w) float32."""
        half = self.levels // 2
        steps = codes[..., None] // self.basis % self.levels - half
        return (steps / half).movedim(-1, 1)

    def _bounded(self, z: torch.Tensor) -> torch.Tensor:
        """Channels (..., dim) -> the range of their levels, centred on 0."""
        span = self.levels - 1
        if self.bound == "sigmoid":
            return (2 * torch.sigmoid(SIGMOID_SLOPE * z) - 1) * span / 2
        half = span * (1 + MARGIN) / 2
        # An even number of levels has none at 0: they lie at -L/2 .. L/2 - 1.
        offset = 0.5 * (self.levels % 2 == 0)
        return torch.tanh(z + torch.atanh(offset / half)) * half - offset
