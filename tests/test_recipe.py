"""scripts/imagenet_256.sh: its commands parse, its settings reach them, and a failure ends it."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers.command_lines import parse_command
from helpers.paths import ROOT

SHELL = shutil.which("bash")
# Stands for python: writes its arguments down, and makes what tells that the tokenizer is there.
PYTHON = """#!/bin/sh
printf '%s\\n' "$*" >> "{log}"
case "$*" in
  *{failing}*) exit 2 ;;
  *tokenizer.convert*) mkdir -p "{out}/vq16" && touch "{out}/vq16/checksums.json" ;;
esac
"""


def run_recipe(
    folder: Path, *flags: str, failing: str = "nothing", **settings: str
) -> tuple[int, list[str]]:
    """Run the recipe with a program that stands for python -> exit code, arguments of each run."""
    log, out, programs = folder / "log", folder / "out", folder / "programs"
    programs.mkdir(exist_ok=True)
    log.write_text("")
    (programs / "python").write_text(PYTHON.format(log=log, out=out, failing=failing))
    (programs / "python").chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "NPROC": "4"}
    assert SHELL
    done = subprocess.run(
        [SHELL, "scripts/imagenet_256.sh", "images", "reference.npz", str(out), *flags],
        cwd=ROOT,
        env={**environment, **settings},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, log.read_text().splitlines()


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_every_stage_parses_and_gets_its_settings(tmp_path):
    settings = {
        "SIZE": "l",
        "TOKENIZER": "runs/vq",
        "ENCODE_FLAGS": "--num_workers 2 --precision bf16",
        "SAMPLE_FLAGS": "--num_images 10000 --sampling.cfg_scale 1.75",
    }
    code, lines = run_recipe(tmp_path, "--training.num_steps", "7", **settings)
    assert code == 0
    convert, encode, train, sample = map(parse_command, lines)
    assert convert.source == "runs/vq"
    assert (encode.num_workers, encode.precision, encode.crop) == (2, "bf16", "ten")
    assert (train.training.num_steps, train.model.num_layers) == (7, 24)
    assert train.data.codes == (encode.out,)
    assert (sample.num_images, sample.sampling.cfg_scale) == (10_000, 1.75)
    assert sample.gpt == str(train.out)
    assert sample.tokenizer == encode.tokenizer == str(convert.out)
    assert all("--nproc-per-node 4" in line for line in lines[1:])


def test_a_second_start_skips_the_tokenizer_and_a_dry_run_samples_nothing(tmp_path):
    run_recipe(tmp_path)
    code, lines = run_recipe(tmp_path, "--dry_run", "true")
    assert code == 0
    assert [type(parse_command(line)).__name__ for line in lines] == ["EncodeConfig", "TrainConfig"]


def test_a_stage_that_fails_ends_the_recipe(tmp_path):
    code, lines = run_recipe(tmp_path, failing="autoregressive.train")
    assert code == 2
    assert "autoregressive.train" in lines[-1]
