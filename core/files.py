"""Files: atomic writing, JSON, and fingerprints of settings."""

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Literal

from core.errors import InputError


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder, which replaces `path` when the block succeeds.

    Use it with libraries that write to a path; use `atomic_write` for everything else. Readers see
    the old file or the complete new one. If the block raises, the temporary file is removed and
    `path` is left as it was. The temporary name is unique, so processes may write concurrently.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.errno and error.filename is None:  # a full disk names no file
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_write(
    path: Path, mode: Literal["wb", "w"] = "wb", fsync: bool = False
) -> Iterator[IO[Any]]:
    """Open a file for writing that appears at `path` complete or not at all.

    mode: "wb" for bytes, "w" for UTF-8 text. fsync: return only when the content is on the disk.
    """
    encoding, newline = ("utf-8", "\n") if mode == "w" else (None, None)
    with (
        atomic_path(path) as temporary,
        temporary.open(mode, encoding=encoding, newline=newline) as file,
    ):
        yield file
        file.flush()
        if fsync:
            os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_write(path, "w") as file:
        file.write(text)


def write_json(path: Path, value: Any) -> None:  # noqa: ANN401 - any JSON value
    """Write a JSON file atomically; raises ValueError for NaN and infinity."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:  # noqa: ANN401 - any JSON value
    """Read a JSON file; raises InputError if it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not JSON ({error})") from error


def fingerprint(value: Any) -> str:  # noqa: ANN401 - any JSON value
    """The first 16 hex digits of a JSON value's sha256, to tell settings apart."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def file_sha256(path: Path, progress: Callable[[int], object] | None = None) -> str:
    """The sha256 of a file's content, in hex; `progress` is told the bytes of each part read."""
    digest, buffer = hashlib.sha256(), bytearray(1 << 22)
    view = memoryview(buffer)
    with Path(path).open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
            if progress:
                progress(count)
    return digest.hexdigest()


def fingerprint_of_files(paths: Iterable[Path]) -> str:
    """A hash of files' names, sizes and times of change: whether they are still the same files."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            stat = Path(path).stat()
            facts = f"{stat.st_size} {stat.st_mtime_ns}"
        except OSError:
            facts = "missing"
        digest.update(os.fsencode(f"{Path(path).name}\n{facts}\n"))
    return digest.hexdigest()[:16]
