"""The README's commands on the demo's outputs run as printed, without a download."""

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


def demo_commands() -> list[str]:
    """The commands of the README's first section that read what `make demo` made."""
    start = README[README.index("## Start") : README.index("## ImageNet")]
    return re.findall(r"^python -m .*$", start, re.MULTILINE)


@pytest.mark.slow
def test_the_commands_on_the_demo_s_outputs_run_as_printed(tmp_path):
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
    commands = demo_commands()
    assert len(commands) >= 3
    here = {**environment(), "PYTHONPATH": str(ROOT)}
    for command in commands:
        words = [sys.executable, *shlex.split(command)[1:]]
        done = subprocess.run(words, cwd=tmp_path, env=here, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
