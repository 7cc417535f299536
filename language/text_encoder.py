"""Text to features: clean the captions, then encode them with a T5."""

from pathlib import Path

import torch

from core.data.config import Cleaning
from core.data.image_text import ImageTextPairs
from language.captions import all_captions, clean_captions
from language.t5 import T5, load_t5, pad


class TextEncoder:
    """A frozen T5 and the rules by which captions are cleaned before they reach it.

    dim: width of the features. identity: a hash that tells this encoder from others, independent
    of the dtype that it is loaded in. max_tokens: longer captions are cut.
    """

    def __init__(self, t5: T5, clean: Cleaning = "clean") -> None:
        self.t5 = t5
        self.clean: Cleaning = clean
        self.dim, self.identity, self.max_tokens = t5.dim, t5.identity, t5.max_tokens
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
        self.t5.cut = 0
        features = self.t5.encode(captions)
        self.cut = self.t5.cut
        return features


def load_text_encoder(
    source: str | Path,
    device: torch.device,
    dtype: torch.dtype,
    max_tokens: int = 120,
    clean: Cleaning = "clean",
) -> TextEncoder:
    """Load a T5 from a folder or the Hub; raises InputError if it cannot be loaded."""
    return TextEncoder(load_t5(source, device, dtype, max_tokens), clean)
