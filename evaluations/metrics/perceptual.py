"""What every perceptual distance shares: unit features of several stages, compared in float32."""

import abc

import torch
from torch import nn


class PerceptualDistance(nn.Module, abc.ABC):
    """The distance of two images in the features of a frozen network (Zhang et al. 2018, eq. 1).

    A subclass defines `stage_features`, and sets `heads`: one weight per stage, (channels, 1, 1) or
    (1, channels, 1, 1) or a scalar, of the squared differences.
    """

    heads: nn.ParameterList

    def train(self, mode: bool = True) -> "PerceptualDistance":
        """Stay in eval mode, even if the surrounding module is in training mode."""
        return super().train(False)

    def forward(self, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        """Images (b, 3, h, w) in [-1, 1] each -> distances (b,) float32.

        Only `fake` receives gradients.
        """
        with torch.no_grad():
            expected = self._unit_features(real)
        distance = torch.zeros(len(real), device=real.device)
        for a, b, head in zip(expected, self._unit_features(fake), self.heads, strict=True):
            distance = distance + ((a - b).square() * head).sum(1).mean((1, 2))
        return distance

    @abc.abstractmethod
    def stage_features(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Images (b, 3, h, w) in [-1, 1] -> features (b, channels, rows, columns) per stage."""

    def _unit_features(self, images: torch.Tensor) -> list[torch.Tensor]:
        """The features with unit length along the channels, float32."""
        features = (x.float() for x in self.stage_features(images))
        return [x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in features]
