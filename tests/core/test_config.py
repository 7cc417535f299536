import errno
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from helpers.config import Inner
from helpers.paths import ROOT

from core import __version__
from core.config import InputError, load_config, parse_config, run_command, save_config


@dataclass(frozen=True)
class Outer:
    """Outer.

    Args:
        out: A folder.
        grid: Two numbers.
        source: A path, perhaps.
        inner: The inner part.
    """

    out: Path
    grid: tuple[int, int] = (1, 2)
    source: Path | None = None
    inner: Inner = field(default_factory=Inner)


@dataclass(frozen=True)
class Lists:
    """Lists.

    Args:
        files: Paths.
        grid: Two numbers.
    """

    files: tuple[Path, ...] = ()
    grid: tuple[int, int] | None = None


def test_later_files_win_and_flags_win_over_files(tmp_path):
    (tmp_path / "a.yaml").write_text("out: x\ninner:\n  lr: 1e-3\n  kind: b\n")
    (tmp_path / "b.yaml").write_text("inner:\n  lr: 2.0e-3\n")
    files = ["--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml")]
    assert parse_config(Outer, files) == Outer(Path("x"), inner=Inner(2e-3, "b"))
    config = parse_config(Outer, [*files, "--inner.lr", "5", "--grid", "[3,4]"])
    assert config == Outer(Path("x"), (3, 4), inner=Inner(5.0, "b"))


@pytest.mark.parametrize(
    "flags",
    [
        ["--files", "a", "b c"],
        ["--files", "a", "--files", "b c"],
        ["--files", "[a, b c]"],
        ['--files=["a","b c"]'],
    ],
)
def test_a_list_needs_no_brackets(flags):
    config = parse_config(Lists, [*flags, "--grid", "3", "4"])
    assert config == Lists((Path("a"), Path("b c")), (3, 4))


def test_every_command_tells_the_version(capsys):
    with pytest.raises(SystemExit) as end:
        parse_config(Lists, ["--version"])
    assert end.value.code == 0
    assert __version__ in capsys.readouterr().out


def test_a_saved_config_loads_to_the_same(tmp_path):
    config = Outer(tmp_path, (5, 6), tmp_path / "s", Inner(0.5))
    save_config(config, tmp_path / "config.yaml")
    assert load_config(Outer, tmp_path / "config.yaml") == config
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--out", "x", "--nope", "1"], "nope"),
        (["--out", "x", "--inner.nope", "1"], "inner.nope"),
        (["--out", "x", "--inner.lr", "fast"], "inner.lr"),
        (["--out", "x", "--inner.kind", "c"], "inner.kind"),
        (["--out", "x", "--inner.lr", "-1"], "must be > 0"),
        (["--out", "x", "--grid", "7"], "grid"),
        (["--out", "x", "--config", "missing.yaml"], "missing.yaml"),
        ([], "out"),
    ],
)
def test_a_mistake_is_named_in_one_line(flags, message):
    with pytest.raises(InputError, match=message) as caught:
        parse_config(Outer, flags)
    assert "\n" not in str(caught.value)


def test_unknown_and_mistyped_keys_in_files_are_named(tmp_path):
    for text, name in (("out: x\nouter: 1\n", "outer"), ("out: x\ngrid: [a, b]\n", "grid")):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        with pytest.raises(InputError, match=name):
            load_config(Outer, path)
    with pytest.raises(InputError, match="no such configuration file"):
        load_config(Outer, tmp_path / "missing.yaml")


@pytest.mark.parametrize("value", ["", "3", "[1]"])
def test_a_group_that_is_no_group_is_named(tmp_path, value):
    path = tmp_path / "config.yaml"
    path.write_text(f"out: x\ninner: {value}\n")
    with pytest.raises(InputError, match="inner"):
        load_config(Outer, path)
    with pytest.raises(InputError, match="inner"):
        parse_config(Outer, ["--config", str(path)])


