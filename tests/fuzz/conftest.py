"""The inputs that the fuzz tests damage: one of every kind that a command reads, all tiny."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.codes import write_codes, write_features
from helpers.fuzz import COUNTS, SLOWEST, STARTED, peak_bytes, refused
from helpers.images import jpeg, write_tar
from helpers.models import tiny, write_models


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training curves take longer to draw than a tiny model to train, and show no input."""
    monkeypatch.setattr("core.training.run.draw_curves", lambda *_: None)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory, tiny_t5: Path) -> Path:
    folder = tmp_path_factory.mktemp("site")
    gpt = tiny()
    write_models(folder, gpt)
    # Released files do not tell the number of heads: one for a width of 64.
    released = {"model": tiny(dim=64, num_heads=1).state_dict(), "args": argparse.Namespace(a=1)}
    torch.save(released, folder / "gpt.pt")
    for name in ("a", "b"):
        (folder / "images" / name).mkdir(parents=True)
        for i in range(3):
            (folder / "images" / name / f"{i}.jpg").write_bytes(jpeg(20, i))
    (folder / "list.txt").write_text("images/a/0.jpg\t0\nimages/b/1.jpg\t1\nimages/a/2.jpg\t1\n")
    (folder / "tars").mkdir()
    pairs = {f"{i}.{end}": jpeg(20, i) for i in range(3) for end in ("jpg",)}
    pairs |= {f"{i}.txt": b"a red cat" for i in range(3)}
    write_tar(folder / "tars" / "0.tar", dict(sorted(pairs.items())))
    (folder / "jsonl").mkdir()
    lines = [{"image_path": f"../images/a/{i}.jpg", "text": ["x", "a blue dog"]} for i in range(3)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "jsonl" / "000.jsonl").write_text(text)
    (folder / "captioned").mkdir()
    captions = ("a red cat", "a blue dog", "a red dog", "a blue cat", "the dog", "the cat")
    for i, caption in enumerate(captions):
        (folder / "captioned" / f"{i}.jpg").write_bytes(jpeg(20, i))
        (folder / "captioned" / f"{i}.txt").write_text(caption)
    write_codes(folder / "codes")
    write_features(folder / "features")
    (folder / "t5").symlink_to(tiny_t5)
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "samples.npz", arr_0=pixels, arr_1=np.arange(12) % 3)
    reference = ("--metrics.extractor", "proxy", "--image_size", "[8,8]", "--num_workers", 0)
    made = ("--images", folder / "samples.npz", "--out", folder / "ref.npz", *reference)
    assert not refused("evaluations.reference", *made)
    (folder / "prompts.txt").write_text("a cat\na dog\n")
    sample = ("--gpt", folder / "gpt", "--tokenizer", folder / "vq", "--num_images", 6)
    cpu = ("--compute.device", "cpu", "--compute.precision", "fp32")
    assert not refused("autoregressive.sample", *sample, "--out", folder / "run", *cpu)
    return folder


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    total = sum(COUNTS.values())
    if total:
        terminalreporter.write_line(
            f"fuzz: {total} examples, {COUNTS['refused']} refused in one line, "
            f"{COUNTS['accepted']} accepted, no other exception but in the failures above; "
            f"programs started: {', '.join(sorted(STARTED)) or 'none'}; "
            f"peak memory {peak_bytes() / 1e9:.2f} GB; slowest example {SLOWEST[0]:.1f} s"
        )
