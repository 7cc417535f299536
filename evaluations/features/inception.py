"""The TensorFlow Inception of 2015-12-05, on which FID, sFID and IS are defined."""

import hashlib
import logging
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from core.config import InputError
from core.download import WebFile, fetch_web
from core.weights import file_sha256, load_weights, read_file

logger = logging.getLogger(__name__)

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d"  # the first digits of the published file's sha256
INCEPTION_URL = (
    f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILE}"
)
SIDE = 299
SPATIAL_CHANNELS = 7  # of 192: sFID takes about 2,048 values from a map of 17 x 17


def load_inception(weights: Path | None) -> tuple[nn.Module, str]:
    """The network with the published weights, in eval mode, and the file's sha256.

    weights: pytorch-fid's or torch-fidelity's file; None for torch.hub's cache or a download.
    Raises InputError, which names the file and the flag, if they are unavailable.
    """
    path = weights or _cached_file()
    if not path.is_file():
        raise InputError(f"{path}: no such file. {_ADVICE}")
    sha256 = file_sha256(path)
    if not sha256.startswith(INCEPTION_SHA256):
        logger.warning(
            "%s: sha256 %.8s is not %s of FID's file: the distance is not called FID",
            *(path, sha256, INCEPTION_SHA256),
        )
    network = build_inception()
    load_weights(network, _with_counters(read_file(path).weights("model", path)), path)
    return network.eval().requires_grad_(False), sha256


_ADVICE = (
    f"FID needs {INCEPTION_FILE}, a release of pytorch-fid on GitHub (fid_weights), or the same "
    "values as weights-inception-2015-12-05-6726825d.pth, a release of torch-fidelity; give the "
    "file with --metrics.inception_weights, or use --metrics.extractor proxy (which is NOT FID)"
)


def inception_file() -> WebFile:
    """The published file and its place in torch.hub's cache."""
    place = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    return WebFile(INCEPTION_URL, place, INCEPTION_SHA256)


def _cached_file() -> Path:
    """The file in torch.hub's cache; downloads it if it is missing."""
    try:
        return fetch_web(inception_file())
    except InputError as error:
        raise InputError(f"{error}. {_ADVICE}") from error


def build_inception() -> nn.Module:
    """The 2015 network without its weights: torchvision's Inception with pytorch-fid's blocks."""
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


@torch.no_grad()
def fill_random(network: nn.Module) -> str:
    """Fill the network with seeded random weights, for self-tests (NOT FID) -> their name.

    The seed of each tensor is its key. The scale preserves the size of activations.
    """
    for key, value in network.state_dict().items():
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "little")
        drawn = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed))
        if value.dim() > 1:
            value.copy_(drawn * (2 / value[0].numel()) ** 0.5)
        elif key.endswith("running_var") or key.endswith("bn.weight"):
            value.fill_(1)
        elif value.is_floating_point():
            value.copy_(0.1 * drawn)
    return "random"


def features(network: nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels (n, h, w, 3) uint8 -> pool_3 (n, 2048) and sFID's spatial features (n, 2023)."""
    weight = network.get_parameter("fc.weight")
    x = pixels.to(weight.device).movedim(-1, 1).to(weight.dtype)
    x = (tf1_resize(x, SIDE) - 128) / 128
    for name in ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3"):
        x = network.get_submodule(name)(x)
    x = F.max_pool2d(x, 3, stride=2)
    for name in ("Conv2d_3b_1x1", "Conv2d_4a_3x3"):
        x = network.get_submodule(name)(x)
    x = F.max_pool2d(x, 3, stride=2)
    for name in ("5b", "5c", "5d", "6a", "6b", "6c"):
        x = network.get_submodule(f"Mixed_{name}")(x)
    # TensorFlow's mixed_6/conv is the first branch of the next block.
    spatial = network.get_submodule("Mixed_6d.branch1x1")(x)[:, :SPATIAL_CHANNELS]
    for name in ("6d", "6e", "7a", "7b", "7c"):
        x = network.get_submodule(f"Mixed_{name}")(x)
    # The published statistics are in the order height, width, channel; any other order gives an
    # sFID of 299 instead of 6.
    return x.mean((2, 3)), spatial.movedim(1, -1).flatten(1)


def tf1_resize(x: torch.Tensor, side: int) -> torch.Tensor:
    """TensorFlow 1's bilinear resize of (n, c, h, w) to (n, c, side, side).

    Without aligned corners, half-pixel centres or antialiasing; any other resize changes the FID.
    """
    top, bottom, down = _taps(x.shape[2], side, x)
    left, right, across = _taps(x.shape[3], side, x)
    upper, lower = x[:, :, top], x[:, :, bottom]
    upper = upper[..., left] + (upper[..., right] - upper[..., left]) * across
    lower = lower[..., left] + (lower[..., right] - lower[..., left]) * across
    return upper + (lower - upper) * down[:, None]


def _taps(size: int, side: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each output position: the two input positions, and the weight of the second."""
    scale = torch.tensor(size, dtype=torch.float32) / torch.tensor(side, dtype=torch.float32)
    positions = torch.arange(side, dtype=torch.float32) * scale
    first = positions.floor().long()
    share = (positions - first).to(x.device, x.dtype)
    first = first.to(x.device)
    return first, (first + 1).clamp(max=size - 1), share


def _with_counters(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Add num_batches_tracked, which the published file lacks and inference ignores."""
    counters = {
        key.replace("running_mean", "num_batches_tracked"): torch.tensor(0)
        for key in tensors
        if key.endswith("running_mean")
    }
    return counters | tensors