def test_a_file_that_is_no_yaml_is_refused(tmp_path):
    path = tmp_path / "config.yaml"
    for content in (b"\xff\xfe\x00", b"out: [1", b"- 1", b"hello", b""):
        path.write_bytes(content)
        with pytest.raises(InputError):
            load_config(Outer, path)
        with pytest.raises(InputError):
            parse_config(Outer, ["--config", str(path)])


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tokenizer.convert", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_mistake_ends_a_command_with_one_line_and_exit_code_2(tmp_path):
    done = run("--source", "nothing.pt", "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("tokenizer.convert: ")
    assert "nothing.pt" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("wrong"), 2),
        (FileNotFoundError("no such file"), 2),
        (PermissionError("not yours"), 2),
        (NotADirectoryError("a file"), 2),
        (IsADirectoryError("a folder"), 2),
        (FileExistsError("is there"), 2),
        (OSError(errno.ENAMETOOLONG, "file name too long"), 2),
        (MemoryError("Unable to allocate 7.11 PiB"), 2),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2),
        (ConnectionResetError("connection reset by peer"), 1),
        (OSError(errno.ESTALE, "stale file handle"), 1),
        (OSError(errno.ENOSPC, "no space left on device"), 1),
        (OSError(errno.EIO, "input/output error"), 1),
        (OSError("loader processes die again and again"), 1),
    ],
)
def test_only_what_the_user_can_put_right_has_the_exit_code_of_a_mistake(
    monkeypatch, capsys, error, code
):
    def leave(code: int) -> None:
        raise SystemExit(code)

    def main() -> None:
        raise error

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.delenv("PET_SIGNALS_TO_HANDLE", raising=False)
    with pytest.raises(SystemExit) as left:
        run_command(main)
    assert left.value.code == code
    (line,) = capsys.readouterr().err.splitlines()
    assert str(error) in line


ENVIRONMENT = """
import os
before = dict(os.environ)
import autoregressive.search, autoregressive.train, tokenizer.reconstruct, tokenizer.train
assert {k: v for k, v in os.environ.items() if before.get(k) != v}.keys() <= {
    "KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK"  # set by torch and scikit-learn
}, set(os.environ) - set(before)

def main():
    import torch
    large = torch.empty(1 << 26)
    for line in open("/proc/self/smaps"):
        if "-" in line.split(" ")[0]:
            begin, end = (int(word, 16) for word in line.split(" ")[0].split("-"))
            here = begin <= large.data_ptr() + (1 << 25) < end
        if here and line.startswith("VmFlags"):
            print("large pages" if " hg" in line else "small pages")

from core.config import run_command
run_command(main)
"""


@pytest.mark.slow
def test_imports_leave_the_environment_alone_and_a_command_gets_large_pages():
    clean = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"}
    line = [sys.executable, "-c", ENVIRONMENT]
    done = subprocess.run(line, cwd=ROOT, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    if sys.platform == "linux" and done.stdout:  # some containers do not tell
        assert done.stdout == "large pages\n"


@pytest.mark.slow
def test_help_explains_every_field_and_print_config_is_a_dry_run(tmp_path):
    text = run("--help").stdout
    assert "auto takes the EMA weights of our runs" in " ".join(text.split())
    assert "python -m tokenizer.convert --source vq_ds16_c2i.pt" in text
    shown = run("--source", "x", "--out", str(tmp_path / "out"), "--print_config")
    assert shown.returncode == 0
    assert "weights: auto" in shown.stdout
    assert not (tmp_path / "out").exists()


FINISHED = """
import atexit
from core.config import parse_first, run_command
from helpers.config import Inner
class Group:
    def __del__(self):
        print("freed at the end of the interpreter")
kept = Group()
parse_first(Inner, __name__)
atexit.register(print, "tracker closed")
run_command(lambda: print("done"))
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_a_process_of_several_leaves_without_the_end_of_the_interpreter(processes):
    env = os.environ | {"WORLD_SIZE": str(processes), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(
        [sys.executable, "-c", FINISHED], env=env, capture_output=True, text=True, check=True
    )
    alone = ["freed at the end of the interpreter"] if processes == 1 else []
    assert done.stdout.splitlines() == ["done", "tracker closed", *alone]
