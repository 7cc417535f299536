"""LPIPS (Zhang et al. 2018, version 0.1, VGG16): how far apart two images look.

The trunk is torchvision's ImageNet VGG16; the five linear heads are the 7 kB file that the `lpips`
package ships.
"""

import importlib.util
from pathlib import Path
from urllib.error import URLError

import torch
from torch import nn

from core.config import InputError
from core.weights import read_file

VGG_FILE = "vgg16-397923af.pth"
VGG_SIZE = "528 MB"
# Where each of the five stages ends in torchvision's vgg16().features.
_STAGE_ENDS = (4, 9, 16, 23, 30)
_WIDTHS = (64, 128, 256, 512, 512)
# The input statistics of ImageNet, for images in [-1, 1].
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class LPIPS(nn.Module):
    """The perceptual distance, frozen: gradients flow to the images alone.

    Args:
        vgg: torchvision's vgg16-397923af.pth; None for torchvision's cache or a download.
        heads: The `lpips` package's weights/v0.1/vgg.pth; None to find the installed one.

    Raises InputError, naming the file and the flag, where weights are missing.
    """

    def __init__(self, vgg: Path | None = None, heads: Path | None = None) -> None:
        super().__init__()
        from torchvision.models import vgg16

        trunk = vgg16(weights=None).get_submodule("features")
        trunk.load_state_dict(_vgg_features(vgg))
        layers = list(trunk.children())
        for layer in layers:
            if isinstance(layer, nn.ReLU):
                layer.inplace = False  # the features before it are needed
        starts = (0, *_STAGE_ENDS)
        self.stages = nn.ModuleList(
            nn.Sequential(*layers[a:b]) for a, b in zip(starts, _STAGE_ENDS, strict=False)
        )
        for i, head in enumerate(_read_heads(heads or _installed_heads())):
            self.register_buffer(f"head{i}", head, persistent=False)
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "LPIPS":
        """Stay in eval mode whatever the module around it does."""
        return super().train(False)

    def forward(self, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        """Images (b, 3, h, w) in [-1, 1] each -> distances (b,) float32.

        Gradients flow to `fake` alone.
        """
        with torch.no_grad():
            wanted = self._features(real)
        found = self._features(fake)
        distance = torch.zeros(len(real), device=real.device)
        for i, (a, b) in enumerate(zip(wanted, found, strict=True)):
            head = self.get_buffer(f"head{i}")
            distance = distance + ((a - b).square() * head).sum(1).mean((1, 2))
        return distance

    def _features(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Unit-length features of the five stages, float32."""
        x = (images - self.get_buffer("shift")) / self.get_buffer("scale")
        features = []
        for stage in self.stages:
            x = stage(x)
            y = x.float()
            features.append(y / (y.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return features


def _vgg_features(path: Path | None) -> dict[str, torch.Tensor]:
    """The convolutions of VGG16, from a file or through torchvision."""
    if path is None:
        path = _torchvision_file()
    if not path.is_file():
        raise InputError(f"{path}: no such file; give torchvision's {VGG_FILE} (vgg_weights)")
    tensors = read_file(path).weights("model", path)
    prefix = "features."
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _torchvision_file() -> Path:
    """VGG16's weights in torchvision's cache; downloaded, and announced, where they are not."""
    from torchvision.models import VGG16_Weights

    cached = Path(torch.hub.get_dir()) / "checkpoints" / VGG_FILE
    if not cached.is_file():
        print(f"LPIPS: downloading VGG16 ({VGG_SIZE}) to {cached}", flush=True)
        try:
            VGG16_Weights.IMAGENET1K_V1.get_state_dict(progress=True, check_hash=True)
        except (URLError, OSError, RuntimeError) as error:
            raise InputError(
                f"LPIPS needs torchvision's {VGG_FILE}, which is not in {cached.parent} and cannot "
                f"be downloaded ({error}); give it with --loss.vgg_weights (reconstruct: "
                "--vgg_weights), or train without LPIPS: --loss.perceptual_weight 0"
            ) from error
    return cached


def _installed_heads() -> Path:
    spec = importlib.util.find_spec("lpips")
    if spec is None or spec.origin is None:
        raise InputError("LPIPS needs the heads shipped in the `lpips` package: pip install lpips")
    return Path(spec.origin).parent / "weights" / "v0.1" / "vgg.pth"


def _read_heads(path: Path) -> list[torch.Tensor]:
    """Five non-negative channel weights (1, width, 1, 1)."""
    tensors = read_file(path).weights("model", path)
    heads = []
    for i, width in enumerate(_WIDTHS):
        head = tensors.get(f"lin{i}.model.1.weight")
        if head is None or head.shape != (1, width, 1, 1):
            raise InputError(f"{path}: not the LPIPS heads for VGG16, version 0.1")
        heads.append(head)
    return heads
