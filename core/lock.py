"""One writer per folder: a lock file that says who writes, and that outlives nobody.

    with distributed() as world, writer_lock(config.out, world):
        ...

The lock is a file made with O_EXCL, which every file system knows, unlike flock. A process that
died leaves it behind: on the same host it is replaced at once, because no process has its id and
start time; on another host when its heartbeat, the time of the file, stands still.
"""

import contextlib
import hashlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from core.distributed.world import World
from core.errors import InputError

LOCK = ".lock"
HEARTBEAT_SECONDS = 15.0
# A host that has been pre-empted is given up after this time without a heartbeat.
STALE_SECONDS = 120.0


@contextlib.contextmanager
def writer_lock(
    folder: Path, world: World | None = None, needed: bool = True, file: str | None = None
) -> Iterator[None]:
    """Hold the right to write to `folder`, which is made if need be; rank 0 holds it for all.

    world: None for a command of one process. needed: False where it will write nothing. file: the
    one file or folder in it that will be written, beside those of others; None for all of it.
    Raises InputError, naming the process, where another one writes there.
    """
    if not needed:
        yield
        return
    if world and not world.is_main:
        world.barrier()
        yield
        return
    lock = _Lock(Path(folder), file)
    lock.acquire()
    try:
        if world:
            world.barrier()
        yield
    finally:
        lock.release()


class _Lock:
    def __init__(self, folder: Path, file: str | None) -> None:
        self.folder, self.path = folder, folder / (f".{file}{LOCK}" if file else LOCK)
        self.written = folder / file if file else folder
        pid = os.getpid()
        holder = {"host": socket.gethostname(), "pid": pid, "process_start": process_start(pid)}
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        self.text = json.dumps({**holder, "started": started, "token": uuid.uuid4().hex})
        self.made: list[Path] = []  # folders that did not exist before
        self.ended = threading.Event()
        self.heart = threading.Thread(target=self._beat, name="lock", daemon=True)

    def acquire(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"{self.folder}: is a file, expected a folder")
        self.made = [p for p in (self.folder, *self.folder.parents) if not p.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as undo:
            undo.callback(self._remove_made_folders)
            self._take(self.path)
            undo.pop_all()
        self._remove_leftovers()
        self.heart.start()

    def release(self) -> None:
        self.ended.set()
        self.heart.join()
        if _read(self.path) == self.text:
            self.path.unlink(missing_ok=True)
        self._remove_made_folders()

    def _take(self, path: Path) -> None:
        """Make the lock file `path` ours; raise InputError if a living process has it.

        The lock of a dead process is replaced, in one step, by the one process that holds the
        lock of replacing it, whose name tells the two locks: a newer lock is never touched.
        """
        while not self._create(path):
            found = _read(path)
            if found is None or not self._is_dead(path, found):  # released or renewed in between
                continue
            turn = path.with_name(f"{path.name}.{hashlib.sha256(found.encode()).hexdigest()[:8]}")
            self._take(turn)
            try:
                if _read(path) == found:
                    os.replace(turn, path)
                    return
            finally:
                turn.unlink(missing_ok=True)

    def _create(self, path: Path) -> bool:
        """Create the lock file; False if there is one."""
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w") as file:
            file.write(self.text)
        return True

    def _is_dead(self, path: Path, found: str) -> bool:
        """Whether the holder named in `found` is dead; False if the file has another text by now.

        Raises InputError if the holder is alive.
        """
        holder = _parse(found)
        who = f"process {holder.get('pid', '?')} on {holder.get('host', 'an unknown host')}"
        problem = InputError(
            f"{self.written}: {who} has been writing here since {holder.get('started', '?')}; wait "
            f"for it or choose another place ({path.name} there says so)"
        )
        if holder.get("host") == socket.gethostname():
            pid = holder.get("pid")
            if isinstance(pid, int) and process_start(pid) == holder.get("process_start"):
                raise problem
            return True
        before, deadline = _heartbeat(path), time.monotonic() + STALE_SECONDS
        time.sleep(0.05)
        if _read(path) != found:  # it was just being written
            return False
        print(
            f"{self.written}: locked by {who}; waiting for its next heartbeat, at most "
            f"{STALE_SECONDS:.0f} s",
            file=sys.stderr,
        )
        # Compared with itself: the clocks of two hosts may differ.
        while time.monotonic() < deadline:
            time.sleep(min(1.0, STALE_SECONDS / 10))
            if _read(path) != found:
                return False
            if _heartbeat(path) != before:
                raise problem
        return True

    def _remove_leftovers(self) -> None:
        """Remove temporary files of writers that were killed; see core.files.atomic_path."""
        if self.written != self.folder:  # others may be writing their files beside
            return
        for pattern in (".?*.tmp", "*/.?*.tmp"):
            for path in self.folder.glob(pattern):
                if path.is_file() and not path.name.startswith(f"{LOCK}."):
                    path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self.ended.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):  # e.g. a network disk that is away for a moment
                os.utime(self.path)

    def _remove_made_folders(self) -> None:
        """Leave nothing where nothing was written."""
        for folder in self.made:
            try:
                folder.rmdir()
            except OSError:
                return


def process_start(pid: int) -> str | None:
    """When a process of this host began, to tell it from a later one of the same id; None: gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except ProcessLookupError:
        return None
    except FileNotFoundError:
        return None if Path("/proc/self/stat").exists() else _alive(pid)
    state, *rest = stat.rpartition(")")[2].split()
    return None if state in "ZX" else f"{boot} {rest[18]}"


def _alive(pid: int) -> str | None:
    """As process_start, on a system without /proc: whether the id is in use."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        return "alive"
    return "alive"


def _heartbeat(path: Path) -> int:
    """The time of a lock file in ns; 0 where it is gone."""
    try:
        with path.open("rb") as file:  # opened: NFS then asks its server
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return 0


def _read(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return None


def _parse(text: str) -> dict[str, Any]:
    """The holder that a lock names; {} for one that is damaged or just being written."""
    try:
        holder = json.loads(text)
    except json.JSONDecodeError:
        return {}
    return holder if isinstance(holder, dict) else {}
