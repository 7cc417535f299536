"""Small files: JSON written atomically, and fingerprints of settings."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from core.config import InputError


def write_json(path: Path, value: Any) -> None:  # noqa: ANN401 - any JSON value
    """Write JSON, whole or not at all."""
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
    os.replace(aside, path)


def read_json(path: Path) -> Any:  # noqa: ANN401 - any JSON value
    """Read JSON; raises InputError for a missing or damaged file."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not JSON ({error})") from error


def fingerprint(value: Any) -> str:  # noqa: ANN401 - any JSON value
    """A short sha256 of a JSON value, to tell one set of settings from another."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    """The sha256 of a file's content, in hex."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
