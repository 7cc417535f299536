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

from autoregressive.data.codes import CodeDataset, tokenizer_names
from autoregressive.data.config import DataConfig
from autoregressive.models.gpt import GPT
from autoregressive.sampling.pipeline import check_compatible
from core.config import InputError, save_config
from core.files import file_sha256, fingerprint_of_files
from tokenizer.convert import ConvertConfig, convert
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


def test_images_that_were_only_touched_or_copied_are_the_same_with_one_warning(
    tmp_path, world, tokenizer, images, caplog
):
    run = config(tokenizer, images, tmp_path / "out")
    encode(run, world)
    kill_before_the_end(run.out)
    encode(run, world)
    assert "times" not in caplog.text
    kill_before_the_end(run.out)
    os.utime(images / "a" / "0.png", ns=(1, 1))
    encode(run, world)
    assert (run.out / "index.json").exists()
    assert caplog.text.count("the times of the images' files have changed") == 1


def test_an_image_beyond_the_sampled_ones_is_noticed_by_its_time(
    tmp_path, world, tokenizer, images, caplog, monkeypatch
):
    monkeypatch.setattr("core.files.SAMPLED_FILES", 1)  # the first alone
    run = config(tokenizer, images, tmp_path / "out")
    encode(run, world)
    kill_before_the_end(run.out)
    path = images / "a" / "2.png"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    encode(run, world)
    assert "the times of the images' files have changed" in caplog.text


def test_an_image_of_the_same_name_and_size_but_other_content_is_noticed(
    tmp_path, world, tokenizer, images
):
    run = config(tokenizer, images, tmp_path / "out")
    encode(run, world)
    path = images / "a" / "2.png"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match="images_fingerprint"):
        encode(run, world)


def test_a_folder_of_an_older_version_continues(tmp_path, world, tokenizer, images):
    run = config(tokenizer, images, tmp_path / "out")
    encode(run, world)
    kill_before_the_end(run.out)
    path = run.out / "settings.json"
    settings = json.loads(path.read_text())
    identity = settings["tokenizer_sha256"]
    times = fingerprint_of_files(sorted((images / "a").iterdir())).times
    settings["images_fingerprint"] = times
    settings["tokenizer_sha256"] = load_tokenizer(tokenizer).sha256  # of the file
    path.write_text(json.dumps(settings))
    encode(run, world)
    del settings["images_fingerprint"]  # before, the images were not looked at
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


def test_what_knows_a_released_tokenizer_by_its_file_takes_the_converted_one(
    tmp_path, world, images, capsys
):
    released = tmp_path / "vq.pt"
    torch.save({"model": small().state_dict()}, released)
    out = tmp_path / "folder"
    convert(ConvertConfig(source=str(released), out=out))
    known = file_sha256(released)
    same = load_tokenizer(out)
    assert same.sha256 != known
    check_compatible(tiny(vocab_size=40, tokenizer_sha256=known), same, "converted")
    encode(config(released, images, tmp_path / "old"), world)
    encode(config(out, images, tmp_path / "new"), world)
    path = tmp_path / "old" / "index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, "tokenizer_sha256": known}))
    assert len(CodeDataset(DataConfig(codes=(tmp_path / "new", tmp_path / "old")))) == 4
    new = json.loads((tmp_path / "new" / "index.json").read_text())
    assert known in tokenizer_names(new)
    # Other weights of the same file are not the weights that the file is known for.
    both = {"model": small().state_dict(), "ema": small().state_dict()}
    torch.save(both, released)
    convert(ConvertConfig(source=str(released), out=tmp_path / "live", weights="model"))
    assert load_tokenizer(tmp_path / "live").source_sha256 is None
    capsys.readouterr()
