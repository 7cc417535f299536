"""Text to features: clean the captions, then encode them."""

from pathlib import Path
from typing import Any, Protocol

import torch

from core.data.config import Cleaning
from core.data.image_text import ImageTextPairs
from language.captions import all_captions, clean_captions
from language.t5 import load_t5, pad
from language.wordllama import NAME as WORDLLAMA
from language.wordllama import load_wordllama


class TokenEncoder(Protocol):
    """Captions to features: a T5, or WordLlama.

    dim: width of the features. identity: tells this encoder from others, independent of the dtype
    that it is loaded in. max_tokens: longer captions are cut. cut: how many have been so far.
    """

    model: Any
    dim: int
    identity: str
    max_tokens: int
    cut: int

    def encode(self, captions: list[str]) -> list[torch.Tensor]:
        """Captions -> features (valid tokens, dim) of each, at least one token."""
        ...


class TextEncoder:
    """A frozen encoder and the rules by which captions are cleaned before they reach it.

    dim, identity, max_tokens: those of the encoder.
    """

    def __init__(self, encoder: TokenEncoder, clean: Cleaning = "clean") -> None:
        self.encoder = encoder
        self.clean: Cleaning = clean
        self.dim, self.identity = encoder.dim, encoder.identity
        self.max_tokens = encoder.max_tokens
        self.cut = 0

    def encode(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Clean and encode texts -> features (n, T, dim), valid tokens first, lengths (n,) int64.

        A text that cleaning leaves empty is encoded as the empty string.
        """
        return self.encode_cleaned(clean_captions(texts, self.clean))

    def captions(self, pairs: ImageTextPairs, index: int) -> list[str]:
        """Every variant of an image's caption, cleaned; raises CaptionError for an empty one."""
        return all_captions(pairs, index, self.clean)

    def encode_cleaned(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Captions that are already cleaned -> features (n, T, dim), lengths (n,) int64."""
        return pad(self.encode_each(captions))

    def encode_each(self, captions: list[str]) -> list[torch.Tensor]:
        """Captions that are already cleaned -> features (valid tokens, dim) of each.

        `cut` is then the number of these captions that were longer than max_tokens.
        """
        self.encoder.cut = 0
        features = self.encoder.encode(captions)
        self.cut = self.encoder.cut
        return features


def load_text_encoder(
    source: str | Path,
    device: torch.device,
    dtype: torch.dtype,
    max_tokens: int = 120,
    clean: Cleaning = "clean",
) -> TextEncoder:
    """Load a text encoder; raises InputError if it cannot be loaded.

    source: A T5's folder or Hub id, or "wordllama". A folder of this name is "./wordllama".
    """
    if source == WORDLLAMA:
        return TextEncoder(load_wordllama(device, dtype, max_tokens), clean)
    return TextEncoder(load_t5(source, device, dtype, max_tokens), clean)
