"""Which network extracts features."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

DINOV2_HUB_ID = "timm/vit_large_patch14_dinov2.lvd142m/model.safetensors"


SemanticEncoderName = Literal["dinov2", "efficientnet_lite0"]


ExtractorName = Literal["inception", "dinov2", "efficientnet_lite0", "proxy", "random_inception"]


@dataclass(frozen=True, kw_only=True)
class ExtractorConfig:
    """Which network extracts features.

    Args:
        extractor: inception (FID); dinov2 (FD-DINOv2); efficientnet_lite0, whose weights come with
            requirements.txt; or, without weights, proxy or random_inception. Only the first is FID.
        inception_weights: The file pt_inception-2015-12-05-6726825d.pth; null to use torch.hub's
            cache or to download it.
        dinov2_weights: DINOv2's ViT-L/14: dinov2_vitl14_pretrain.pth, timm's file, or a Hub id.
        batch_size: Images per forward pass, on each process.
    """

    extractor: ExtractorName = "inception"
    inception_weights: Path | None = None
    dinov2_weights: str = DINOV2_HUB_ID
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"metrics.batch_size is {self.batch_size}, must be >= 1")
