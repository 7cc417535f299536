"""Images with captions at scale: tar shards, the reference's jsonl folders, or a plain folder.

Samples are addressed by index (byte offset), so a shuffled order can be resumed at any position.
The output of img2dataset (`000001.jpg`, `.txt`, `.json` in uncompressed tars) is read without
conversion. The offsets inside a tar are computed once and cached beside it in `.pairs/`, if that
folder is writable.
"""

import json
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from core.data.arrays import DAMAGE
from core.data.image_list import IMAGE_SUFFIXES, fingerprint_of, image_files
from core.data.images import ImageError, load_image
from core.errors import InputError
from core.files import atomic_write, check_regular_file

PARTS = ("image", "txt", "json")
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


class CaptionError(ValueError):
    """A pair has no usable caption. The message is one short phrase, by which they are counted."""


class _Source(Protocol):
    """Storage of pairs."""

    keys: list[str]
    files: list[Path]

    def read(self, index: int, part: str) -> bytes | None:
        """The bytes of a pair's image, txt or json; None if it has none."""
        ...


class ImageTextPairs:
    """Images 0 .. len - 1 with captions. They are core.data.open.Images without classes."""

    classes: tuple[str, ...] = ()

    def __init__(self, config: ImageTextConfig, source: Path | None = None) -> None:
        source = source or config.source
        if source is None:
            raise InputError("pairs.source: give the folder of images with captions")
        self.config, self.source = config, _open(Path(source))
        if not self.source.keys:
            raise InputError(f"{source}: contains no images with captions")
        self.labels = np.full(len(self), -1, np.int64)
        self.fingerprint = fingerprint_of(self.source.keys)

    @property
    def files(self) -> list[Path]:
        """The image files, the tars, or the jsonl files."""
        return self.source.files

    def __len__(self) -> int:
        return len(self.source.keys)

    def name(self, index: int) -> str:
        """The key of a pair, which names it in lists of skipped images."""
        return self.source.keys[index]

    def load(self, index: int) -> Image.Image:
        """Read an image as RGB; raises ImageError if it is damaged or rejected by a filter."""
        config, name = self.config, self.name(index)
        if reason := self._low_score(index):
            raise ImageError(name, reason)
        data = self.source.read(index, "image")
        if data is None:
            raise ImageError(name, self._why_missing(index))
        image = load_image(data, name)
        if min(image.size) < config.min_side:
            raise ImageError(name, f"smaller than {config.min_side} pixels")
        if config.max_aspect is not None and max(image.size) > config.max_aspect * min(image.size):
            raise ImageError(name, f"aspect beyond {config.max_aspect}")
        return image

    def _why_missing(self, index: int) -> str:
        try:
            self._record(index)
        except CaptionError as error:  # a line that names no image
            return str(error)
        return "no such file"

    def captions(self, index: int) -> list[str]:
        """The caption in every variant of ImageTextConfig.captions; raises CaptionError."""
        if reason := self._low_score(index):
            raise CaptionError(reason)
        return [self._caption(index, where) for where in self.config.captions.values()]

    def _caption(self, index: int, where: str) -> str:
        if where == "txt":
            data = self.source.read(index, "txt")
            if data is None:
                raise CaptionError("no caption")
            try:
                value: Any = data.decode()
            except UnicodeDecodeError as error:
                raise CaptionError("caption is not UTF-8") from error
        else:
            value = self._record(index)
            for step in where.split("."):
                value = _inside(value, step)
        if not isinstance(value, str):
            raise CaptionError("no caption")
        if not value.strip():
            raise CaptionError("empty caption")
        return value.strip()

    def _low_score(self, index: int) -> str:
        field_name = self.config.score_field
        if field_name is None:
            return ""
        try:
            value = self._record(index).get(field_name)
        except CaptionError as error:
            return str(error)
        if not isinstance(value, int | float):
            return f"no {field_name}"
        return f"{field_name} below {self.config.min_score}" * (value < self.config.min_score)

    def _record(self, index: int) -> dict[str, Any]:
        data = self.source.read(index, "json")
        try:
            record = json.loads(data or b"{}")
        except (ValueError, RecursionError) as error:
            raise CaptionError("damaged json") from error
        return record if isinstance(record, dict) else {}


def _inside(value: Any, step: str) -> Any:  # noqa: ANN401 - any JSON value
    if isinstance(value, dict):
        return value.get(step)
    if isinstance(value, list) and step.isdigit() and int(step) < len(value):
        return value[int(step)]
    return None


