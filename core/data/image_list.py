"""Lists of image files: a folder of class folders, a flat folder, or a list file."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from core.data.images import load_image
from core.errors import InputError
from core.files import check_regular_file

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm"}


MAX_CLASSES = 1_000_000  # of a list file with numbers: every number up to the largest is a class


@dataclass(frozen=True)
class ImageList:
    """Image files and their classes. labels[i] is an index into `classes`, or -1 without classes.

    keys: The paths relative to the source: the same wherever the images are mounted.
    """

    paths: list[Path]
    labels: np.ndarray  # (n,) int64
    classes: tuple[str, ...]
    keys: list[str]

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def fingerprint(self) -> str:
        """A hash of the images' names and their order."""
        return fingerprint_of(self.keys)

    @property
    def files(self) -> list[Path]:
        """The image files."""
        return self.paths

    def name(self, index: int) -> str:
        """The name of image `index` in lists of skipped images: its path."""
        return str(self.paths[index])

    def load(self, index: int) -> Image.Image:
        """Read image `index` as RGB; raises ImageError."""
        return load_image(self.paths[index])


def _class_number(name: str, source: Path) -> int:
    if len(name) > len(str(MAX_CLASSES)) or int(name) >= MAX_CLASSES:
        raise InputError(f"{source}: class {name[:20]}; numbers must be below {MAX_CLASSES:,}")
    return int(name)


def fingerprint_of(keys: Iterable[str]) -> str:
    """A hash of images' names and their order, 16 hex digits."""
    return hashlib.sha256("\n".join(keys).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def find_images(source: Path) -> ImageList:
    """The images of a folder of class folders (sorted by name), a flat folder, or a list file.

    A list file has one image per line: a path relative to the list and optionally, after a tab, its
    class name or number. Raises InputError if there are no images or if a class has none.
    """
    source = Path(source)
    if source.is_file():
        return _from_list(source)
    if not source.is_dir():
        raise InputError(f"{source}: no such image folder or list file")
    folders = sorted(p for p in source.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not folders:
        paths = image_files(source)
        if not paths:
            raise InputError(f"{source}: contains no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
        return _image_list(source, paths, np.full(len(paths), -1), ())
    paths, labels = [], []
    for label, folder in enumerate(folders):
        found = image_files(folder)
        if not found:
            raise InputError(f"{folder}: class folder without an image; fill it or remove it")
        paths += found
        labels += [label] * len(found)
    return _image_list(source, paths, np.array(labels), tuple(p.name for p in folders))


def image_files(folder: Path) -> list[Path]:
    """The image files below a folder, sorted."""
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)


def _image_list(
    root: Path, paths: list[Path], labels: np.ndarray, classes: tuple[str, ...]
) -> ImageList:
    keys = [str(p.relative_to(root)) if p.is_relative_to(root) else str(p) for p in paths]
    return ImageList(paths, labels.astype(np.int64), classes, keys)


def _from_list(source: Path) -> ImageList:
    check_regular_file(source)
    try:
        lines = [
            line
            for line in source.read_text("utf-8", "surrogateescape").splitlines()
            if line.strip()
        ]
    except MemoryError as error:
        raise InputError(f"{source}: not a text file with one image per line") from error
    if any("\0" in line for line in lines):
        raise InputError(f"{source}: not a text file with one image per line")
    if not lines:
        raise InputError(f"{source}: the list is empty")
    rows = [line.split("\t") for line in lines]
    if len({len(row) for row in rows}) != 1 or len(rows[0]) > 2:
        raise InputError(
            f"{source}: every line needs a path and, on all or none, a tab and a class"
        )
    root = source.parent
    paths = [root / row[0] for row in rows]
    if len(rows[0]) == 1:
        return _image_list(root, paths, np.full(len(paths), -1), ())
    names = [row[1] for row in rows]
    if all(name.isascii() and name.isdigit() for name in names):
        number = {name: _class_number(name, source) for name in set(names)}
        classes = tuple(str(i) for i in range(max(number.values()) + 1))
    else:
        classes = tuple(sorted(set(names)))
        number = {name: i for i, name in enumerate(classes)}
    return _image_list(root, paths, np.array([number[name] for name in names]), classes)
