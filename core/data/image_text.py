"""Pictures with captions at scale: tar shards, the reference's jsonl folders, or a plain folder.

Pair i is found by seeking, so any order over the pairs resumes anywhere. What img2dataset writes
(`000001.jpg`, `.txt`, `.json` in uncompressed tars) is read as it is. The places inside a tar are
listed once and kept beside it in `.pairs/`, where the folder can be written to.
"""

import hashlib
import json
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from core.config import InputError
from core.data.image_list import IMAGE_SUFFIXES
from core.data.images import ImageError, load_image
from core.files import atomic_write

PARTS = ("picture", "txt", "json")
FIRST_SENTENCE = "first_sentence"  # a variant made from the first one


@dataclass(frozen=True)
class ImageTextConfig:
    """Pictures with captions, and which of them to take.

    Args:
        source: A .tar or a folder of them; a folder of .jsonl files (lines with image_path and
            text); or a folder of pictures with a .txt or .json of the same name beside each.
        captions: Where each variant of the caption is: txt for the text file, else a field of the
            json, .0 for the first entry of a list (the reference's: {long: text.1, short: text.0}).
        first_sentence: Also a variant of that name: the first sentence of the first variant.
        min_side: Pictures with a shorter side are left out, in pixels.
        max_aspect: Pictures whose sides differ by more than this factor are left out; 0 for all.
        score_field: A number in the json to filter by, e.g. aesthetic; empty for none.
        min_score: Pairs with less of it are left out.
    """

    source: Path | None = None
    captions: dict[str, str] = field(default_factory=lambda: {"long": "txt"})
    first_sentence: bool = False
    min_side: int = 16
    max_aspect: float = 0.0
    score_field: str = ""
    min_score: float = 0.0

    def __post_init__(self) -> None:
        if not self.captions or FIRST_SENTENCE in self.captions:
            raise ValueError(f"pairs.captions: name one or more, none of them {FIRST_SENTENCE}")
        if self.min_side < 1 or (self.max_aspect and self.max_aspect < 1):
            raise ValueError("pairs: min_side must be >= 1, max_aspect 0 or >= 1")

    @property
    def variants(self) -> tuple[str, ...]:
        """The captions' variants, in their order."""
        return (*self.captions, *((FIRST_SENTENCE,) if self.first_sentence else ()))


class CaptionError(ValueError):
    """A pair without a usable caption; the message is one short phrase to count by."""


class _Source(Protocol):
    """Where the bytes of the pairs are."""

    keys: list[str]

    def read(self, index: int, part: str) -> bytes | None:
        """The picture, txt or json of a pair; None where there is none."""
        ...


class ImageTextPairs:
    """Pairs 0 .. len - 1. As pictures they have no classes: see core.datasets.Images.

    fingerprint: what codes and features of the same pairs share.
    """

    classes: tuple[str, ...] = ()

    def __init__(self, config: ImageTextConfig) -> None:
        if config.source is None:
            raise InputError("pairs.source: give the folder of pictures with captions")
        self.config, self.source = config, _open(Path(config.source))
        if not self.source.keys:
            raise InputError(f"{config.source}: holds no pictures with captions")
        self.labels = np.full(len(self), -1, np.int64)
        self.fingerprint = hashlib.sha256("\n".join(self.source.keys).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.source.keys)

    def name(self, index: int) -> str:
        """The pair's key, as in lists of skipped ones."""
        return self.source.keys[index]

    def load(self, index: int) -> Image.Image:
        """The picture; raises ImageError where it is damaged or left out by the configuration."""
        config, name = self.config, self.name(index)
        if reason := self._low_score(index):
            raise ImageError(name, reason)
        data = self.source.read(index, "picture")
        if data is None:
            raise ImageError(name, "no such file")
        image = load_image(data, name)
        if min(image.size) < config.min_side:
            raise ImageError(name, f"smaller than {config.min_side} pixels")
        if config.max_aspect and max(image.size) > config.max_aspect * min(image.size):
            raise ImageError(name, f"aspect beyond {config.max_aspect}")
        return image

    def captions(self, index: int) -> list[str]:
        """The caption in every variant of PairsConfig.captions; raises CaptionError."""
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
        if not field_name:
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
        except ValueError as error:
            raise CaptionError("damaged json") from error
        return record if isinstance(record, dict) else {}


