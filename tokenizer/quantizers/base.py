"""The interface of a quantizer, which is all that the VQ model knows about it."""

import abc
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn


class Quantized(NamedTuple):
    """The result of quantising a batch.

    codes: (b, h, w) int64, in [0, vocab_size).
    vectors: (b, dim, h, w), with gradients for the encoder (straight-through).
    losses: Weighted losses by name, scalars.
    """

    codes: torch.Tensor
    vectors: torch.Tensor
    losses: dict[str, torch.Tensor]


class QuantizerSettings(NamedTuple):
    """What a configuration says about its quantizer: fields of VQConfig.

    options: The group of options that has the quantizer's name; None if there is none.
    """

    vocab_size: int
    dim: int
    l2_normalize: bool
    commitment_weight: float
    entropy_weight: float
    options: Any


class Quantizer(nn.Module, abc.ABC):
    """Maps vectors to integer codes and back.

    vocab_size: The number of codes. dim: The number of channels of a vector.
    A subclass defines `kind`, its name in VQConfig.quantizer, `forward` (z -> Quantized) and
    `lookup` (codes -> vectors); and `build`, if its arguments are others than those here.
    """

    kind: ClassVar[str]

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.vocab_size, self.dim = vocab_size, dim

    @classmethod
    def build(cls, settings: QuantizerSettings) -> "Quantizer":
        """The quantizer of a configuration; raises InputError for sizes that do not fit."""
        s = settings
        return cls(s.vocab_size, s.dim, s.commitment_weight, s.entropy_weight)  # pyright: ignore[reportCallIssue]

    def plain_codebook(self) -> torch.Tensor | None:
        """Entries (vocab_size, dim) float32 with which a plain vq gives the same codes and vectors.

        None for a quantizer that is exported as it is.
        """
        return None

    @abc.abstractmethod
    def forward(self, z: torch.Tensor) -> Quantized:
        """Quantise z (b, dim, h, w)."""

    @abc.abstractmethod
    def lookup(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes (b, h, w) int64 -> vectors (b, dim, h, w), of any floating dtype."""
