"""Latent perturbation: codes replaced by near ones before the decoder (RobustTok, XQ-GAN).

A decoder trained on such codes forgives the errors of a GPT's samples. Scores of reconstructions
from perturbed codes (pFID) foretell generation better than those of plain reconstructions.
"""

from dataclasses import dataclass

import torch

from core.config import InputError
from tokenizer.quantizers.base import Quantized, Quantizer
from tokenizer.quantizers.index_backprop import row_chunks


@dataclass(frozen=True)
class PerturbationConfig:
    """Which codes are replaced.

    Args:
        image_share: Share of the images of a batch with replaced codes (beta); 0 for none.
            Published: 0.1.
        probability: Probability of replacing a code of these images (alpha).
        neighbors: A code is replaced by one of this many nearest codes, itself included, with equal
            probability (delta).
        anneal_steps: During training, probability and neighbors fall from the first of these
            optimizer steps to the second, linearly; null for never.
        final_ratio: They fall to this share of their values.
    """

    image_share: float = 0.0
    probability: float = 1.0
    neighbors: int = 100
    anneal_steps: tuple[int, int] | None = None
    final_ratio: float = 0.5

    def __post_init__(self) -> None:
        shares = (self.image_share, self.probability, self.final_ratio)
        if min(shares) < 0 or max(shares) > 1 or self.neighbors < 1:
            raise ValueError(
                "perturbation: image_share, probability and final_ratio must be in [0, 1], "
                "neighbors >= 1"
            )
        if self.anneal_steps and not 0 <= self.anneal_steps[0] < self.anneal_steps[1]:
            raise ValueError(f"perturbation.anneal_steps {self.anneal_steps} must ascend from >= 0")

    def check(self, vocab_size: int) -> None:
        """Raise InputError for options without use, and for fewer codes than neighbors."""
        if not self.image_share and self != PerturbationConfig():
            raise InputError("perturbation: these options need perturbation.image_share > 0")
        if self.image_share and self.neighbors > vocab_size:
            raise InputError(f"perturbation.neighbors {self.neighbors}: only {vocab_size} codes")

    def at(self, step: int) -> "LatentPerturbation | None":
        """The perturbation in one optimizer step; None for none."""
        if not self.image_share:
            return None
        ratio = 1.0
        if self.anneal_steps:
            first, last = self.anneal_steps
            done = min(max((step - first) / (last - first), 0.0), 1.0)
            ratio = 1 + done * (self.final_ratio - 1)
        neighbors = max(1, int(self.neighbors * ratio))
        return LatentPerturbation(self.image_share, self.probability * ratio, neighbors)


@dataclass(frozen=True)
class LatentPerturbation:
    """The perturbation of one batch; the fields are those of PerturbationConfig at one step."""

    image_share: float
    probability: float
    neighbors: int

    def __call__(self, quantizer: Quantizer, quantized: Quantized) -> torch.Tensor:
        """The vectors (b, dim, h, w) after perturbing the batch's first images.

        Gradients are those of the quantizer: the replacement is straight-through. Draws from
        torch's generator.
        """
        count = int(self.image_share * len(quantized.codes))
        codes = quantized.codes[:count]
        if not count:
            return quantized.vectors
        uniform = torch.rand(2, *codes.shape, device=codes.device)
        vectors = quantized.vectors[:count]
        replaced = quantizer.lookup(self.codes(quantizer, codes, uniform))
        moved = vectors + (replaced - vectors).detach()
        return torch.cat([moved, quantized.vectors[count:]])

    @torch.no_grad()
    def codes(
        self, quantizer: Quantizer, codes: torch.Tensor, uniform: torch.Tensor
    ) -> torch.Tensor:
        """Codes (b, h, w) int64 after replacement of some; uniform: (2, b, h, w) in [0, 1).

        Nearness is measured between codebook entries, so that it applies to codes on disk.
        """
        every = torch.arange(quantizer.vocab_size, device=codes.device)
        entries = quantizer.lookup(every[None, None])[0, :, 0].T.float()
        lengths, flat = entries.square().sum(-1), codes.flatten()
        near = []
        for part in row_chunks(flat, entries):
            distances = lengths - 2 * entries[part] @ entries.T
            near.append(distances.topk(self.neighbors, largest=False).indices)
        pick = (uniform[1].flatten() * self.neighbors).long().clamp_(max=self.neighbors - 1)
        chosen = torch.cat(near).gather(1, pick[:, None])[:, 0].view_as(codes)
        return torch.where(uniform[0] < self.probability, chosen, codes)