def _inside(value: Any, step: str) -> Any:  # noqa: ANN401 - any JSON value
    if isinstance(value, dict):
        return value.get(step)
    if isinstance(value, list) and step.isdigit() and int(step) < len(value):
        return value[int(step)]
    return None


def _open(path: Path) -> _Source:
    if path.is_file() and path.suffix == ".tar":
        return _Tars([path])
    if not path.is_dir():
        raise InputError(f"{path}: no such folder or tar of pictures with captions")
    if tars := sorted(path.glob("*.tar")):
        return _Tars(tars)
    if lists := sorted(path.glob("*.jsonl")):
        return _Lists(path, lists)
    return _Folder(path)


class _Folder:
    """Pictures with a text or JSON file of the same name beside each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        found = (p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        self.keys = sorted(str(path.relative_to(folder)) for path in found)

    def read(self, index: int, part: str) -> bytes | None:
        path = self.folder / self.keys[index]
        path = path if part == "picture" else path.with_suffix(f".{part}")
        return path.read_bytes() if path.is_file() else None


class _Lists:
    """The reference's annotations: lines with `image_path`, relative to the folder."""

    def __init__(self, folder: Path, lists: list[Path]) -> None:
        self.folder, self.lists, self.keys = folder, lists, []
        places = []
        for number, path in enumerate(lists):
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
        if part != "picture":
            return line if part == "json" else None
        try:
            path = self.folder / str(json.loads(line)["image_path"])
        except (ValueError, KeyError, TypeError):
            return None
        return path.read_bytes() if path.is_file() else None


class _Tars:
    """Uncompressed tars, their members grouped by the name before the first dot."""

    def __init__(self, tars: list[Path]) -> None:
        self.tars, self.keys = tars, []
        places = []
        for number, path in enumerate(tars):
            keys, found = _tar_index(path)
            self.keys += [f"{path.name}/{key}" for key in keys]
            places.append(np.insert(found, 0, number, axis=1))
        # Per pair: the tar, then offset and size of its picture, txt and json (size -1: none).
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
    """A tar's keys, and where their parts are, (n, 6) int64; kept on disk for the next time."""
    stat = path.stat()
    version = np.array([stat.st_size, stat.st_mtime_ns])
    kept = path.parent / ".pairs" / f"{path.name}.npz"
    try:
        with np.load(kept, allow_pickle=False) as file:
            if np.array_equal(file["version"], version):
                return file["keys"].tolist(), file["places"]
    except (OSError, ValueError, KeyError, EOFError):
        pass  # not there, or half of it: it is made again
    found: dict[str, np.ndarray] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name, _, suffix = member.name.partition(".")
                suffix = suffix.lower()
                part = "picture" if f".{suffix}" in IMAGE_SUFFIXES else suffix
                if member.isfile() and part in PARTS:
                    place = found.setdefault(name, np.array([0, -1] * len(PARTS), np.int64))
                    place[2 * PARTS.index(part) :][:2] = member.offset_data, member.size
    except tarfile.TarError as error:
        raise InputError(f"{path}: not an uncompressed tar, or damaged ({error})") from error
    keys, places = list(found), np.array(list(found.values()), np.int64).reshape(-1, 6)
    try:
        kept.parent.mkdir(exist_ok=True)
        with atomic_write(kept) as file:
            np.savez(file, version=version, keys=np.array(keys, str), places=places)
    except OSError:
        pass  # a folder that cannot be written to: listed again next time
    return keys, places
