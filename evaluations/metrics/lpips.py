"""LPIPS (Zhang et al. 2018, version 0.1, VGG16): the perceptual distance of two images.

The network and its five linear heads are those of the `lpips` package; the weights of VGG16 are
torchvision's.
"""

import warnings
from pathlib import Path
from urllib.error import URLError

import torch
from torch import nn

from core.config import InputError
from core.weights import load_weights, read_file
from evaluations.metrics.perceptual import PerceptualDistance

VGG_FILE = "vgg16-397923af.pth"
VGG_SIZE = "528 MB"


class LPIPS(PerceptualDistance):
    """The perceptual distance with frozen weights.

    Args:
        vgg: torchvision's vgg16-397923af.pth; None to use torchvision's cache or to download it.

    Raises InputError, which names the file and the flag, if weights are missing.
    """

    def __init__(self, vgg: Path | None = None) -> None:
        super().__init__()
        try:
            import lpips
        except ImportError as error:
            raise InputError("LPIPS needs the package lpips: pip install lpips") from error
        path = vgg or _torchvision_file()
        weights = _vgg_features(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the package uses old names of arguments
            network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
        # The package cuts torchvision's layers into slices, which keep the layers' numbers.
        slices = {key.partition(".")[2]: key for key in network.net.state_dict()}
        load_weights(network.net, {slices.get(k, k): v for k, v in weights.items()}, path)
        self.scaling = network.scaling_layer
        self.stages = nn.ModuleList(network.net.get_submodule(f"slice{i}") for i in range(1, 6))
        self.heads = nn.ParameterList(head.get_parameter("model.1.weight") for head in network.lins)
        self.eval().requires_grad_(False)

    def stage_features(self, images: torch.Tensor) -> list[torch.Tensor]:
        """See PerceptualDistance."""
        x, features = self.scaling(images), []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


def _vgg_features(path: Path) -> dict[str, torch.Tensor]:
    """The weights of VGG16's convolutions, by number of the layer."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; give torchvision's {VGG_FILE} (vgg_weights)")
    tensors = read_file(path).weights("model", path)
    prefix = "features."
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _torchvision_file() -> Path:
    """The weights of VGG16 in torchvision's cache; downloads them if they are missing."""
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
                "--vgg_weights), train with --loss.perceptual efficientnet_lite0, or without a "
                "perceptual loss: --loss.perceptual_weight 0"
            ) from error
    return cached
