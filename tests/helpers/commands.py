"""Running commands in processes of their own, and killing them at a chosen moment."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from helpers.paths import ROOT


def command(module: str, *flags: object, processes: int = 1) -> list[str]:
    """The command line of a module, under torchrun for several processes."""
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    return [*launcher, module, *map(str, flags)]


def environment() -> dict[str, str]:
    """The environment of a command under test: one thread, no GPU."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run_module(
    module: str, *flags: object, processes: int = 1, ok: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a command from the project's root; with `ok`, it must succeed."""
    done = subprocess.run(
        command(module, *flags, processes=processes),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert not ok or done.returncode == 0, done.stderr[-3000:]
    return done


def kill_when(ready: Callable[[], bool], module: str, *flags: object) -> None:
    """Start a command and SIGKILL it, at a random moment, once `ready()` is true.

    Fails if the command ends by itself first, since then nothing was killed.
    """
    process = subprocess.Popen(
        command(module, *flags),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not ready():
            assert process.poll() is None, f"ended with {process.returncode} before the kill"
            time.sleep(0.002)
        time.sleep(random.random() * 0.01)
    finally:
        process.kill()
        process.wait(timeout=60)
    assert process.returncode == -signal.SIGKILL, "ended by itself before the kill"


def has_lines(path: Path, count: int) -> bool:
    """Whether a file exists and has at least that many lines."""
    return path.exists() and len(path.read_text().splitlines()) >= count
