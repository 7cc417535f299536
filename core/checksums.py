"""Checkpoint folders on disk: which is the newest, and whether their files are what was written.

`checksums.json` has the sha256 of every file of a checkpoint. It also says which files there were,
so that a deleted one is noticed.
"""

import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from core.errors import InputError
from core.files import file_sha256, read_json

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


def read_checksums(folder: Path) -> dict[str, str]:
    """The sha256 of each file by its name; raises InputError where checksums.json is damaged."""
    path = Path(folder) / CHECKSUMS
    sums = read_json(path)
    if not isinstance(sums, dict) or not all(isinstance(value, str) for value in sums.values()):
        raise InputError(f"{CHECKSUMS} has changed")
    if path.read_bytes() != canonical(sums).encode():
        raise InputError(f"{CHECKSUMS} has changed")
    return sums


def canonical(sums: dict[str, str]) -> str:
    """One text for one set of sums, so that any changed byte shows."""
    return json.dumps(sums, indent=1, sort_keys=True) + "\n"


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
        sums = read_checksums(folder)
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
                if file_sha256(folder / name, bar.update) != sums[name]:
                    return f"{name} has changed"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (InputError, OSError) as error:
        return str(error)
    return ""
