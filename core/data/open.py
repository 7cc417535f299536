"""Opens images, whatever they are stored in."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from core.data.config import ImageTextConfig
from core.data.image_list import find_images
from core.data.image_text import ImageTextPairs, is_image_text
from core.errors import InputError

NO_OPTIONS = ImageTextConfig()


class Images(Protocol):
    """Images 0 .. len - 1, addressed by number: an ImageList or ImageTextPairs."""

    @property
    def labels(self) -> np.ndarray:
        """(n,) int64: indices into `classes`, or -1 for images without a class."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes; empty if there are none."""
        ...

    @property
    def fingerprint(self) -> str:
        """A hash of the images' names in their order, equal for codes and features of the same."""
        ...

    @property
    def files(self) -> Sequence[Path]:
        """The files that hold the images: one for each, or tars or jsonl files."""
        ...

    def __len__(self) -> int:
        """The number of images."""
        ...

    def name(self, index: int) -> str:
        """The name of image `index` in lists of skipped images."""
        ...

    def load(self, index: int) -> Image.Image:
        """Read image `index` as RGB; raises ImageError."""
        ...


def open_images(source: Path | None, options: ImageTextConfig = NO_OPTIONS) -> Images:
    """Open the images of `source`, or, if it is None, of `options.source`.

    source: A folder of class folders, a flat folder, a list file, a .tar or a folder of them, or a
        folder of .jsonl files.
    options: Filters for tars and jsonl folders. With `options.source`, any folder is read as
        images with captions, without classes.
    Raises InputError if there are no images, or if filters are given for a source without them.
    """
    if source is None:
        return ImageTextPairs(options)
    if options.source is not None:
        raise InputError(f"{source} and {options.source}: give data or pairs.source, not both")
    if is_image_text(Path(source)):
        return ImageTextPairs(options, source)
    if options != NO_OPTIONS:
        raise InputError(
            f"{source}: options of pairs apply to tars and jsonl folders; for a folder of images "
            "with captions give it as pairs.source"
        )
    return find_images(source)
