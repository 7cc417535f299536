"""The README's commands and Python code run as printed, from top to bottom, without a download."""

import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from helpers.commands import environment, run_module
from helpers.models import small, tiny
from helpers.paths import ROOT
from PIL import Image

README = (ROOT / "README.md").read_text()


# Lines of the README's shell blocks that are not run here, by their start, and why.
NOT_RUN = {
    "make demo ": "trains for minutes; test_demos.py runs it with small models",
    "make demo-text": "trains for minutes; test_demos.py runs it with small models",
    "source .venv": "changes a shell",
    "python -m tokenizer.convert": "downloads a released file",
    "python -m tokenizer.encode": "reads ImageNet",
    "torchrun": "reads ImageNet's codes",
    "python -m evaluations.score --samples samples/gpt_b_256": "reads ADM's file",
    "pip install": "downloads packages",
    "python -m autoregressive.serve": "runs until it is stopped; test_serve_command.py starts it",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def shell_lines() -> list[str]:
    lines = "\n".join(blocks("sh")).splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def is_run(line: str) -> bool:
    return not line.startswith(tuple(NOT_RUN))


def test_every_line_that_is_not_run_is_still_in_the_readme():
    for start in NOT_RUN:
        assert any(line.startswith(start) for line in shell_lines()), start


@pytest.mark.slow
def test_commands_and_code_that_need_no_download_run_as_printed(tmp_path):
    demo = tmp_path / "runs" / "demo"
    tiny(num_classes=10, vocab_size=40, grid=(8, 8)).save_pretrained(demo / "gpt")
    small(channel_multipliers=(1, 1, 1), image_size=(32, 32)).save_pretrained(demo / "tokenizer")
    random = np.random.default_rng(0)
    for folder in ("digits/test/7", "samples"):
        (demo / folder).mkdir(parents=True)
        for i in range(4):
            pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(demo / folder / f"{i}.png")
    images = ("--images", demo / "samples", "--out", demo / "real.npz", "--image_size", "[32,32]")
    run_module("evaluations.reference", *images, "--metrics.extractor", "proxy")
    commands = [["-c", block] for block in blocks("python") if "openai" not in block]
    commands += [shlex.split(line, comments=True)[1:] for line in shell_lines() if is_run(line)]
    assert len(commands) >= 4
    here = {**environment(), "PYTHONPATH": str(ROOT)}
    for command in commands:
        words = [sys.executable, *command]
        done = subprocess.run(words, cwd=tmp_path, env=here, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
