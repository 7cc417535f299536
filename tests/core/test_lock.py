import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import yaml
from helpers.command_lines import MINIMAL
from helpers.fuzz import refused
from helpers.models import tiny, write_models
from helpers.paths import ROOT

from core import lock as lock_module
from core.config import InputError
from core.lock import LOCK, process_start, writer_lock

HOLD = """
import sys
from core.lock import writer_lock
with writer_lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(folder) -> subprocess.Popen:
    """A process that holds the lock of a folder until its input ends."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    return holder


def leave_lock(folder, **changes: object) -> None:
    """A lock as a process leaves it that had no time to remove it."""
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "started": "2026-01-01 00:00:00"}
    (folder / LOCK).write_text(json.dumps({**holder, "process_start": "long ago", **changes}))


def test_the_second_writer_of_a_folder_gets_one_line_that_names_the_first(tmp_path, world):
    with writer_lock(tmp_path, world):
        before = (tmp_path / LOCK).read_text()
        for _ in range(20):
            expected = f"process {os.getpid()} on {socket.gethostname()} has been writing here"
            with pytest.raises(InputError, match=expected) as error, writer_lock(tmp_path):
                pass
            assert "\n" not in str(error.value)
        assert (tmp_path / LOCK).read_text() == before
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_lock_left_by_sigkill_is_taken_over_at_once_on_the_same_host(tmp_path, world):
    holder = hold(tmp_path)
    with pytest.raises(InputError, match=f"process {holder.pid} on"), writer_lock(tmp_path):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / LOCK).exists()
    started = time.monotonic()
    with writer_lock(tmp_path, world):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert time.monotonic() - started < 1


def test_a_lock_of_an_earlier_process_with_the_same_id_is_taken_over(tmp_path):
    leave_lock(tmp_path, process_start="another boot 17")
    with writer_lock(tmp_path):
        found = json.loads((tmp_path / LOCK).read_text())
        assert found["process_start"] == process_start(os.getpid())


def test_a_lock_of_another_host_is_taken_over_when_its_heartbeat_stands_still(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(lock_module, "STALE_SECONDS", 0.05)
    leave_lock(tmp_path, host="node7")
    with writer_lock(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["host"] == socket.gethostname()
    assert "locked by process" in capsys.readouterr().err


def test_a_lock_of_another_host_holds_as_long_as_its_heartbeat_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "STALE_SECONDS", 1.0)
    leave_lock(tmp_path, host="node7")
    beat = threading.Timer(0.05, os.utime, [tmp_path / LOCK])
    beat.start()
    with pytest.raises(InputError, match="on node7 has been writing"), writer_lock(tmp_path):
        pass
    beat.join()


def test_the_holder_sends_heartbeats(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "HEARTBEAT_SECONDS", 0.01)
    with writer_lock(tmp_path):
        before = (tmp_path / LOCK).stat().st_mtime_ns
        deadline = time.monotonic() + 10
        while (tmp_path / LOCK).stat().st_mtime_ns == before:
            assert time.monotonic() < deadline


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"[1]", b'{"host": 3, "pid": "x"}'])
def test_a_damaged_lock_is_taken_over_when_nobody_renews_it(tmp_path, monkeypatch, content):
    monkeypatch.setattr(lock_module, "STALE_SECONDS", 0.05)
    (tmp_path / LOCK).write_bytes(content)
    with writer_lock(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_of_many_processes_that_find_a_stale_lock_one_takes_it_over(tmp_path):
    for attempt in range(40):  # the order in which they run is another one each time
        folder = tmp_path / str(attempt)
        folder.mkdir()
        leave_lock(folder)
        inside, most, refused = [], [], []
        ready, done = threading.Barrier(8), threading.Barrier(8)

        def enter(folder=folder, inside=inside, most=most, refused=refused, ready=ready, done=done):
            ready.wait()
            try:
                with writer_lock(folder):
                    inside.append(1)
                    most.append(len(inside))
                    done.wait()
                    inside.pop()
            except InputError:
                refused.append(1)
                done.wait()

        threads = [threading.Thread(target=enter) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert most == [1]
        assert len(refused) == 7
        assert not list(folder.iterdir())


def test_a_command_that_fails_before_it_writes_leaves_no_folder(tmp_path):
    with pytest.raises(InputError, match="bad input"), writer_lock(tmp_path / "a" / "b"):
        raise InputError("bad input")
    assert not list(tmp_path.iterdir())
    with writer_lock(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "result").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["result"]


def test_a_command_that_writes_nothing_needs_no_lock(tmp_path, world):
    with writer_lock(tmp_path), writer_lock(tmp_path, world, needed=False):
        pass
    with writer_lock(tmp_path / "new", world, needed=False):
        assert not (tmp_path / "new").exists()


def test_temporary_files_of_a_killed_writer_are_removed_by_the_next(tmp_path):
    for name in (".codes_00001.npy.77.ab12cd34.tmp", "png/.000001.png.77.ab12cd34.tmp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("half")
    (tmp_path / "notes.tmp").touch()
    with writer_lock(tmp_path):
        assert {path.name for path in tmp_path.rglob("*")} == {LOCK, "png", "notes.tmp"}


# autoregressive.serve writes nothing. Both convert commands load a model first: see below.
WRITING = sorted(set(MINIMAL) - {"autoregressive.serve"} - {c for c in MINIMAL if "convert" in c})


@pytest.mark.parametrize("module", WRITING)
def test_every_command_that_writes_is_refused_where_another_one_writes(tmp_path, module):
    is_file = MINIMAL[module]["out"] == "x.npz" if "out" in MINIMAL[module] else False
    out = tmp_path / ("x.npz" if is_file else "out")
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(MINIMAL[module]))
    with writer_lock(tmp_path, file=out.name) if is_file else writer_lock(out):
        message = refused(module, "--config", tmp_path / "base.yaml", "--out", out)
    assert message.startswith(f"{out}: process {os.getpid()} on"), message
    assert not out.exists()


def test_both_convert_commands_are_refused_where_another_one_writes(tmp_path):
    gpt, vq = write_models(tmp_path, tiny())
    out = tmp_path / "out"
    for module, source in (("autoregressive.convert", gpt), ("tokenizer.convert", vq)):
        with writer_lock(out):
            assert "has been writing here" in refused(module, "--source", source, "--out", out)
    with writer_lock(tmp_path, file="out"):
        flags = ("--source", gpt, "--format", "vllm", "--out", out)
        assert "has been writing here" in refused("autoregressive.convert", *flags)
    assert not out.exists()


def test_two_files_of_one_folder_are_written_at_the_same_time(tmp_path):
    (tmp_path / ".other.npz.77.ab12cd34.tmp").write_text("half")
    with writer_lock(tmp_path, file="a.npz"), writer_lock(tmp_path, file="b.npz"):
        with (
            pytest.raises(InputError, match=r"a\.npz: process"),
            writer_lock(tmp_path, file="a.npz"),
        ):
            pass
        assert {path.name for path in tmp_path.iterdir()} == {
            *(".a.npz.lock", ".b.npz.lock", ".other.npz.77.ab12cd34.tmp")
        }
