"""Lookup-free quantisation (LFQ, MAGVIT-v2): each channel is a bit, its sign.

Yu et al. 2024, with the details of Open-MAGVIT2: channel 0 is the lowest bit of the code.
"""

import torch
from torch.nn import functional as F

from core.errors import InputError
from tokenizer.quantizers.base import Quantized, Quantizer

TEMPERATURE = 0.01  # of the assignments whose entropy is rewarded
MEAN_EPSILON = 1e-5  # added to the mean assignment inside its logarithm, as published


class LookupFreeQuantizer(Quantizer):
    """Replaces each channel by its sign, with straight-through gradients; has no parameters."""

    kind = "lfq"
    bits: torch.Tensor

    def __init__(
        self, vocab_size: int, dim: int, commitment_weight: float, entropy_weight: float
    ) -> None:
        """Raises InputError unless vocab_size is 2 ** dim."""
        super().__init__(vocab_size, dim)
        check_bits(vocab_size, dim)
        self.commitment_weight, self.entropy_weight = commitment_weight, entropy_weight
        self.register_buffer("bits", torch.arange(dim), persistent=False)

    def forward(self, z: torch.Tensor) -> Quantized:
        """z (b, dim, h, w) -> codes, vectors of -1 and 1, and the losses commitment and entropy."""
        with torch.autocast(z.device.type, enabled=False):
            z = z.float().movedim(1, -1)
            signs = (z > 0) * 2.0 - 1  # 0 counts as negative
            codes = ((z > 0).long() << self.bits).sum(-1)
            losses = {"commitment": self.commitment_weight * F.mse_loss(z, signs)}
            if self.entropy_weight:
                losses["entropy"] = self.entropy_weight * entropy_loss(z.flatten(0, -2))
            vectors = z + (signs - z).detach()
        return Quantized(codes, vectors.movedim(-1, 1), losses)

    def lookup(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes (b, h, w) int64 -> vectors (b, dim, h, w) float32 of -1 and 1."""
        return signs_of(codes, self.bits).movedim(-1, 1)


def check_bits(vocab_size: int, dim: int) -> None:
    """Raise InputError unless `dim` bits make `vocab_size` codes."""
    if vocab_size != 2**dim:
        raise InputError(
            f"model.vocab_size {vocab_size}: must be 2 ** codebook_dim = 2 ** {dim}, one bit per "
            "channel"
        )


def signs_of(codes: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Codes (...) int64 -> (..., len(bits)) float32: 1 where a bit of the code is set, else -1."""
    return (codes[..., None] >> bits & 1) * 2.0 - 1


def entropy_loss(rows: torch.Tensor) -> torch.Tensor:
    """Mean entropy of p(code) = softmax(2 <row, code> / 0.01) minus the entropy of the mean of p.

    rows: (n, dim). The softmax runs over all 2 ** dim codes, and is a product over the bits. The
    entropy of a row is the sum of its bits' entropies, and the mean assignment is a matrix product
    of both halves of the bits, so that memory is n * 2 ** (dim / 2) instead of n * 2 ** dim.
    """
    logits = 4 * rows / TEMPERATURE  # of a bit being set
    positive, log_positive, log_negative = logits.sigmoid(), *map(F.logsigmoid, (logits, -logits))
    entropy = -(positive * log_positive + (1 - positive) * log_negative).sum(-1).mean()
    half = rows.shape[1] // 2
    low, high = _assignments(rows[:, :half]), _assignments(rows[:, half:])
    mean = high.T @ low / len(rows)
    return entropy + (mean * (mean + MEAN_EPSILON).log()).sum()


def _assignments(rows: torch.Tensor) -> torch.Tensor:
    """The soft assignments (n, 2 ** bits) of rows (n, bits) to all patterns of signs."""
    bits = torch.arange(rows.shape[1], device=rows.device)
    patterns = signs_of(torch.arange(2 ** rows.shape[1], device=rows.device), bits)
    return (2 * rows @ patterns.T / TEMPERATURE).softmax(-1)
