"""Frozen encoders that give semantic features of image regions, behind one protocol.

Tokenizers are distilled towards them, and hidden states of a GPT are aligned with them.
"""

from typing import Any, Protocol

import torch
from torch.nn import functional as F

from evaluations.features.config import SemanticEncoderName
from evaluations.features.dinov2 import MEAN, STD, load_patch_encoder
from evaluations.features.efficientnet import STAGE_CHANNELS, EfficientNetLite0

DINOV2 = "vit_base_patch14_dinov2.lvd142m"  # timm's name of DINOv2 ViT-B/14
DINOV2_PATCH = 14


class SemanticEncoder(Protocol):
    """Images (b, 3, h, w) in [-1, 1] -> features (b, rows * columns, dim) float32, row by row.

    dim: The number of channels of a feature. Features carry no gradients.
    """

    dim: int

    def __call__(self, images: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """The features of `grid` (rows, columns) equal regions of each image."""
        ...


def build_semantic_encoder(
    name: SemanticEncoderName, weights: str | None, device: torch.device
) -> SemanticEncoder:
    """The encoder on `device`.

    weights: For dinov2, a file with timm's tensors; None for the Hub's. Raises InputError if the
    weights are missing.
    """
    match name:
        case "dinov2":
            return DinoV2Patches(weights, device)
        case "efficientnet_lite0":
            return EfficientNetRegions(device)


class DinoV2Patches:
    """The normalised patch tokens of DINOv2 ViT-B/14; an image has 14 pixels per grid position."""

    def __init__(self, weights: str | None, device: torch.device) -> None:
        self.network: Any = load_patch_encoder(DINOV2, weights).to(device)
        self.dim: int = self.network.num_features

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """See SemanticEncoder."""
        size = (grid[0] * DINOV2_PATCH, grid[1] * DINOV2_PATCH)
        x = F.interpolate(images.float(), size, mode="bicubic", antialias=True, align_corners=False)
        x = x.clamp(-1, 1) / 2 + 0.5
        mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (MEAN, STD))
        return self.network.forward_features((x - mean) / std)[:, 1:].float()


class EfficientNetRegions:
    """EfficientNet-lite0's last stage, averaged or interpolated to the grid."""

    dim = STAGE_CHANNELS[-1]

    def __init__(self, device: torch.device) -> None:
        self.network = EfficientNetLite0().to(device)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """See SemanticEncoder."""
        features = self.network.stages(images.float())[-1].float()
        return F.interpolate(features, grid, mode="bilinear", antialias=True).flatten(2).mT
