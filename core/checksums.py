"""Checkpoint folders on disk: which is the newest, and whether their files are what was written.

`checksums.json` has two sums of every file of a checkpoint: sha256, by which others know the
weights, and XXH3, with which damage is found at the speed of memory. Older checkpoints have only
the first. It also says which files there were, so that a deleted one is noticed.
"""

import json
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from core.errors import InputError
from core.files import file_sha256, file_xxh3, read_json

logger = logging.getLogger(__name__)

CHECKSUMS = "checksums.json"
_STEP = re.compile(r"step_(\d+)", re.ASCII)


def checkpoint_folders(folder: Path) -> dict[int, Path]:
    """The checkpoints in a folder by step, ascending; anything with another name is ignored."""
    found = {}
    for path in Path(folder).glob("step_*"):
        if (match := _STEP.fullmatch(path.name)) and path.is_dir():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


class FileSums(NamedTuple):
    """The sums of a file, in hex; xxh3_128: None in checkpoints of older versions."""

    sha256: str
    xxh3_128: str | None = None

    @classmethod
    def of(cls, path: Path) -> "FileSums":
        """The sums of a file's content."""
        return cls(file_sha256(path), file_xxh3(path))


class Checksums(NamedTuple):
    """What checksums.json tells: the sums of each file by its name.

    source_sha256: Of the file that a converted folder was made from, if it was recorded.
    """

    files: dict[str, FileSums]
    source_sha256: str | None = None


def read_checksums(folder: Path) -> Checksums:
    """The checksums of a folder; raises InputError where checksums.json is damaged."""
    path = Path(folder) / CHECKSUMS
    stored = read_json(path)
    try:
        if path.read_bytes() != _canonical(stored):
            raise ValueError
        if "files" in stored:
            files = {name: FileSums(**sums) for name, sums in stored["files"].items()}
        else:  # an older version's: one sha256 for each file
            files = {name: FileSums(sha256) for name, sha256 in stored.items()}
        sums = Checksums(files, stored.get("source_sha256") if "files" in stored else None)
        texts = [text for file in sums.files.values() for text in file] + [sums.source_sha256]
        if not all(isinstance(text, str | None) for text in texts):
            raise ValueError
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{CHECKSUMS} has changed") from error
    return sums


def write_checksums(
    folder: Path, files: Mapping[str, FileSums], source_sha256: str | None = None
) -> None:
    """Write checksums.json; the caller makes the folder, or this file, appear at the end."""
    stored: dict[str, Any] = {"files": {name: sums._asdict() for name, sums in files.items()}}
    if source_sha256:
        stored["source_sha256"] = source_sha256
    (folder / CHECKSUMS).write_bytes(_canonical(stored))


def _canonical(stored: Mapping[str, Any]) -> bytes:
    """One text for one set of sums, so that any changed byte shows."""
    return (json.dumps(stored, indent=1, sort_keys=True) + "\n").encode()


def find_damage(
    folder: Path,
    rank: int = 0,
    size: int = 1,
    names: Iterable[str] | None = None,
    progress: bool = False,
) -> str:
    """What is wrong with a checkpoint folder, or "" where every file matches its checksum.

    Of `size` processes, each reads its share of the files. names: check these files only.
    progress: show a progress bar where reading takes more than a second.
    """
    try:
        sums = read_checksums(folder).files
        chosen = sorted(sums if names is None else names)[rank::size]
        total = sum((folder / name).stat().st_size for name in chosen)
        with tqdm(
            total=total,
            desc=f"verifying {folder.name}",
            unit="B",
            unit_scale=True,
            delay=1,
            leave=False,
            disable=not progress,
        ) as bar:
            for name in chosen:
                if name not in sums:
                    return f"{name} is not in {CHECKSUMS}"
                expected = sums[name]
                if expected.xxh3_128:
                    same = file_xxh3(folder / name, bar.update) == expected.xxh3_128
                else:
                    same = file_sha256(folder / name, bar.update) == expected.sha256
                if not same:
                    return f"{name} has changed"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (InputError, OSError) as error:
        return str(error)
    return ""
