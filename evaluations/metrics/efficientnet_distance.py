"""A perceptual distance on EfficientNet-lite0, for where VGG16's weights (LPIPS) are missing."""

import torch
from torch import nn

from evaluations.features.efficientnet import STAGE_CHANNELS, EfficientNetLite0
from evaluations.metrics.perceptual import PerceptualDistance


class EfficientNetDistance(PerceptualDistance):
    """The mean over five stages of the squared distance of unit features; in [0, 4].

    It has no heads fitted to human judgements, so its values are not comparable with LPIPS.
    """

    def __init__(self, network: EfficientNetLite0 | None = None) -> None:
        super().__init__()
        self.network = network or EfficientNetLite0()
        share = 1 / len(STAGE_CHANNELS)
        self.heads = nn.ParameterList(torch.tensor(share) for _ in STAGE_CHANNELS)
        self.eval().requires_grad_(False)

    def stage_features(self, images: torch.Tensor) -> list[torch.Tensor]:
        """See PerceptualDistance."""
        return self.network.stages(images)
