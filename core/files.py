"""Files: atomic writing, JSON, and fingerprints of settings."""

import contextlib
import hashlib
import json
import os
import stat
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, get_args, get_origin

import xxhash

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
    # surrogateescape: a file name that is not UTF-8 is written as the bytes that it has.
    is_text = mode == "w"
    encoding, errors, newline = ("utf-8", "surrogateescape", "\n") if is_text else (None,) * 3
    with (
        atomic_path(path) as temporary,
        temporary.open(mode, encoding=encoding, errors=errors, newline=newline) as file,
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
    check_regular_file(path)
    try:
        return json.loads(Path(path).read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({' '.join(str(error).split())[:200]})") from error


def read_record(path: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Read a JSON object and check it: {"rows": list[int], "count": int}, a type for each key.

    Keys that are not in `fields` may be there and are not checked. Integers must be >= 0. Raises
    InputError, naming the key, where one is missing or of another type.
    """
    record = read_json(path)
    if not isinstance(record, dict):
        raise InputError(f"{path}: holds a {type(record).__name__}, expected a JSON object")
    for key, kind in fields.items():
        if key not in record:
            raise InputError(f"{path}: {key} is missing; written by another command?")
        if not _is_a(record[key], kind):
            name = kind.__name__ if kind in (int, str, dict, bool) else str(kind)
            raise InputError(f"{path}: {key} is {str(record[key])[:60]}, expected {name}")
    return record


def _is_a(value: Any, kind: Any) -> bool:  # noqa: ANN401 - any JSON value, any type
    """Whether a JSON value has a type such as int, dict or list[list[str]]."""
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is_a(item, get_args(kind)[0]) for item in value)
    if kind is int:
        return type(value) is int and 0 <= value < 2**63
    return isinstance(value, kind)


def check_regular_file(path: Path) -> None:
    """Raise InputError unless this is a file: reading a pipe or a device may never end."""
    try:
        mode = Path(path).stat().st_mode
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or device"
        raise InputError(f"{path}: is {kind}, expected a file")


def fingerprint(value: Any) -> str:  # noqa: ANN401 - any JSON value
    """The first 16 hex digits of a JSON value's sha256, to tell settings apart."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def file_sha256(path: Path, progress: Callable[[int], object] | None = None) -> str:
    """The sha256 of a file's content, in hex; `progress` is told the bytes of each part read."""
    digest = hashlib.sha256()
    for part in _parts(path, progress):
        digest.update(part)
    return digest.hexdigest()


def file_xxh3(path: Path, progress: Callable[[int], object] | None = None) -> str:
    """The 128 bits of XXH3 of a file's content, in hex: finds damage at the speed of memory."""
    digest = xxhash.xxh3_128()
    for part in _parts(path, progress):
        digest.update(part)
    return digest.hexdigest()


def _parts(path: Path, progress: Callable[[int], object] | None) -> Iterator[memoryview]:
    buffer = bytearray(1 << 20)  # fits into a core's cache: read, hashed, overwritten
    view = memoryview(buffer)
    with Path(path).open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            yield view[:count]
            if progress:
                progress(count)


SAMPLED_FILES = 256  # whose content is looked at: a million images are not read twice
SAMPLED_BYTES = 1 << 16


class FilesFingerprint(NamedTuple):
    """Whether files are still the same: by content, and as older versions did, by their times.

    content: a hash of all names and sizes, and of the first 64 KiB of at least 256 files (of all
        where there are fewer), spread evenly.
    times: a hash of all names, sizes and times of change.
    """

    content: str
    times: str


def fingerprint_of_files(paths: Sequence[Path]) -> FilesFingerprint:
    """The fingerprints of files; copying or touching them changes only `times`."""
    content, times = hashlib.sha256(), hashlib.sha256()
    every = max(1, len(paths) // SAMPLED_FILES)
    for number, path in enumerate(map(Path, paths)):
        size, time, begin = "missing", "", b""
        with contextlib.suppress(OSError):
            facts = path.stat()
            size, time = str(facts.st_size), f" {facts.st_mtime_ns}"
            if number % every == 0 and stat.S_ISREG(facts.st_mode):  # a pipe would never end
                with path.open("rb") as file:
                    begin = file.read(SAMPLED_BYTES)
        content.update(os.fsencode(f"{path.name}\n{size}\n") + begin)
        times.update(os.fsencode(f"{path.name}\n{size}{time}\n"))
    return FilesFingerprint(content.hexdigest()[:16], times.hexdigest()[:16])
