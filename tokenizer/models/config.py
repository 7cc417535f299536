"""The tokenizer's configuration."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from core.errors import InputError
from tokenizer.quantizers.config import BinarySphericalOptions, FiniteScalarOptions, VectorOptions


@dataclass(frozen=True)
class VQConfig:
    """Shape of the tokenizer, and losses of its quantizer.

    Args:
        base_channels: Width at full resolution.
        channel_multipliers: Width of each level, in multiples of base_channels; each level but the
            last halves the resolution.
        num_res_blocks: Residual blocks per encoder level; the decoder has one more.
        norm_groups: Groups of every group norm; base_channels is a multiple of it. With as many
            groups as channels, the last norm takes the mean of each channel away, and with it the
            brightness of the image: a narrow model needs fewer groups than the published 32.
        z_channels: Width of the encoder's output.
        vocab_size: Entries of the codebook.
        codebook_dim: Width of an entry.
        quantizer: How vectors become codes; each is explained in its file in tokenizer/quantizers.
            vq (LlamaGen), ibq (SEED-Voken), fsq (FSQ, iFSQ), lfq (MAGVIT-v2), bsq, simvq.
        l2_normalize: Compare and decode unit vectors; only for vq, false for the others.
        dropout: Dropout in the residual blocks.
        commitment_weight: Weight of the loss that pulls encoder outputs towards codebook entries;
            for ibq, as published, of the loss that pulls entries towards encoder outputs.
        entropy_weight: Weight of the entropy loss, which makes all codes be used; 0 for none.
        image_size: Height and width of the images that it was trained on, which tokenizer.train
            writes; null if unknown. It is the default size of tokenizer.encode and reconstruct.
        vq: Options of the quantizer vq.
        fsq: Options of the quantizer fsq.
        bsq: Options of the quantizer bsq.
    """

    base_channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    norm_groups: int = 32
    z_channels: int = 256
    vocab_size: int = 16384
    codebook_dim: int = 8
    l2_normalize: bool = True
    dropout: float = 0.0
    commitment_weight: float = 0.25
    entropy_weight: float = 0.0
    quantizer: Literal[
        "vq",
        "ibq",
        "fsq",
        "lfq",
        "bsq",
        "simvq",
        "latent",
    ] = "vq"
    image_size: tuple[int, int] | None = None
    vq: VectorOptions = field(default_factory=VectorOptions)
    fsq: FiniteScalarOptions = field(default_factory=FiniteScalarOptions)
    bsq: BinarySphericalOptions = field(default_factory=BinarySphericalOptions)

    def __post_init__(self) -> None:
        sizes = (*self.channel_multipliers, self.num_res_blocks, self.z_channels, self.codebook_dim)
        if not self.channel_multipliers or min(sizes) < 1 or self.vocab_size < 2:
            raise ValueError("model: all sizes must be >= 1, vocab_size >= 2")
        if len(self.channel_multipliers) > MAX_LEVELS or self.num_res_blocks > MAX_BLOCKS:
            raise ValueError(
                f"model: at most {MAX_LEVELS} channel_multipliers and {MAX_BLOCKS} num_res_blocks"
            )
        if min(self.base_channels, self.norm_groups) < 1 or self.base_channels % self.norm_groups:
            raise ValueError(
                f"model.base_channels {self.base_channels} must be a multiple of "
                f"model.norm_groups {self.norm_groups}"
            )
        if self.quantizer != "vq" and self.l2_normalize:
            raise ValueError(
                f"model.l2_normalize is for quantizer vq: set it to false for {self.quantizer}"
            )
        for part in dataclasses.fields(self):
            options = getattr(self, part.name)
            own = part.name == self.quantizer
            if dataclasses.is_dataclass(options) and not own and options != type(options)():
                raise ValueError(
                    f"model.{part.name}: these options are for quantizer {part.name}, but "
                    f"model.quantizer is {self.quantizer}"
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


MAX_LEVELS, MAX_BLOCKS = 16, 100  # more would take minutes to build even without memory
USUAL_SIZE = (256, 256)  # of the published tokenizers, whose files do not tell it


def choose_image_size(
    config: VQConfig, asked: tuple[int, int] | None
) -> tuple[tuple[int, int], str]:
    """The size (height, width) to use a tokenizer at, and what a user should know of it, or "".

    asked: The size that the user wants; None for the one that the tokenizer was trained at.
    Raises InputError for a size that the tokenizer's downsampling does not divide.
    """
    trained = config.image_size
    size = asked or trained or USUAL_SIZE
    if any(side < 1 or side % config.downsample for side in size):
        raise InputError(f"image_size {size} must be divisible by {config.downsample}")
    if trained is None:
        unknown = "the tokenizer does not tell its training size (--image_size height width)"
        return size, "" if asked else f"images of {size[0]} x {size[1]} pixels; {unknown}"
    if size == trained:
        return size, ""
    return size, (
        f"images of {size[0]} x {size[1]} pixels; the tokenizer was trained at "
        f"{trained[0]} x {trained[1]}"
    )


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Which discriminator.

    Args:
        kind: patchgan (Isola et al. 2017; with 3 layers it sees 70 x 70 patches), stylegan (the
            residual network of StyleGAN2, for square images whose side is a power of two) or
            stylegan_reference (LlamaGen's variant of it, with its shapes and keys).
        base_channels: Width at full resolution, for patchgan.
        num_layers: Strided layers, for patchgan.
        max_channels: Width at the lowest resolution, for stylegan and stylegan_reference.
    """

    kind: Literal["patchgan", "stylegan", "stylegan_reference"] = "patchgan"
    base_channels: int = 64
    num_layers: int = 3
    max_channels: int = 512
