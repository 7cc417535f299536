"""Where a result comes from: commit, versions, command line, host and devices."""

import datetime
import functools
import importlib.metadata
import platform
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from core import __version__
from core.distributed.hardware import device_name
from core.distributed.world import World

PACKAGES = ("torch", "torchvision", "numpy", "pillow", "huggingface_hub")


@functools.cache
def commit() -> str:
    """The commit of this code, or "" outside a git checkout."""
    return _git("rev-parse", "HEAD")


@functools.cache
def is_dirty() -> bool | None:
    """Whether tracked files differ from the commit; None outside a git checkout."""
    return bool(_git("status", "--porcelain", "--untracked-files=no")) if commit() else None


def _git(*arguments: str) -> str:
    git = shutil.which("git")
    if git is None:
        return ""
    here = Path(__file__).parent
    done = subprocess.run([git, *arguments], cwd=here, capture_output=True, text=True)
    return done.stdout.strip()


def versions() -> dict[str, str | None]:
    """The versions of Python, of the packages that results depend on, and of CUDA."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        found[name] = importlib.metadata.version(name)
    return {**found, "cuda": torch.version.cuda}


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def describe_start(world: World) -> dict[str, Any]:
    """What a run folder records when a command starts."""
    spec = sys.modules["__main__"].__spec__
    program = ["-m", spec.name] if spec else sys.argv[:1]
    return {
        "started": now(),
        "ended": None,
        "command": shlex.join(["python", *program, *sys.argv[1:]]),
        "version": __version__,
        "commit": commit(),
        "dirty": is_dirty(),
        "versions": versions(),
        "host": socket.gethostname(),
        "processes": world.size,
        "device": device_name(world.device),
    }
