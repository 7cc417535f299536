"""The networks whose features are compared: the 2015 Inception, and a proxy without weights.

A Frechet distance is called FID on the 2015 Inception alone. The proxy's is `proxy_fd`: it rises
with blur, noise and lost variety, but says nothing that may be compared with a published FID.
"""

from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from core.config import InputError
from core.weights import load_weights, read_file

DetectorName = Literal["inception", "proxy"]
INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_SIDE = 299


class Features(NamedTuple):
    """Pooled features (n, d) float32, and class logits (n, classes) where the network has any."""

    pooled: torch.Tensor
    logits: torch.Tensor | None


class Detector(Protocol):
    """Pixels (n, h, w, 3) uint8 -> Features. `metric` is what its Frechet distance is called."""

    metric: str
    dim: int

    def __call__(self, pixels: torch.Tensor) -> Features:
        """Look at a batch."""
        ...


def build_detector(name: DetectorName, weights: Path | None, device: torch.device) -> Detector:
    """The detector called `name`; raises InputError where the Inception's weights are missing."""
    return ProxyDetector(device) if name == "proxy" else InceptionDetector(weights, device)


class ProxyDetector:
    """Means and deviations of three seeded random convolution layers. NOT FID."""

    metric = "proxy_fd"
    widths = (32, 64, 128)

    def __init__(self, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        widths = (3, *self.widths)
        self.kernels = [
            torch.randn(b, a, 3, 3, generator=generator).div_((9 * a / 2) ** 0.5).to(device)
            for a, b in zip(widths, self.widths, strict=False)
        ]
        self.dim = sum(self.widths)

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor) -> Features:
        """See Detector."""
        x = pixels.to(self.kernels[0].device).movedim(-1, 1).float() / 127.5 - 1
        pooled = []
        for kernel in self.kernels:
            x = F.relu(F.conv2d(x, kernel, stride=2, padding=1))
            pooled.append(x.mean((2, 3)))
        return Features(torch.cat(pooled, dim=1), None)


class InceptionDetector:
    """The TensorFlow Inception of 2015-12-05 that FID is defined on: pool_3 and unbiased logits.

    Always float32: in bf16 the distance is off by percents.
    """

    metric = "fid"
    dim = 2048

    def __init__(self, weights: Path | None, device: torch.device) -> None:
        path = weights or Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
        if not path.is_file():
            raise InputError(
                f"{path}: no such file. FID needs the weights {INCEPTION_FILE}, published with the "
                "releases of pytorch-fid and, the same values, of torch-fidelity; give the file "
                "with --inception_weights, or take --detector proxy (which is NOT FID)"
            )
        self.network = build_inception()
        load_weights(self.network, _with_counters(read_file(path).weights("model", path)), path)
        self.network.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor) -> Features:
        """See Detector."""
        weight = self.network.fc.weight
        x = pixels.to(weight.device).movedim(-1, 1).to(weight.dtype)
        with torch.autocast(x.device.type, enabled=False):
            x = (tf1_resize(x, INCEPTION_SIDE) - 128) / 128
            pooled = pool_features(self.network, x)
            # The Inception Score leaves the bias out.
            return Features(pooled, pooled @ weight.T)


def build_inception() -> nn.Module:
    """The graph of the 2015 network, without weights: torchvision's, with pytorch-fid's blocks."""
    from pytorch_fid import inception as blocks
    from torchvision.models import Inception3

    network = Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    network.Mixed_5b = blocks.FIDInceptionA(192, pool_features=32)
    network.Mixed_5c = blocks.FIDInceptionA(256, pool_features=64)
    network.Mixed_5d = blocks.FIDInceptionA(288, pool_features=64)
    for name, width in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
        setattr(network, f"Mixed_{name}", blocks.FIDInceptionC(768, channels_7x7=width))
    network.Mixed_7b = blocks.FIDInceptionE_1(1280)
    network.Mixed_7c = blocks.FIDInceptionE_2(2048)
    return network


def pool_features(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Scaled images (n, 3, 299, 299) -> pool_3 (n, 2048)."""
    for name in ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3"):
        x = network.get_submodule(name)(x)
    x = F.max_pool2d(x, 3, stride=2)
    for name in ("Conv2d_3b_1x1", "Conv2d_4a_3x3"):
        x = network.get_submodule(name)(x)
    x = F.max_pool2d(x, 3, stride=2)
    for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"):
        x = network.get_submodule(f"Mixed_{name}")(x)
    return x.mean((2, 3))


def tf1_resize(x: torch.Tensor, side: int) -> torch.Tensor:
    """TensorFlow 1's bilinear resize of (n, c, h, w) to (n, c, side, side).

    Corners not aligned, no half-pixel shift, no antialiasing: other resizes give other FIDs.
    """
    top, bottom, down = _taps(x.shape[2], side, x)
    left, right, across = _taps(x.shape[3], side, x)
    upper, lower = x[:, :, top], x[:, :, bottom]
    upper = upper[..., left] + (upper[..., right] - upper[..., left]) * across
    lower = lower[..., left] + (lower[..., right] - lower[..., left]) * across
    return upper + (lower - upper) * down[:, None]


def _taps(size: int, side: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each output place: the two inputs that it mixes, and the second one's share."""
    scale = torch.tensor(size, dtype=torch.float32) / torch.tensor(side, dtype=torch.float32)
    places = torch.arange(side, dtype=torch.float32) * scale
    first = places.floor().long()
    share = (places - first).to(x.device, x.dtype)
    first = first.to(x.device)
    return first, (first + 1).clamp(max=size - 1), share


def _with_counters(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The published file has no num_batches_tracked; inference does not read it."""
    counters = {
        key.replace("running_mean", "num_batches_tracked"): torch.tensor(0)
        for key in tensors
        if key.endswith("running_mean")
    }
    return counters | tensors
