"""Semantic distillation: decoder features predict those of a frozen encoder (GigaTok, VQLoss)."""

import torch
from torch import nn
from torch.nn import functional as F

from evaluations.features.semantic import SemanticEncoder, build_semantic_encoder
from tokenizer.losses.config import DistillationConfig


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
