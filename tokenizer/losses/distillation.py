"""Semantic distillation: decoder features predict those of a frozen encoder (GigaTok, VQLoss)."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from evaluations.features.semantic import (
    SemanticEncoder,
    SemanticEncoderName,
    build_semantic_encoder,
)


@dataclass(frozen=True)
class DistillationConfig:
    """Semantic distillation.

    Args:
        weight: Weight of the loss; 0 for none. Published: 0.5.
        encoder: dinov2 (ViT-B/14, published), or efficientnet_lite0, whose weights come with
            requirements.txt.
        encoder_weights: For dinov2: timm's file; null for the Hub.
        expansion: Width of the projector's two hidden layers, over that of the features.
    """

    weight: float = 0.0
    encoder: SemanticEncoderName = "dinov2"
    encoder_weights: str | None = None
    expansion: int = 4

    def __post_init__(self) -> None:
        if self.weight < 0 or self.expansion < 1:
            raise ValueError("loss.distillation: weight must be >= 0, expansion >= 1")
        if self.encoder_weights and self.encoder != "dinov2":
            raise ValueError("loss.distillation.encoder_weights is for encoder dinov2")


def build_encoder(config: DistillationConfig, device: torch.device) -> SemanticEncoder:
    """The frozen encoder; raises InputError if its weights are missing."""
    return build_semantic_encoder(config.encoder, config.encoder_weights, device)


class Projector(nn.Sequential):
    """Maps features (b, width, h, w) to those of the encoder, (b, h * w, dim)."""

    def __init__(self, width: int, dim: int, expansion: int) -> None:
        hidden = expansion * width
        super().__init__(
            nn.Linear(width, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, dim),
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return super().forward(features.flatten(2).mT)


def distillation_loss(projected: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Features (b, positions, dim) each -> minus their mean cosine, a scalar in float32."""
    return -F.cosine_similarity(projected.float(), target.float(), dim=-1).mean()
