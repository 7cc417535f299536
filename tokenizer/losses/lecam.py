"""LeCam regularisation of the discriminator (Tseng et al. 2021, equation 4).

It keeps the logits of real images near the running mean of the fake ones, and the other way round,
which helps where images are few.
"""

import torch
from torch import nn
from torch.nn import functional as F

from core.distributed.world import World
from tokenizer.losses.config import LeCamConfig


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
