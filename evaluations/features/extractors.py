"""Feature extractors: the 2015 Inception, DINOv2, EfficientNet-lite0, and random networks.

A Frechet distance is called FID only on the weights of the 2015 Inception. Distances on the other
networks also rise with blur, noise and lost variety, but must not be compared with published FIDs.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch.nn import functional as F

from core.distributed.world import World
from evaluations.features import dinov2, efficientnet, inception
from evaluations.features.config import ExtractorConfig
from evaluations.features.efficientnet import EfficientNetLite0


class Features(NamedTuple):
    """Features of n images, float32.

    pooled: (n, dim). spatial: (n, spatial_dim), for sFID; None if the network has none.
    """

    pooled: torch.Tensor
    spatial: torch.Tensor | None


class FeatureExtractor(Protocol):
    """Pixels (n, h, w, 3) uint8 -> Features.

    metric: The name of the Frechet distance on these features. spatial_dim: 0 without spatial
    features. classifier: (classes, dim), maps pooled features to the logits of the Inception Score.
    weights_sha256: Identifies the weights.
    """

    metric: str
    dim: int
    spatial_dim: int
    classifier: torch.Tensor | None
    weights_sha256: str

    def __call__(self, pixels: torch.Tensor) -> Features:
        """Extract the features of a batch."""
        ...


def note_of(extractor: FeatureExtractor) -> str:
    """The note that accompanies every distance that is not FID, else ""."""
    return "" if extractor.metric == "fid" else "NOT FID"


class ProxyExtractor:
    """Spatial means of three seeded random convolution layers. NOT FID."""

    metric = "proxy_fd"
    spatial_dim = 0
    classifier: torch.Tensor | None = None
    weights_sha256 = "seed 0"
    widths = (32, 64, 128)
    dim = sum(widths)

    def __init__(self, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        widths = (3, *self.widths)
        self.kernels = [
            torch.randn(b, a, 3, 3, generator=generator).div_((9 * a / 2) ** 0.5).to(device)
            for a, b in zip(widths, self.widths, strict=False)
        ]

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor) -> Features:
        """See FeatureExtractor."""
        x = pixels.to(self.kernels[0].device).movedim(-1, 1).float() / 127.5 - 1
        pooled = []
        with full_float32(x.device):
            for kernel in self.kernels:
                x = F.relu(F.conv2d(x, kernel, stride=2, padding=1))
                pooled.append(x.mean((2, 3)))
        return Features(torch.cat(pooled, dim=1), None)


class InceptionExtractor:
    """The network of FID. With other weights, the distance has another name."""

    dim = 2048
    spatial_dim = 17 * 17 * inception.SPATIAL_CHANNELS

    def __init__(self, weights: Path | None, device: torch.device, random: bool = False) -> None:
        if random:
            network = inception.build_inception().eval().requires_grad_(False)
            self.weights_sha256 = inception.fill_random(network)
            self.metric = "random_inception_fd"
        else:
            network, self.weights_sha256 = inception.load_inception(weights)
            published = self.weights_sha256.startswith(inception.INCEPTION_SHA256)
            self.metric = "fid" if published else "unverified_inception_fd"
        self.network, self.device = network.to(device), device
        # The Inception Score ignores the bias.
        self.classifier: torch.Tensor | None = network.get_parameter("fc.weight")

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor) -> Features:
        """See FeatureExtractor."""
        with full_float32(self.device):
            return Features(*inception.features(self.network, pixels))


class DinoV2Extractor:
    """The class token of DINOv2's ViT-L/14 (Stein et al. 2023): FD-DINOv2, not FID."""

    metric = "fd_dinov2"
    dim = 1024
    spatial_dim = 0
    classifier: torch.Tensor | None = None

    def __init__(self, weights: str, device: torch.device) -> None:
        network, self.weights_sha256 = dinov2.load_dinov2(weights)
        self.network, self.device = network.to(device), device

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor) -> Features:
        """See FeatureExtractor."""
        with full_float32(self.device):
            return Features(dinov2.features(self.network, pixels.to(self.device)), None)


class EfficientNetExtractor:
    """The pooled features of EfficientNet-lite0, of images resized to 224 x 224. NOT FID."""

    metric = "efficientnet_lite0_fd"
    dim = efficientnet.DIM
    spatial_dim = 0
    classifier: torch.Tensor | None = None

    def __init__(self, device: torch.device) -> None:
        self.network, self.device = EfficientNetLite0().to(device), device
        self.weights_sha256 = self.network.weights_sha256

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor) -> Features:
        """See FeatureExtractor."""
        x = pixels.to(self.device).movedim(-1, 1).float()
        size = (efficientnet.SIDE, efficientnet.SIDE)
        if x.shape[2:] != size:
            x = F.interpolate(x, size, mode="bicubic", antialias=True).clamp_(0, 255)
        with full_float32(self.device):
            return Features(self.network.pooled(x / 127.5 - 1), None)


def build_extractor(config: ExtractorConfig, world: World) -> FeatureExtractor:
    """The network on this process's device; raises InputError if its weights are missing."""
    if config.extractor == "proxy":
        return ProxyExtractor(world.device)
    if config.extractor == "efficientnet_lite0":
        return EfficientNetExtractor(world.device)
    if config.extractor == "dinov2":
        return DinoV2Extractor(config.dinov2_weights, world.device)
    random = config.extractor == "random_inception"
    return InceptionExtractor(config.inception_weights, world.device, random)


@contextlib.contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Disable autocast and TF32: in bf16 an FID is wrong by several percent."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            torch.autocast(device.type, enabled=False),
            torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
