"""SimVQ: the codebook is one learned linear map of frozen random vectors.

Zhu et al. 2024. Every entry moves at each step, because all share the map, so no code dies.
"""

import torch
from torch import nn
from torch.nn import functional as F

from core.errors import InputError
from tokenizer.quantizers.base import Quantized, Quantizer
from tokenizer.quantizers.vector import nearest


class SimVQQuantizer(Quantizer):
    """Replaces each vector by its nearest mapped entry, with straight-through gradients."""

    kind = "simvq"

    def __init__(
        self, vocab_size: int, dim: int, commitment_weight: float, entropy_weight: float
    ) -> None:
        """Raises InputError for an entropy_weight, since SimVQ has no such loss."""
        super().__init__(vocab_size, dim)
        if entropy_weight:
            raise InputError("model.entropy_weight: simvq has no entropy loss, set it to 0")
        self.commitment_weight = commitment_weight
        self.embedding = nn.Embedding(vocab_size, dim).requires_grad_(False)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)
        self.embedding_proj = nn.Linear(dim, dim)

    def forward(self, z: torch.Tensor) -> Quantized:
        """z (b, dim, h, w) -> codes, vectors, and the losses codebook and commitment."""
        # In float32 even under autocast, as every search for the nearest entry.
        with torch.autocast(z.device.type, enabled=False):
            z = z.float().movedim(1, -1)
            codebook = self.plain_codebook()
            codes = nearest(z.flatten(0, -2), codebook).view(z.shape[:-1])
            vectors = codebook[codes]
            losses = {
                "codebook": F.mse_loss(vectors, z.detach()),
                "commitment": self.commitment_weight * F.mse_loss(z, vectors.detach()),
            }
            vectors = z + (vectors - z).detach()
        return Quantized(codes, vectors.movedim(-1, 1), losses)

    def lookup(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes (b, h, w) int64 -> vectors (b, dim, h, w) in the parameters' dtype."""
        return self.embedding_proj(self.embedding(codes)).movedim(-1, 1)

    def plain_codebook(self) -> torch.Tensor:
        """The mapped entries (vocab_size, dim) float32: a vq with these gives the same codes."""
        weight, bias = self.embedding_proj.weight.float(), self.embedding_proj.bias.float()
        return F.linear(self.embedding.weight.float(), weight, bias)
