"""Settings of images and captions, and the checks that their configurations share."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from PIL import Image

from core.errors import InputError

MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 89_478_485  # Pillow only warns there; we refuse


def check_image_size(height: int, width: int, name: str = "image_size") -> None:
    """Raise InputError, a ValueError, for a size below 1 or of more than MAX_PIXELS pixels."""
    if min(height, width) < 1 or height * width > MAX_PIXELS:
        raise InputError(
            f"{name} [{height}, {width}]: each side must be >= 1, and at most {MAX_PIXELS:,} pixels"
        )


MAX_NUM_WORKERS = 1024  # per process; more is a typing mistake


def check_num_workers(num_workers: int) -> None:
    """Raise InputError, a ValueError, for a negative or an absurd number of loader processes."""
    if not 0 <= num_workers <= MAX_NUM_WORKERS:
        raise InputError(f"num_workers is {num_workers}, must be in 0 .. {MAX_NUM_WORKERS}")


FIRST_SENTENCE = "first_sentence"  # the name of a variant made from the first variant


@dataclass(frozen=True)
class ImageTextConfig:
    """Images with captions, and filters.

    Args:
        source: A .tar or a folder of them; a folder of .jsonl files (lines with image_path and
            text); or a folder of images with a .txt or .json of the same name beside each.
        captions: Where to find each variant of the caption: txt for the text file, otherwise a
            field of the JSON; .0 is the first entry of a list. The reference's files need
            {long: text.1, short: text.0}.
        first_sentence: Add a variant of this name: the first sentence of the first variant.
        min_side: Skip images with a side shorter than this, in pixels.
        max_aspect: Skip images whose longer side exceeds this multiple of the shorter side; null
            to keep all.
        score_field: A numeric field of the JSON to filter by, e.g. aesthetic; null for no filter.
        min_score: Skip pairs whose score_field is lower.
    """

    source: Path | None = None
    captions: dict[str, str] = field(default_factory=lambda: {"long": "txt"})
    first_sentence: bool = False
    min_side: int = 16
    max_aspect: float | None = None
    score_field: str | None = None
    min_score: float = 0.0

    def __post_init__(self) -> None:
        if not self.captions or FIRST_SENTENCE in self.captions:
            raise ValueError(f"pairs.captions: name one or more, none of them {FIRST_SENTENCE}")
        if self.min_side < 1 or (self.max_aspect is not None and self.max_aspect < 1):
            raise ValueError("pairs: min_side must be >= 1, max_aspect null or >= 1")

    @property
    def variants(self) -> tuple[str, ...]:
        """The names of the caption variants, in order."""
        return (*self.captions, *((FIRST_SENTENCE,) if self.first_sentence else ()))


Cleaning = Literal["clean", "reference", "none"]
