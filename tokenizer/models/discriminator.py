"""The networks that tell real images from reconstructions."""

import itertools
import math

import torch
from torch import nn
from torch.nn import functional as F

from core.config import InputError
from tokenizer.models.config import DiscriminatorConfig


def build_discriminator(config: DiscriminatorConfig, image_size: tuple[int, int]) -> nn.Module:
    """The discriminator for images of `image_size` (height, width)."""
    if config.kind == "patchgan":
        return PatchGAN(config.base_channels, config.num_layers)
    height, width = image_size
    if height != width or height < 8 or height & (height - 1):
        raise InputError(
            f"discriminator.kind {config.kind} needs square images with a power of two as side, "
            f"not {height} x {width}; use patchgan"
        )
    ours = config.kind == "stylegan"
    network = StyleGANDiscriminator if ours else ReferenceStyleGANDiscriminator
    return network(height, config.max_channels)


class PatchGAN(nn.Module):
    """Classifies overlapping patches as real or reconstructed.

    Keys follow the released training checkpoints.

    BatchNorm uses the statistics of each rank's own batch, as the reference does.
    """

    def __init__(self, base_channels: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        widths = [base_channels * min(2**i, 8) for i in range(num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for i in range(1, num_layers + 1):
            stride = 2 if i < num_layers else 1
            layers += [
                nn.Conv2d(widths[i - 1], widths[i], 4, stride, 1, bias=False),
                nn.BatchNorm2d(widths[i]),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(widths[-1], 1, 4, 1, 1))
        self.main = nn.Sequential(*layers)
        self.apply(_initialize_patchgan)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (b, 3, H, W) in [-1, 1] -> logits (b, 1, h, w), high for real."""
        return self.main(images)


def _initialize_patchgan(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)


def _widths(side: int, max_channels: int) -> list[int]:
    """Channels from `side` down to 4 pixels: 64 at 256, doubling with each halving."""
    levels = int(math.log2(side)) - 2
    return [min(max_channels, 2**14 // (side >> i)) for i in range(levels + 1)]


class StyleGANDiscriminator(nn.Module):
    """Residual blocks down to 4 x 4, then one logit (Karras et al. 2020, figure 7c); no norms."""

    def __init__(self, side: int, max_channels: int = 512) -> None:
        super().__init__()
        widths = _widths(side, max_channels)
        self.stem = nn.Conv2d(3, widths[0], 1)
        self.blocks = nn.ModuleList(_ResidualDown(a, b) for a, b in itertools.pairwise(widths))
        self.last = nn.Conv2d(widths[-1], widths[-1], 3, padding=1)
        self.hidden = nn.Linear(widths[-1] * 16, widths[-1])
        self.logit = nn.Linear(widths[-1], 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (b, 3, side, side) in [-1, 1] -> logits (b, 1), high for real."""
        x = F.leaky_relu(self.stem(images), 0.2)
        for block in self.blocks:
            x = block(x)
        x = F.leaky_relu(self.last(x), 0.2).flatten(1)
        return self.logit(F.leaky_relu(self.hidden(x), 0.2))


class _ResidualDown(nn.Module):
    """Two convolutions and a blurred halving, plus a blurred 1 x 1 shortcut."""

    blur: torch.Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inputs, 3, padding=1)
        self.conv2 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, bias=False)
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
        self.register_buffer("blur", torch.outer(taps, taps) / 64, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(b, inputs, h, w) -> (b, outputs, h / 2, w / 2)."""
        h = F.leaky_relu(self.conv1(x), 0.2)
        h = F.leaky_relu(self.conv2(self._halve(h)), 0.2)
        return (h + self.shortcut(self._halve(x))) / math.sqrt(2)

    def _halve(self, x: torch.Tensor) -> torch.Tensor:
        kernel = self.blur.to(x.dtype).expand(x.shape[1], 1, 4, 4)
        return F.conv2d(x, kernel, stride=2, padding=1, groups=x.shape[1])


class ReferenceStyleGANDiscriminator(nn.Module):
    """LlamaGen's StyleGAN discriminator (its discriminator_stylegan.py), with its keys.

    It differs from StyleGANDiscriminator: the stem is 3 x 3; a block widens in its first
    convolution and halves the resolution after the second, with a blur and a strided convolution;
    its shortcut is not blurred.
    """

    def __init__(self, side: int, max_channels: int = 512) -> None:
        super().__init__()
        widths = _widths(side, max_channels)
        stem = [nn.Conv2d(3, widths[0], 3, padding=1), nn.LeakyReLU(0.2)]
        down = [_ReferenceDown(a, b) for a, b in itertools.pairwise(widths)]
        self.blocks = nn.ModuleList([*stem, *down])
        last = widths[-1]
        self.final_conv = nn.Sequential(nn.Conv2d(last, last, 3, padding=1), nn.LeakyReLU(0.2))
        self.final_linear = nn.Sequential(
            nn.Linear(last * 16, last), nn.LeakyReLU(0.2), nn.Linear(last, 1)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (b, 3, side, side) in [-1, 1] -> logits (b, 1), high for real."""
        x = images
        for block in self.blocks:
            x = block(x)
        return self.final_linear(self.final_conv(x).flatten(1))


class _ReferenceDown(nn.Module):
    """A residual block that halves its input; the names of its parts are the reference's."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv_res = nn.Conv2d(inputs, outputs, 1, stride=2)
        self.net = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(outputs, outputs, 3, padding=1),
            nn.LeakyReLU(0.2),
        )
        self.downsample = nn.Sequential(
            _ReflectedBlur(), nn.Conv2d(outputs, outputs, 3, stride=2, padding=1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(b, inputs, h, w) -> (b, outputs, h / 2, w / 2)."""
        return (self.downsample(self.net(x)) + self.conv_res(x)) / math.sqrt(2)


class _ReflectedBlur(nn.Module):
    """Blur with the taps 1 2 1 along both axes and reflected borders; the taps are a buffer."""

    f: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("f", torch.tensor([1.0, 2.0, 1.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(b, c, h, w) -> the same shape."""
        kernel = torch.outer(self.f, self.f)
        kernel = (kernel / kernel.sum()).to(x.dtype).expand(x.shape[1], 1, 3, 3)
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), kernel, groups=x.shape[1])
