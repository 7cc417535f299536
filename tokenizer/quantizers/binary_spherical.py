"""Binary spherical quantisation (BSQ): the signs of a unit vector, as a unit vector.

Zhao et al. 2024. Channel 0 is the highest bit of the code, as published.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from core.errors import InputError
from tokenizer.quantizers.base import Quantized, Quantizer, QuantizerSettings
from tokenizer.quantizers.lookup_free import check_bits, signs_of

LARGEST_GROUP = 20  # the entropy of a group takes 2 ** group_size probabilities of each vector
EPSILON = 1e-8  # added to probabilities inside the logarithm, as published


@dataclass(frozen=True)
class BinarySphericalOptions:
    """Options of the quantizer bsq alone; entropy_weight is the published zeta.

    Args:
        group_size: Channels whose joint entropy is computed, a divisor of codebook_dim; entropies
            of groups are added. 1 is the published "analytical" form.
        inverse_temperature: Of the soft assignments; the entropy loss is divided by it.
        sample_entropy_weight: Weight of the mean entropy of a vector, which is minimised.
        codebook_entropy_weight: Weight of the entropy of the mean assignment, which is maximised.
    """

    group_size: int = 9
    inverse_temperature: float = 1.0
    sample_entropy_weight: float = 1.0
    codebook_entropy_weight: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.group_size <= LARGEST_GROUP or self.inverse_temperature <= 0:
            raise ValueError(
                f"model.bsq: group_size must be in 1 .. {LARGEST_GROUP}, inverse_temperature > 0"
            )
        if min(self.sample_entropy_weight, self.codebook_entropy_weight) < 0:
            raise ValueError("model.bsq: the weights must be >= 0")


class BinarySphericalQuantizer(Quantizer):
    """Replaces u = z / |z| by sign(u) / sqrt(dim), with straight-through gradients."""

    kind = "bsq"
    bits: torch.Tensor

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        commitment_weight: float,
        entropy_weight: float,
        options: BinarySphericalOptions,
    ) -> None:
        """Raises InputError unless vocab_size is 2 ** dim and groups divide dim."""
        super().__init__(vocab_size, dim)
        check_bits(vocab_size, dim)
        if dim % options.group_size:
            raise InputError(
                f"model.bsq.group_size {options.group_size}: must divide codebook_dim {dim}"
            )
        self.commitment_weight, self.entropy_weight = commitment_weight, entropy_weight
        self.options = options
        self.register_buffer("bits", torch.arange(dim - 1, -1, -1), persistent=False)

    @classmethod
    def build(cls, settings: QuantizerSettings) -> "BinarySphericalQuantizer":
        """See Quantizer."""
        s = settings
        return cls(s.vocab_size, s.dim, s.commitment_weight, s.entropy_weight, s.options)

    def forward(self, z: torch.Tensor) -> Quantized:
        """z (b, dim, h, w) -> codes, unit vectors, and the losses commitment and entropy."""
        with torch.autocast(z.device.type, enabled=False):
            u = F.normalize(z.float().movedim(1, -1), dim=-1)
            codes = ((u > 0).long() << self.bits).sum(-1)
            signs = (u > 0) * 2.0 - 1  # 0 counts as negative
            scale = self.dim**-0.5
            # The straight-through gradient is scaled with the signs, as published.
            vectors = (u + (signs - u).detach()) * scale
            distance = (signs * scale - u).square().sum(-1).mean()
            losses = {"commitment": self.commitment_weight * distance}
            if self.entropy_weight:
                losses["entropy"] = self.entropy_weight * self._entropy_loss(u.flatten(0, -2))
        return Quantized(codes, vectors.movedim(-1, 1), losses)

    def lookup(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes (b, h, w) int64 -> unit vectors (b, dim, h, w) float32."""
        return (signs_of(codes, self.bits) * self.dim**-0.5).movedim(-1, 1)

    def _entropy_loss(self, rows: torch.Tensor) -> torch.Tensor:
        """Unit rows (n, dim) -> the weighted difference of entropies (equation 9), a scalar."""
        options = self.options
        groups = rows.unflatten(-1, (-1, options.group_size))
        bits = torch.arange(options.group_size, device=rows.device)
        patterns = signs_of(torch.arange(2**options.group_size, device=rows.device), bits)
        logits = 2 * groups @ patterns.T * self.dim**-0.5 * options.inverse_temperature
        probability = logits.softmax(-1)  # (n, groups, 2 ** group_size)
        sample = _entropy(probability).sum(-1).mean()
        codebook = _entropy(probability.mean(0)).sum()
        weighted = options.sample_entropy_weight * sample
        return (weighted - options.codebook_entropy_weight * codebook) / options.inverse_temperature


def _entropy(probability: torch.Tensor) -> torch.Tensor:
    return -(probability * (probability + EPSILON).log()).sum(-1)
