"""Files at web addresses: downloaded with resuming, by one process at a time, and checked.

For what is not on the Hub: reference batches, the Inception. Their place is torch.hub's folder.
"""

import http.client
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from filelock import FileLock
from tqdm import tqdm

from core.errors import InputError
from core.files import file_sha256
from core.hub import check_space, gigabytes

CHUNK = 1 << 20  # bytes
ATTEMPTS = 5  # a transfer that breaks resumes this often before the command gives up
TIMEOUT = 30  # seconds without an answer


class WebFile(NamedTuple):
    """An address, the path of the file, and the first digits of its sha256 ("": unknown)."""

    url: str
    path: Path
    sha256: str = ""


class Download(NamedTuple):
    """One file of a plan: what it is, its bytes to come, and where to.

    fetch: Downloads it and returns its path; None for a file that the command itself writes.
    """

    what: str
    size: int
    folder: Path
    fetch: Callable[[], Path] | None


def web_size(file: WebFile) -> int:
    """Bytes that `fetch_web` would still download; raises InputError where nothing answers."""
    if file.path.is_file():
        return 0
    try:
        with urlopen(Request(file.url, method="HEAD"), timeout=TIMEOUT) as answer:
            total = int(answer.headers["Content-Length"] or 0)
    except (URLError, OSError, ValueError, http.client.HTTPException) as error:
        raise _missing(file, error) from error
    return max(0, total - _size(_part(file)))


def fetch_web(file: WebFile) -> Path:
    """The file's path, downloaded if need be; a transfer that was broken or killed resumes.

    Raises InputError, naming file, address and place, where it cannot be downloaded or is another.
    """
    file.path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.path.with_name(f".{file.path.name}.lock")):
        if file.path.is_file():
            return file.path
        error: Exception | None = None
        for _ in range(ATTEMPTS):
            try:
                if _transfer(file):
                    break
            except HTTPError as refused:
                raise _missing(file, refused) from refused
            except (URLError, OSError, ValueError, http.client.HTTPException) as broken:
                error = broken
        else:
            raise _missing(file, error or "the transfer keeps breaking") from error
        part = _part(file)
        found = file_sha256(part) if file.sha256 else ""
        if not found.startswith(file.sha256):
            part.unlink()
            raise InputError(
                f"{file.url}: downloaded with sha256 {found[:12]}, expected {file.sha256[:12]}; "
                "the copy was removed: run again to download it again"
            )
        os.replace(part, file.path)
    return file.path


def _transfer(file: WebFile) -> bool:
    """Append what is missing to the partial file -> whether it is whole now."""
    part = _part(file)
    have = _size(part)
    request = Request(file.url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urlopen(request, timeout=TIMEOUT)
    except HTTPError as refused:
        if have and refused.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return True  # it was whole already
        raise
    with answer:
        resumed = answer.status == http.HTTPStatus.PARTIAL_CONTENT
        start = have if resumed else 0
        total = start + int(answer.headers["Content-Length"] or 0)
        with (
            part.open("ab" if resumed else "wb") as out,
            tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=file.path.name) as bar,
        ):
            while chunk := answer.read(CHUNK):
                out.write(chunk)
                bar.update(len(chunk))
    return _size(part) == total


def _part(file: WebFile) -> Path:
    return file.path.with_name(f"{file.path.name}.part")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _missing(file: WebFile, why: object) -> InputError:
    reason = " ".join(str(why).split())[:200]
    return InputError(
        f"{file.path.name}: not here and cannot be downloaded ({reason}); it is published at "
        f"{file.url}; put it at {file.path}"
    )


def check_plan(downloads: Iterable[Download], show: bool = True) -> None:
    """Raise InputError unless every disk has room for its part of a plan. show: print the plan."""
    needed: dict[int, tuple[Path, int]] = {}
    for item in downloads:
        if show:
            print(f"{item.what}: {gigabytes(item.size) if item.size else 'here already'}")
        parents = (item.folder, *item.folder.absolute().parents)
        disk = next(path for path in parents if path.exists()).stat().st_dev
        folder, size = needed.get(disk, (item.folder, 0))
        needed[disk] = folder, size + item.size
    for folder, size in needed.values():
        check_space(folder, size, "what is to be downloaded and written")
