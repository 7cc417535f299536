"""The convolutional encoder and decoder of the VQGAN.

Module names follow the released files, whose keys they must match.
"""

import itertools

import torch
from torch import nn
from torch.nn import functional as F

from tokenizer.models.config import VQConfig


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    """The norm that all layers of the model use."""
    return nn.GroupNorm(groups, channels, eps=1e-6)


def conv3x3(inputs: int, outputs: int) -> nn.Conv2d:
    """A 3 x 3 convolution that keeps height and width."""
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class ResnetBlock(nn.Module):
    """Twice norm, swish and convolution, plus a shortcut."""

    def __init__(self, inputs: int, outputs: int, config: VQConfig) -> None:
        super().__init__()
        groups, dropout = config.norm_groups, config.dropout
        self.norm1, self.conv1 = group_norm(inputs, groups), conv3x3(inputs, outputs)
        self.norm2, self.conv2 = group_norm(outputs, groups), conv3x3(outputs, outputs)
        self.dropout = nn.Dropout(dropout)
        self.nin_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(b, inputs, h, w) -> (b, outputs, h, w)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """One-head self-attention over all positions, added to its input."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(b, channels, h, w) -> the same."""
        h = self.norm(x)
        q, k, v = (part(h).flatten(2).transpose(1, 2)[:, None] for part in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return x + self.proj_out(attended.transpose(1, 2).unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    """Halve the resolution: pad right and bottom by one, then a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(b, channels, h, w) -> (b, channels, h / 2, w / 2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the resolution: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(b, channels, h, w) -> (b, channels, 2 h, 2 w)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks at one resolution, optionally each with an attention, then a change of size."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        num_blocks: int,
        attention: bool,
        config: VQConfig,
        resize: tuple[str, nn.Module] | None,
    ) -> None:
        super().__init__()
        widths = [inputs] + [outputs] * num_blocks
        self.res = nn.ModuleList(ResnetBlock(a, b, config) for a, b in itertools.pairwise(widths))
        self.attn = nn.ModuleList(
            AttnBlock(outputs, config.norm_groups) for _ in range(num_blocks * attention)
        )
        self.resize = resize[0] if resize else ""
        if resize:
            self.add_module(*resize)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(b, inputs, h, w) -> (b, outputs, h', w')."""
        for i, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return self.get_submodule(self.resize)(x) if self.resize else x


def middle(channels: int, config: VQConfig) -> nn.ModuleList:
    """Residual block, attention, residual block, at the lowest resolution."""
    return nn.ModuleList(
        [
            ResnetBlock(channels, channels, config),
            AttnBlock(channels, config.norm_groups),
            ResnetBlock(channels, channels, config),
        ]
    )


class Encoder(nn.Module):
    """Images (b, 3, H, W) -> (b, z_channels, H / f, W / f)."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths, last = config.widths, len(config.widths) - 1
        self.conv_in = conv3x3(3, config.base_channels)
        self.conv_blocks = nn.ModuleList(
            Level(
                widths[i - 1] if i else config.base_channels,
                widths[i],
                config.num_res_blocks,
                attention=i == last,
                config=config,
                resize=None if i == last else ("downsample", Downsample(widths[i])),
            )
            for i in range(len(widths))
        )
        self.mid = middle(widths[-1], config)
        self.norm_out = group_norm(widths[-1], config.norm_groups)
        self.conv_out = conv3x3(widths[-1], config.z_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        x = self.conv_in(x)
        for block in (*self.conv_blocks, *self.mid):
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """(b, z_channels, h, w) -> images (b, 3, h f, w f); level 0 is the lowest resolution."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = config.widths[::-1]
        last = len(widths) - 1
        self.conv_in = conv3x3(config.z_channels, widths[0])
        self.mid = middle(widths[0], config)
        self.conv_blocks = nn.ModuleList(
            Level(
                widths[max(i - 1, 0)],
                widths[i],
                config.num_res_blocks + 1,
                attention=i == 0,
                config=config,
                resize=None if i == last else ("upsample", Upsample(widths[i])),
            )
            for i in range(len(widths))
        )
        self.norm_out = group_norm(widths[-1], config.norm_groups)
        self.conv_out = conv3x3(widths[-1], 3)

    def middle(self, x: torch.Tensor) -> torch.Tensor:
        """(b, z_channels, h, w) -> the features of the lowest resolution (b, width, h, w)."""
        x = self.conv_in(x)
        for block in self.mid:
            x = block(x)
        return x

    def upsample(self, x: torch.Tensor) -> torch.Tensor:
        """The features of `middle` -> images (b, 3, h f, w f)."""
        for block in self.conv_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return self.upsample(self.middle(x))
