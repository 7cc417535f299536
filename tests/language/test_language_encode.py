import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import kill_when, run_module
from PIL import Image

from core.config import InputError
from core.distributed.world import choose_device
from language.features import FeatureDataset
from language.text_encoder import load_text_encoder

CPU = ("--device", "cpu")
WORDS = ["a", "the", "red", "blue", "cat", "dog", "on", "mat", "in", "sun", "and", "run"]


@pytest.fixture
def pairs(tmp_path) -> Path:
    """60 images with captions; number 7 has none."""
    folder, draw = tmp_path / "pairs", random.Random(0)
    folder.mkdir()
    for i in range(60):
        Image.new("RGB", (20, 20), (i, 0, 0)).save(folder / f"{i:03d}.png")
        caption = " ".join(draw.choices(WORDS, k=draw.randint(2, 12)))
        if i != 7:
            (folder / f"{i:03d}.txt").write_text(f"{caption}. {caption}")
    return folder


def flags(t5: Path, pairs: Path, out: Path, *more: object) -> list[object]:
    run = ("--t5", t5, "--pairs.source", pairs, "--out", out, "--device", "cpu")
    return [*run, "--shard_size", 8, "--pairs.first_sentence", "true", "--max_tokens", 16, *more]


@pytest.mark.slow
def test_features_of_every_caption_and_variant_are_kept(tmp_path, tiny_t5, pairs):
    done = run_module("language.encode", *flags(tiny_t5, pairs, tmp_path / "out"))
    data = FeatureDataset(tmp_path / "out")
    assert data.variants == ("long", "first_sentence")
    assert data.ids.tolist() == [i for i in range(60) if i != 7]
    assert data.index["skipped_by_reason"] == {"no caption": 1}
    assert data.index["cut"] > 0
    assert "1 no caption" in done.stdout
    encoder = load_text_encoder(tiny_t5, choose_device("cpu"), torch.bfloat16, 16)
    ids, variants = np.array([59, 0, 8]), np.array([0, 1, 1])
    texts = [(pairs / f"{i:03d}.txt").read_text() for i in ids]
    texts = [t.split(". ")[0] + "." if v else t for t, v in zip(texts, variants, strict=True)]
    expected, lengths = encoder.encode(texts)
    found = data.batch(ids, variants)
    assert torch.equal(found[1], lengths)
    assert found[0].dtype == torch.bfloat16
    torch.testing.assert_close(found[0], expected, rtol=0.1, atol=0.1)
    with pytest.raises(InputError, match="no caption for some"):
        data.batch(np.array([7]), np.array([0]))


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_shards_bit_for_bit(tmp_path, tiny_t5, pairs):
    run_module("language.encode", *flags(tiny_t5, pairs, tmp_path / "whole"))
    killed = flags(tiny_t5, pairs, tmp_path / "killed")
    second_shard = tmp_path / "killed" / "shard_00001.json"
    kill_when(second_shard.exists, "language.encode", *killed)
    assert not (tmp_path / "killed" / "index.json").exists()
    run_module("language.encode", *killed, processes=2)
    for path in sorted((tmp_path / "whole").glob("*_*.npy")):
        assert path.read_bytes() == (tmp_path / "killed" / path.name).read_bytes(), path.name


@pytest.mark.slow
def test_another_encoder_does_not_go_on_in_the_same_folder(tmp_path, tiny_t5, pairs):
    run_module("language.encode", *flags(tiny_t5, pairs, tmp_path / "out"))
    more = ("--clean", "none")
    failed = run_module(
        "language.encode", *flags(tiny_t5, pairs, tmp_path / "out", *more), ok=False
    )
    assert failed.returncode == 2
    assert "other settings (clean)" in failed.stderr.splitlines()[-1]


def test_the_references_files_are_packed_into_shards(tmp_path):
    lines = [json.dumps({"image_path": f"{i}.jpg", "text": ["x"]}) for i in range(3)]
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "part0.jsonl").write_text("\n".join(lines))
    for i, tokens in enumerate((3, 5)):
        path = tmp_path / "old" / "part0" / f"{i:09d}.npy"
        path.parent.mkdir(exist_ok=True, parents=True)
        np.save(path, np.full((1, tokens, 4), i, np.float32))
    run = ("--reference_features", tmp_path / "old", "--pairs.source", tmp_path / "pairs")
    run_module("language.encode", *run, "--out", tmp_path / "new", "--max_tokens", 4, *CPU)
    data = FeatureDataset(tmp_path / "new")
    assert (data.dim, data.ids.tolist(), data.index["cut"]) == (4, [0, 1], 1)
    assert data.index["skipped_by_reason"] == {"no features": 1}
    features, lengths = data.batch(np.array([1, 0]), np.array([0, 0]))
    assert (features.shape, lengths.tolist()) == ((2, 4, 4), [4, 3])
    assert features[0].eq(1).all()