def is_image_text(path: Path) -> bool:
    """Whether this is a tar, a folder of tars, or a folder of jsonl files.

    A folder with image files beside its jsonl files is an image folder with some metadata.
    """
    if not path.is_dir():
        return path.is_file() and path.suffix == ".tar"
    suffixes = {entry.suffix.lower() for entry in path.iterdir() if entry.is_file()}
    return ".tar" in suffixes or (".jsonl" in suffixes and not suffixes & IMAGE_SUFFIXES)


def _open(path: Path) -> _Source:
    if path.is_file() and path.suffix == ".tar":
        return _Tars([path])
    if not path.is_dir():
        raise InputError(f"{path}: no such folder or tar of images with captions")
    if tars := sorted(path.glob("*.tar")):
        return _Tars(tars)
    if lists := sorted(path.glob("*.jsonl")):
        return _Lists(path, lists)
    return _Folder(path)


class _Folder:
    """Image files with a text or JSON file of the same name beside each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.keys = sorted(str(path.relative_to(folder)) for path in image_files(folder))
        self.files = [folder / key for key in self.keys]

    def read(self, index: int, part: str) -> bytes | None:
        path = self.folder / self.keys[index]
        path = path if part == "image" else path.with_suffix(f".{part}")
        return path.read_bytes() if path.is_file() else None


class _Lists:
    """The reference's annotations: JSON lines with an `image_path` relative to the folder."""

    def __init__(self, folder: Path, lists: list[Path]) -> None:
        self.folder, self.lists, self.keys = folder, lists, []
        self.files = lists
        places = []
        for number, path in enumerate(lists):
            check_regular_file(path)
            with path.open("rb") as file:
                start = 0
                for i, line in enumerate(file):
                    if line.strip():
                        places.append((number, start, len(line)))
                        self.keys.append(f"{path.stem}/{i:09d}")
                    start += len(line)
        self.places = np.array(places, np.int64).reshape(-1, 3)

    def read(self, index: int, part: str) -> bytes | None:
        number, start, size = self.places[index].tolist()
        with self.lists[number].open("rb") as file:
            file.seek(start)
            line = file.read(size)
        if part != "image":
            return line if part == "json" else None
        try:
            path = self.folder / str(json.loads(line)["image_path"])
            return path.read_bytes() if path.is_file() else None
        except (ValueError, KeyError, TypeError, RecursionError, OSError):
            return None


class _Tars:
    """Uncompressed tars. Members with the same name up to the first dot form a pair."""

    def __init__(self, tars: list[Path]) -> None:
        self.tars, self.keys = tars, []
        self.files = tars
        places = []
        for number, path in enumerate(tars):
            keys, found = _tar_index(path)
            self.keys += [f"{path.name}/{key}" for key in keys]
            places.append(np.insert(found, 0, number, axis=1))
        # Per pair: the tar, then offset and size of image, txt and json (size -1: none).
        self.places = np.concatenate(places)

    def read(self, index: int, part: str) -> bytes | None:
        place = self.places[index]
        offset, size = place[1 + 2 * PARTS.index(part) :][:2].tolist()
        if size < 0:
            return None
        with self.tars[place[0]].open("rb") as file:
            file.seek(offset)
            return file.read(size)


def _tar_index(path: Path) -> tuple[list[str], np.ndarray]:
    """The keys of a tar and the offsets and sizes of their parts, (n, 6) int64; cached on disk."""
    check_regular_file(path)
    stat = path.stat()
    version = np.array([stat.st_size, stat.st_mtime_ns])
    cached = path.parent / ".pairs" / f"{path.name}.npz"
    try:
        with np.load(cached, allow_pickle=False) as file:
            if np.array_equal(file["version"], version):
                return file["keys"].tolist(), file["places"]
    except DAMAGE:
        pass  # missing or damaged: compute it again
    found: dict[str, np.ndarray] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name, _, suffix = member.name.partition(".")
                suffix = suffix.lower()
                part = "image" if f".{suffix}" in IMAGE_SUFFIXES else suffix
                if member.isfile() and part in PARTS:
                    if member.size < 0 or member.offset_data + member.size > stat.st_size:
                        raise tarfile.TarError(f"{member.name[:60]} goes beyond the end")
                    place = found.setdefault(name, np.array([0, -1] * len(PARTS), np.int64))
                    place[2 * PARTS.index(part) :][:2] = member.offset_data, member.size
    except (tarfile.TarError, ValueError, OverflowError, MemoryError, EOFError) as error:
        raise InputError(f"{path}: not an uncompressed tar, or damaged ({error})") from error
    keys, places = list(found), np.array(list(found.values()), np.int64).reshape(-1, 6)
    try:
        cached.parent.mkdir(exist_ok=True)
        with atomic_write(cached) as file:
            np.savez(file, version=version, keys=np.array(keys, str), places=places)
    except OSError:
        pass  # a read-only folder: computed again next time
    return keys, places
