"""Latent perturbation: codes replaced by near ones before the decoder (RobustTok, XQ-GAN).

A decoder trained on such codes forgives the errors of a GPT's samples. Scores of reconstructions
from perturbed codes (pFID) foretell generation better than those of plain reconstructions.
"""

from dataclasses import dataclass

import torch

from tokenizer.quantizers.base import Quantized, Quantizer
from tokenizer.quantizers.config import PerturbationConfig
from tokenizer.quantizers.index_backprop import row_chunks


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


def perturbation_at(config: PerturbationConfig, step: int) -> LatentPerturbation | None:
    """The perturbation in one optimizer step; None for none."""
    if not config.image_share:
        return None
    ratio = 1.0
    if config.anneal_steps:
        first, last = config.anneal_steps
        done = min(max((step - first) / (last - first), 0.0), 1.0)
        ratio = 1 + done * (config.final_ratio - 1)
    neighbors = max(1, int(config.neighbors * ratio))
    return LatentPerturbation(config.image_share, config.probability * ratio, neighbors)
