"""Latent quantisation: every channel is replaced by the nearest of a few learned values.

Hsu et al., arXiv 2305.18378, section 3.1. Unlike the levels of FSQ, the values move; they start
evenly spaced in [-1/2, 1/2], as published.
"""

import torch
from torch import nn
from torch.nn import functional as F

from core.errors import InputError
from tokenizer.quantizers.base import Quantized, Quantizer


class LatentQuantizer(Quantizer):
    """As many values in each channel, so that vocab_size is the codebook_dim-th power of a number.

    Both losses have the weight commitment_weight, as in the paper.
    """

    kind = "latent"
    basis: torch.Tensor

    def __init__(
        self, vocab_size: int, dim: int, commitment_weight: float, entropy_weight: float
    ) -> None:
        """Raises InputError for a vocabulary that is no such power, and for an entropy_weight."""
        super().__init__(vocab_size, dim)
        levels = round(vocab_size ** (1 / dim))
        if levels < 2 or levels**dim != vocab_size:
            raise InputError(
                f"model.vocab_size {vocab_size}: latent has the same number of values >= 2 in each "
                f"of the codebook_dim = {dim} channels, e.g. {max(2, levels) ** dim} codes"
            )
        if entropy_weight:
            raise InputError("model.entropy_weight: latent has no entropy loss, set it to 0")
        self.commitment_weight = commitment_weight
        self.values = nn.Parameter(torch.linspace(-0.5, 0.5, levels).repeat(dim, 1))
        self.register_buffer("basis", levels ** torch.arange(dim), persistent=False)

    def forward(self, z: torch.Tensor) -> Quantized:
        """z (b, dim, h, w) -> codes, vectors, and the losses codebook and commitment."""
        # In float32 even under autocast, as every search for the nearest entry.
        with torch.autocast(z.device.type, enabled=False):
            z = z.float().movedim(1, -1)
            chosen = (z[..., None] - self.values.float()).abs().argmin(dim=-1)
            vectors = self._vectors(chosen).float()
            losses = {
                "codebook": self.commitment_weight * F.mse_loss(vectors, z.detach()),
                "commitment": self.commitment_weight * F.mse_loss(z, vectors.detach()),
            }
            vectors = z + (vectors - z).detach()
        return Quantized((chosen * self.basis).sum(dim=-1), vectors.movedim(-1, 1), losses)

    def lookup(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes (b, h, w) int64 -> vectors (b, dim, h, w) in the parameters' dtype."""
        chosen = codes[..., None] // self.basis % self.values.shape[1]
        return self._vectors(chosen).movedim(-1, 1)

    def _vectors(self, chosen: torch.Tensor) -> torch.Tensor:
        """The number of the value in each channel (..., dim) int64 -> the values (..., dim)."""
        return self.values[torch.arange(self.dim, device=chosen.device), chosen]
