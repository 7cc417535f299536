"""A folder of codes is continued with the same images and the same tokenizer only."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.models import small, tiny
from PIL import Image
from safetensors.torch import save_file

from autoregressive.data.codes import CodeDataset
from autoregressive.data.config import DataConfig
from autoregressive.models.gpt import GPT
from autoregressive.sampling.pipeline import check_compatible
from core.config import InputError, save_config
from tokenizer.encode import EncodeConfig, encode
from tokenizer.models.pretrained import load_tokenizer


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A folder with a tokenizer's weights and configuration."""
    (tmp_path / "vq").mkdir()
    save_config(small().config, tmp_path / "vq" / "config.yaml")
    save_file(small().state_dict(), tmp_path / "vq" / "model.safetensors")
    return tmp_path / "vq"


@pytest.fixture
def converted(tmp_path: Path, tokenizer: Path) -> Path:
    """The same weights in another file."""
    (tmp_path / "converted").mkdir()
    save_config(small().config, tmp_path / "converted" / "config.yaml")
    state = small().state_dict()
    save_file(state, tmp_path / "converted" / "model.safetensors", {"from": "elsewhere"})
    return tmp_path / "converted"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for i in range(4):
        pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder.parent


def config(tokenizer: Path, images: Path, out: Path) -> EncodeConfig:
    sizes = {"image_size": (8, 8), "shard_size": 2, "num_workers": 0}
    return EncodeConfig(str(tokenizer), out, images, device="cpu", **sizes)


def kill_before_the_end(out: Path) -> None:
    (out / "index.json").unlink()
    (out / "shard_00001.json").unlink()


def test_images_replaced_between_a_kill_and_its_continuation_are_noticed(
    tmp_path, world, tokenizer, images
):
    run = config(tokenizer, images, tmp_path / "out")
    encode(run, world)
    kill_before_the_end(run.out)
    encode(run, world)
    kill_before_the_end(run.out)
    other = images / "a" / "3.png"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(other)
    with pytest.raises(InputError, match=r"other settings \(images_fingerprint\)"):
        encode(run, world)
    assert not (run.out / "index.json").exists()


def test_an_image_that_was_only_touched_is_noticed(tmp_path, world, tokenizer, images):
    run = config(tokenizer, images, tmp_path / "out")
    encode(run, world)
    os.utime(images / "a" / "0.png", ns=(1, 1))
    with pytest.raises(InputError, match="images_fingerprint"):
        encode(run, world)


def test_a_folder_of_an_older_version_continues(tmp_path, world, tokenizer, images):
    run = config(tokenizer, images, tmp_path / "out")
    encode(run, world)
    kill_before_the_end(run.out)
    path = run.out / "settings.json"
    settings = json.loads(path.read_text())
    identity = settings["tokenizer_sha256"]
    del settings["images_fingerprint"]
    settings["tokenizer_sha256"] = load_tokenizer(tokenizer).sha256  # of the file
    path.write_text(json.dumps(settings))
    encode(run, world)
    index = json.loads((run.out / "index.json").read_text())
    assert index["tokenizer_sha256"] == identity
    assert index["tokenizer_file_sha256"] == settings["tokenizer_sha256"]


def test_a_converted_tokenizer_is_the_same_tokenizer(tmp_path, world, tokenizer, converted, images):
    encode(config(tokenizer, images, tmp_path / "out"), world)
    codes = CodeDataset(DataConfig(codes=(tmp_path / "out",)))
    original, same = load_tokenizer(tokenizer), load_tokenizer(converted)
    assert original.sha256 != same.sha256
    assert original.identity() == same.identity() == codes.tokenizer_sha256

    def gpt(sha256: str) -> GPT:
        return tiny(vocab_size=40, tokenizer_sha256=sha256)

    check_compatible(gpt(codes.tokenizer_sha256), same, "converted")
    check_compatible(gpt(original.sha256), original, "a GPT of an older version")
    with torch.no_grad():
        same.vq.quantize.embedding.weight[0] += 1
    with pytest.raises(InputError, match="differ from the tokenizer that the GPT was trained with"):
        check_compatible(gpt(codes.tokenizer_sha256), same, "other weights")


def test_codes_of_an_older_version_fit_those_of_the_same_tokenizer(
    tmp_path, world, tokenizer, images
):
    for name in ("new", "old"):
        encode(config(tokenizer, images, tmp_path / name), world)
    path = tmp_path / "old" / "index.json"
    index = json.loads(path.read_text())
    index["tokenizer_sha256"] = index.pop("tokenizer_file_sha256")
    path.write_text(json.dumps(index))
    assert len(CodeDataset(DataConfig(codes=(tmp_path / "new", tmp_path / "old")))) == 4
    index["tokenizer_sha256"] = "1" * 64
    path.write_text(json.dumps(index))
    with pytest.raises(InputError, match="tokenizer_sha256 differs"):
        CodeDataset(DataConfig(codes=(tmp_path / "new", tmp_path / "old")))
