"""Lists of image files: a folder of class folders, a flat folder, or a list file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from core.config import InputError
from core.data.images import load_image

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm"}


@dataclass(frozen=True)
class ImageList:
    """Pictures on disk and their classes: labels[i] indexes `classes`, or is -1 without any."""

    paths: list[Path]
    labels: np.ndarray  # (n,) int64
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """What picture `index` is called in lists of skipped ones."""
        return str(self.paths[index])

    def load(self, index: int) -> Image.Image:
        """Read picture `index`; raises ImageError."""
        return load_image(self.paths[index])


class Images(Protocol):
    """Numbered pictures: an ImageList, or the pictures of core.pairs."""

    def __len__(self) -> int:
        """How many."""
        ...

    def name(self, index: int) -> str:
        """What picture `index` is called in lists of skipped ones."""
        ...

    def load(self, index: int) -> Image.Image:
        """Read picture `index`; raises ImageError."""
        ...


def find_images(source: Path) -> ImageList:
    """The pictures of a folder of class folders (sorted names), a flat folder, or a list file.

    A list file has one picture a line: a path (relative to the list) and, after a tab, optionally
    its class name or number. Raises InputError where nothing is found or a class has no picture.
    """
    source = Path(source)
    if source.is_file():
        return _from_list(source)
    if not source.is_dir():
        raise InputError(f"{source}: no such image folder or list file")
    folders = sorted(p for p in source.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not folders:
        paths = _images_in(source)
        if not paths:
            raise InputError(f"{source}: holds no picture ({', '.join(sorted(IMAGE_SUFFIXES))})")
        return ImageList(paths, np.full(len(paths), -1, np.int64), ())
    paths, labels = [], []
    for label, folder in enumerate(folders):
        found = _images_in(folder)
        if not found:
            raise InputError(f"{folder}: class folder without a picture; fill it or remove it")
        paths += found
        labels += [label] * len(found)
    return ImageList(paths, np.array(labels, np.int64), tuple(p.name for p in folders))


def _images_in(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)


def _from_list(source: Path) -> ImageList:
    try:
        lines = [line for line in source.read_text().splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise InputError(f"{source}: not a text file with one picture a line") from error
    if not lines:
        raise InputError(f"{source}: the list is empty")
    rows = [line.split("\t") for line in lines]
    if len({len(row) for row in rows}) != 1 or len(rows[0]) > 2:
        raise InputError(
            f"{source}: every line needs a path and, on all or none, a tab and a class"
        )
    paths = [source.parent / row[0] for row in rows]
    if len(rows[0]) == 1:
        return ImageList(paths, np.full(len(paths), -1, np.int64), ())
    names = [row[1] for row in rows]
    if all(name.isdigit() for name in names):
        classes = tuple(str(i) for i in range(max(int(name) for name in names) + 1))
    else:
        classes = tuple(sorted(set(names)))
    number = {name: i for i, name in enumerate(classes)}
    return ImageList(paths, np.array([number[name] for name in names], np.int64), classes)
