"""What the fuzz tests share: how many examples, wrong values, damaged files, and the verdict."""

import contextlib
import importlib
import io
import json
import os
import resource
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from core.config import InputError, is_mistake

# `make fuzz` sets it: the number of examples of every test.
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
COUNTS = {"refused": 0, "accepted": 0}
MAX_SECONDS = 60  # that a command may take; the inputs are tiny
SLOWEST = [0.0]  # seconds
MAX_BYTES = 2 << 30  # that a command may take, whatever its input claims to hold

# The programs that commands started while they were attacked. A hostile input must start none.
STARTED: set[str] = set()
_watching = False


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and event in ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen"):
        STARTED.add(Path(os.fsdecode(arguments[0])).name)


sys.addaudithook(_watch)


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    """Raise AssertionError in a block that takes longer than MAX_SECONDS, e.g. one that hangs."""

    def stop(*_: object) -> None:
        raise AssertionError(f"did not end within {MAX_SECONDS} seconds")

    started = time.monotonic()
    handler = signal.signal(signal.SIGALRM, stop)
    left = signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
    try:
        yield
    finally:  # the timer of the whole test goes on
        signal.setitimer(signal.ITIMER_REAL, *left)
        signal.signal(signal.SIGALRM, handler)
        SLOWEST[0] = max(SLOWEST[0], time.monotonic() - started)


def peak_bytes() -> int:
    """The most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def examples(quick: int) -> settings:
    """`quick` examples in the ordinary suite, always the same; FUZZ_EXAMPLES new ones in a fuzz."""
    return settings(
        max_examples=EXAMPLES or quick,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def refused(module: str, *flags: object) -> str:
    """Run a command in this process -> "" if it succeeds, else the one line of its mistake.

    Anything but success or a mistake, a traceback for the user, is raised. So is a program that
    the input starts, memory without bounds, or a hang.
    """
    global _watching
    quiet, before = io.StringIO(), peak_bytes()
    command = importlib.import_module(module)
    argv = [module, *map(str, flags)]
    message = ""
    try:
        _watching = True
        with (
            time_limit(),
            mock.patch.object(sys, "argv", argv),
            contextlib.redirect_stdout(quiet),
            contextlib.redirect_stderr(quiet),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            command.main()
    except (InputError, OSError) as error:
        if not is_mistake(error):
            raise
        message = check_line(str(error))
    finally:
        _watching = False
    COUNTS["refused" if message else "accepted"] += 1
    assert not STARTED - {"git"}, STARTED  # which commit this is, written beside results
    grown = peak_bytes() - before
    assert grown <= MAX_BYTES, f"{grown:,} bytes more than before"
    return message


def check_line(message: str) -> str:
    """A message must be one line that a user can read."""
    assert message.strip(), "an empty message"
    assert len(message) < 1500, message[:3000]
    assert "Traceback" not in message, message
    return message


def check_output(out: Path) -> None:
    """Whatever happened, a folder of outputs has no temporary file, and its JSON is whole."""
    for path in out.rglob("*") if out.exists() else ():
        assert not path.name.endswith(".tmp"), path
        if path.suffix == ".json":
            json.loads(path.read_text())


# Values of no field, or of another one: types, ranges, NaN, and paths of every wrong kind.
WRONG_VALUES = st.one_of(
    st.sampled_from(
        [
            *(".nan", ".inf", "-.inf", "1e400", "-1", "0", "-3", "1" * 30, "1" * 5000, "0.5"),
            *("", "null", "true", "~", "{}", "[]", "[[]]", "{a: 1}", "[-1, -1]", "[0, 0]"),
            *("[null]", "[.nan, 1]", "[65536, 65536]", "9223372036854775807", "cuda", "mps"),
            *(
                "auto",
                "fp32",
                "/",
                "/dev/null",
                "/nonexistent/x",
                "'a\\0b'",
                '"a\\0b"',
                "2020-01-01",
            ),
            *(
                "!!python/object/apply:os.system [true]",
                "&a [*a]",
                "*b",
                "0x10",
                "1_0",
                "'\U0001f600'",
            ),
        ]
    ),
    st.integers(-(2**70), 2**70).map(str),
    st.floats().map(str),
    st.text(max_size=20).map(lambda text: json.dumps(text)),
)

# Values that cost nothing even where a command accepts them.
CHEAP_VALUES = st.one_of(
    st.sampled_from(
        [
            *(".nan", ".inf", "1e400", "-1", "0", "1", "2", "3", "0.5", "-0.5", "1" * 30, "''"),
            *("null", "true", "false", "{}", "[]", "[1]", "[-1, -1]", "[0, 0]", "[4, 4]", "[8, 8]"),
            *("[65536, 65536]", "cuda", "mps", "/", "/dev/null", "/nonexistent/x", '"a\\0b"'),
        ]
    ),
    st.integers(-5, 9).map(str),
    st.floats(-3, 3).map(str),
)


@contextlib.contextmanager
def damaged(path: Path, kind: str, place: float, other: Path) -> Iterator[None]:
    """Damage a file for the time of a block. place: where in it, in [0, 1)."""
    kept = path.with_name(f"kept_{path.name}")
    path.rename(kept)
    try:
        content = kept.read_bytes()
        at = int(place * len(content))
        if kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "device":
            path.symlink_to("/dev/zero")
        elif kind != "missing":
            path.write_bytes(_damage(content, kind, at, other, path.suffix))
        yield
    finally:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        kept.rename(path)


DAMAGES = (
    *("truncate", "flip", "empty", "swap", "garbage", "missing", "folder", "pipe", "device"),
    *("retype", "reshape", "huge", "nested", "digits", "drop", "wrong_type", "line"),
)


def _damage(content: bytes, kind: str, at: int, other: Path, suffix: str) -> bytes:
    if kind == "truncate":
        return content[:at]
    if kind == "flip" and content:
        return content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]
    if kind == "empty":
        return b""
    if kind == "swap":
        return other.read_bytes() if other.is_file() else b""
    if kind == "garbage":
        return np.random.default_rng(at).bytes(300)
    if kind == "line":
        return content[:at] + b"\n{\xff\n" + content[at:]
    if suffix == ".npy" and kind in ("retype", "reshape", "huge"):
        return _other_array(content, kind)
    if suffix == ".json" and kind in ("drop", "wrong_type"):
        return json.dumps(_other_record(json.loads(content), kind, at)).encode()
    if kind == "nested":
        return b"[" * 60_000 + b"]" * 60_000
    if kind == "digits":
        return b'{"rows": ' + b"1" * 5000 + b"}"
    return content.replace(b"1", b"-1")


def _other_array(content: bytes, kind: str) -> bytes:
    array = np.load(io.BytesIO(content), allow_pickle=False)
    file = io.BytesIO()
    if kind == "huge":
        header = {"descr": "<i8", "fortran_order": False, "shape": (1 << 50,)}
        np.lib.format.write_array_header_1_0(file, header)
        return file.getvalue() + content[-8:]
    np.save(file, array.astype(np.float32) * np.nan if kind == "retype" else array.reshape(-1))
    return file.getvalue()


def _other_record(record: Any, kind: str, at: int) -> Any:
    if not isinstance(record, dict) or not record:
        return [record]
    key = sorted(record)[at % len(record)]
    if kind == "drop":
        return {name: value for name, value in record.items() if name != key}
    wrong = (None, -1, "x", [], {}, [None], [[1]], 1.5, True, 2**70)
    return {**record, key: wrong[at % len(wrong)]}
