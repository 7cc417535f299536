"""LeCam regularisation of the discriminator (Tseng et al. 2021, equation 4).

It keeps the logits of real images near the running mean of the fake ones, and the other way round,
which helps where images are few.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from core.distributed.world import World


@dataclass(frozen=True)
class LeCamConfig:
    """LeCam regularisation.

    Args:
        weight: Weight in the discriminator's loss; 0 for none. Published: 0.05 (SEED), 0.001
            (1d-tokenizer, MaskBit).
        compare: logits regularises every logit and updates the running means before their use
            (SEED, XQ-GAN); means regularises the batch's mean logits and updates them after it
            (1d-tokenizer).
        decay: Decay of the running means, per micro-batch.
    """

    weight: float = 0.0
    compare: Literal["logits", "means"] = "logits"
    decay: float = 0.999

    def __post_init__(self) -> None:
        if self.weight < 0 or not 0 < self.decay < 1:
            raise ValueError("loss.lecam: weight must be >= 0, decay in (0, 1)")


class LeCam(nn.Module):
    """The running means of the logits, over all ranks and saved in checkpoints, and the loss."""

    real: torch.Tensor
    fake: torch.Tensor

    def __init__(self, config: LeCamConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("real", torch.zeros(()))
        self.register_buffer("fake", torch.zeros(()))

    def forward(self, real: torch.Tensor, fake: torch.Tensor, world: World) -> torch.Tensor:
        """Logits of real and of fake images -> the unweighted loss, a scalar in float32."""
        real, fake = real.float(), fake.float()
        if self.config.compare == "logits":
            self._update(real, fake, world)
            return self._loss(real, fake)
        loss = self._loss(real.mean(), fake.mean())
        self._update(real, fake, world)
        return loss

    def _loss(self, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        # Copies: the running means change before the backward pass.
        above = F.relu(real - self.fake.clone()).square().mean()
        return above + F.relu(self.real.clone() - fake).square().mean()

    @torch.no_grad()
    def _update(self, real: torch.Tensor, fake: torch.Tensor, world: World) -> None:
        means = world.sum(torch.stack([real.mean(), fake.mean()])) / world.size
        self.real.lerp_(means[0], 1 - self.config.decay)
        self.fake.lerp_(means[1], 1 - self.config.decay)
