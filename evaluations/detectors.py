"""The networks whose features are compared: the 2015 Inception, and what stands in without weights.

A Frechet distance is called FID on the 2015 Inception's weights alone. The others' distances rise
with blur, noise and lost variety, but may not be compared with any published FID.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import torch
from torch.nn import functional as F

from evaluations import inception

DetectorName = Literal["inception", "proxy", "random_inception"]


class Features(NamedTuple):
    """Pooled features (n, dim) float32, and spatial ones (n, spatial_dim) where there are any."""

    pooled: torch.Tensor
    spatial: torch.Tensor | None


class Detector(Protocol):
    """Pixels (n, h, w, 3) uint8 -> Features.

    `metric` is what its Frechet distance is called, `classifier` (classes, dim) turns pooled
    features into the logits of the Inception Score, `weights_sha256` says which weights it has.
    """

    metric: str
    dim: int
    spatial_dim: int
    classifier: torch.Tensor | None
    weights_sha256: str

    def __call__(self, pixels: torch.Tensor) -> Features:
        """Look at a batch."""
        ...


def build_detector(name: DetectorName, weights: Path | None, device: torch.device) -> Detector:
    """The detector called `name`; raises InputError where the Inception's weights are missing."""
    if name == "proxy":
        return ProxyDetector(device)
    return InceptionDetector(weights, device, random=name == "random_inception")


def note_of(detector: Detector) -> str:
    """What every output says beside the distance of a detector that is not FID's."""
    return "" if detector.metric == "fid" else "NOT FID"


class ProxyDetector:
    """Means of three seeded random convolution layers. NOT FID."""

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
        """See Detector."""
        x = pixels.to(self.kernels[0].device).movedim(-1, 1).float() / 127.5 - 1
        pooled = []
        with full_float32(x.device):
            for kernel in self.kernels:
                x = F.relu(F.conv2d(x, kernel, stride=2, padding=1))
                pooled.append(x.mean((2, 3)))
        return Features(torch.cat(pooled, dim=1), None)


class InceptionDetector:
    """FID's network; with `random` weights its distance is called `random_inception_fd`."""

    dim = 2048
    spatial_dim = 17 * 17 * inception.SPATIAL_CHANNELS

    def __init__(self, weights: Path | None, device: torch.device, random: bool = False) -> None:
        self.metric = "random_inception_fd" if random else "fid"
        if random:
            network = inception.build_inception().eval().requires_grad_(False)
            self.weights_sha256 = inception.fill_random(network)
        else:
            network, self.weights_sha256 = inception.load_inception(weights)
        self.network, self.device = network.to(device), device
        # The Inception Score leaves the bias out.
        self.classifier: torch.Tensor | None = network.get_parameter("fc.weight")

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor) -> Features:
        """See Detector."""
        with full_float32(self.device):
            return Features(*inception.features(self.network, pixels))


@contextlib.contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """No autocast and no TF32, whatever surrounds it: in bf16 an FID is off by percents."""
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
