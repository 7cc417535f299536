"""The VQGAN tokenizer: images to a grid of codes and back.

Module names follow the released files, whose keys they must match.
"""

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from core.config import InputError
from tokenizer.quantizer import VectorQuantizer

PRESETS = {"VQ-16": (1, 1, 2, 2, 4), "VQ-8": (1, 2, 2, 4)}  # channel_multipliers


@dataclass(frozen=True)
class VQConfig:
    """The tokenizer's shape and its quantiser's losses.

    Args:
        base_channels: Width at full resolution.
        channel_multipliers: Width of each level over base_channels; each level but the last halves
            the resolution.
        num_res_blocks: Residual blocks per encoder level; the decoder has one more.
        z_channels: Width of the encoder's output.
        vocab_size: Entries of the codebook.
        codebook_dim: Width of an entry.
        l2_normalize: Compare and decode unit vectors.
        dropout: Dropout in the residual blocks.
        commitment_weight: Weight of the loss that pulls the encoder to its codes.
        entropy_weight: Weight of the loss that spreads the codes; not computed at 0.
    """

    base_channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    z_channels: int = 256
    vocab_size: int = 16384
    codebook_dim: int = 8
    l2_normalize: bool = True
    dropout: float = 0.0
    commitment_weight: float = 0.25
    entropy_weight: float = 0.0

    def __post_init__(self) -> None:
        sizes = (*self.channel_multipliers, self.num_res_blocks, self.z_channels, self.codebook_dim)
        if not self.channel_multipliers or min(sizes) < 1 or self.vocab_size < 2:
            raise ValueError("model: all sizes must be >= 1, vocab_size >= 2")
        if self.base_channels < 1 or self.base_channels % NORM_GROUPS:
            raise ValueError(
                f"model.base_channels {self.base_channels} must be a multiple of {NORM_GROUPS}"
            )
        if not 0 <= self.dropout < 1 or min(self.commitment_weight, self.entropy_weight) < 0:
            raise ValueError("model: dropout must be in [0, 1), the weights >= 0")

    @property
    def downsample(self) -> int:
        """Pixels per code, along each side."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def widths(self) -> list[int]:
        """Channels of each level, from full resolution down."""
        return [self.base_channels * multiplier for multiplier in self.channel_multipliers]


NORM_GROUPS = 32


def group_norm(channels: int) -> nn.GroupNorm:
    """The only norm of the model."""
    return nn.GroupNorm(NORM_GROUPS, channels, eps=1e-6)


def conv3x3(inputs: int, outputs: int) -> nn.Conv2d:
    """A convolution that keeps the size."""
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class ResnetBlock(nn.Module):
    """Norm, swish, convolution, twice, around a shortcut."""

    def __init__(self, inputs: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.conv1 = group_norm(inputs), conv3x3(inputs, outputs)
        self.norm2, self.conv2 = group_norm(outputs), conv3x3(outputs, outputs)
        self.dropout = nn.Dropout(dropout)
        self.nin_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(b, inputs, h, w) -> (b, outputs, h, w)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """One-head self-attention over all cells, added to its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
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
    """The blocks at one resolution, an attention after each where asked, then a change of size."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        num_blocks: int,
        attention: bool,
        dropout: float,
        resize: tuple[str, nn.Module] | None,
    ) -> None:
        super().__init__()
        widths = [inputs] + [outputs] * num_blocks
        self.res = nn.ModuleList(ResnetBlock(a, b, dropout) for a, b in itertools.pairwise(widths))
        self.attn = nn.ModuleList(AttnBlock(outputs) for _ in range(num_blocks * attention))
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


def middle(channels: int, dropout: float) -> nn.ModuleList:
    """Residual block, attention, residual block, at the lowest resolution."""
    return nn.ModuleList(
        [
            ResnetBlock(channels, channels, dropout),
            AttnBlock(channels),
            ResnetBlock(channels, channels, dropout),
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
                dropout=config.dropout,
                resize=None if i == last else ("downsample", Downsample(widths[i])),
            )
            for i in range(len(widths))
        )
        self.mid = middle(widths[-1], config.dropout)
        self.norm_out = group_norm(widths[-1])
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
        self.mid = middle(widths[0], config.dropout)
        self.conv_blocks = nn.ModuleList(
            Level(
                widths[max(i - 1, 0)],
                widths[i],
                config.num_res_blocks + 1,
                attention=i == 0,
                dropout=config.dropout,
                resize=None if i == last else ("upsample", Upsample(widths[i])),
            )
            for i in range(len(widths))
        )
        self.norm_out = group_norm(widths[-1])
        self.conv_out = conv3x3(widths[-1], 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        x = self.conv_in(x)
        for block in (*self.mid, *self.conv_blocks):
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Reconstruction(NamedTuple):
    """Images (b, 3, H, W), codes (b, h, w) int64, and the quantiser's losses by name."""

    images: torch.Tensor
    codes: torch.Tensor
    losses: dict[str, torch.Tensor]


class VQModel(nn.Module):
    """Encoder, quantiser, decoder."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quantize = VectorQuantizer(
            config.vocab_size,
            config.codebook_dim,
            config.l2_normalize,
            config.commitment_weight,
            config.entropy_weight,
        )
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.z_channels, 1)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "VQModel":  # noqa: ANN401 - any field
        """A new model with random weights: from_preset("VQ-16", vocab_size=4096)."""
        if name not in PRESETS:
            raise InputError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
        return cls(VQConfig(**{"channel_multipliers": PRESETS[name], **overrides}))

    @classmethod
    def from_pretrained(cls, path_or_hub_id: Any, **options: Any) -> "VQModel":  # noqa: ANN401
        """Load a released file, a folder of ours or a Hub repository."""
        from tokenizer.pretrained import load_tokenizer

        return load_tokenizer(path_or_hub_id, **options).vq

    def for_inference(
        self, device: torch.device, dtype: torch.dtype, compile: bool = False
    ) -> "VQModel":
        """This model ready to encode and decode: channels last, which convolutions want.

        compile: fuse the norms with what follows, on CUDA; on CPUs eager is faster.
        """
        self.eval().requires_grad_(False)
        self.to(device, dtype).to(memory_format=torch.channels_last)
        if compile:
            self.encoder.compile(dynamic=False)
            self.decoder.compile(dynamic=False)
        return self

    def forward(self, images: torch.Tensor) -> Reconstruction:
        """Images (b, 3, H, W) in [-1, 1] -> their reconstruction, codes and losses."""
        quantized = self.quantize(self._project(images))
        decoded = self.decoder(self.post_quant_conv(quantized.vectors))
        return Reconstruction(decoded, quantized.codes, quantized.losses)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images (b, 3, H, W) in [-1, 1], of any dtype -> codes (b, H / f, W / f) int64."""
        return self.quantize(self._project(images.to(self.quant_conv.weight.dtype))).codes

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes (b, h, w) int64 -> images (b, 3, h f, w f), not clamped."""
        return self.decoder(self.post_quant_conv(self.quantize.lookup(codes)))

    def _project(self, images: torch.Tensor) -> torch.Tensor:
        f = self.config.downsample
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % f or images.shape[3] % f:
            raise InputError(
                f"images {tuple(images.shape)}: expected (batch, 3, height, width), both sides "
                f"divisible by {f}"
            )
        return self.quant_conv(self.encoder(images))
