import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import run_module
from helpers.models import small
from helpers.paths import SHARED_DATA
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms.functional import hflip

from core.config import parse_config, save_config
from core.data.images import center_crop, image_to_pixels, load_image, pixels_to_images
from core.data.shards import ShardReader
from tokenizer.crops import Crops
from tokenizer.encode import EncodeConfig, encode
from tokenizer.reconstruction import reconstruct
from tokenizer.reconstruction_config import ReconstructionConfig


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    vq = small()
    folder = tmp_path / "vq"
    folder.mkdir()
    save_config(vq.config, folder / "config.yaml")
    save_file(vq.state_dict(), folder / "model.safetensors")
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Colour, grey, tiny and wide images in two classes, a truncated one and a text file."""
    random, folder = np.random.default_rng(0), tmp_path / "images"
    for i, shape in enumerate([(30, 40, 3), (50, 20), (5, 6, 3), (16, 90, 3), (1, 1, 3), (40, 40)]):
        path = folder / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(path)
    jpeg = folder / "a" / "truncated.jpg"
    Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(jpeg)
    jpeg.write_bytes(jpeg.read_bytes()[:600])
    (folder / "b" / "text.jpg").write_text("no image")
    return folder


def flags(tokenizer: Path, images: Path, out: Path, *more: object) -> list[object]:
    common = ("--tokenizer", tokenizer, "--data", images, "--out", out, "--device", "cpu")
    return [*common, "--image_size", "[16,12]", "--shard_size", 3, "--num_workers", 0, *more]


def codes(out: Path) -> np.ndarray:
    reader = ShardReader(out, "codes")
    return reader[np.arange(len(reader))]


def test_ten_crops_are_the_corners_the_centre_and_their_flips():
    pixels = np.random.default_rng(0).integers(0, 256, (33, 44, 3), dtype=np.uint8)
    crops = Crops(16, 12, (1.25,), flip=False)(Image.fromarray(pixels))
    assert crops.shape == (10, 16, 12, 3)
    covered = center_crop(Image.fromarray(pixels), 20, 15)
    whole = image_to_pixels(covered)
    assert np.array_equal(crops[0], whole[:16, :12])
    assert np.array_equal(crops[3], whole[4:, 3:])
    assert np.array_equal(crops[4], whole[2:18, 2:14])
    assert np.array_equal(crops[9], image_to_pixels(hflip(covered))[2:18, 2:14])


@pytest.mark.slow
def test_codes_and_index_say_what_was_encoded(tmp_path, tokenizer, images):
    more = ("--crop", "ten", "--crop_ranges", "[1.1,1.05]")
    run_module("tokenizer.encode", *flags(tokenizer, images, tmp_path / "out", *more))
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["images"] == 8
    assert index["count"] == 6
    assert index["skipped_by_reason"] == {"damaged image": 1, "not an image": 1}
    assert (index["grid"], index["crops"], index["classes"]) == ([8, 6], 20, ["a", "b"])
    assert index["vocab_size"] == 40
    assert "truncated.jpg" in (tmp_path / "out" / "skipped.txt").read_text()
    found = codes(tmp_path / "out")
    assert found.shape == (6, 20, 48)
    assert found.dtype == np.uint16
    labels = ShardReader(tmp_path / "out", "labels")
    assert labels[np.arange(6)].tolist() == [0, 0, 0, 1, 1, 1]
    vq = small()
    crop = Crops(16, 12, (1.1, 1.05), flip=False)(load_image(images / "a" / "0.png"))
    with torch.no_grad():
        expected = vq.encode(pixels_to_images(torch.from_numpy(crop))).flatten(1)
    assert (found[0] == expected.numpy()).mean() > 0.99


@pytest.mark.parametrize(("asked", "size"), [((), (16, 12)), ((12, 16), (12, 16))])
def test_images_have_the_size_of_the_tokenizer_s_training_by_default(
    tmp_path, images, world, capsys, asked, size
):
    small(image_size=(16, 12)).save_pretrained(tmp_path / "vq")
    paths = ["--tokenizer", str(tmp_path / "vq"), "--data", str(images), "--device", "cpu"]
    paths += ["--num_workers", "0"]
    if asked:
        paths += ["--image_size", *map(str, asked)]
    encode(parse_config(EncodeConfig, [*paths, "--out", str(tmp_path / "codes")]), world)
    remark = "the tokenizer was trained at 16 x 12"
    assert (remark in capsys.readouterr().out) == bool(asked)
    index = json.loads((tmp_path / "codes" / "index.json").read_text())
    assert tuple(index["image_size"]) == size
    reconstruct(parse_config(ReconstructionConfig, [*paths, "--out", str(tmp_path / "r")]), world)
    scores = json.loads((tmp_path / "r" / "scores.json").read_text())
    assert tuple(scores["settings"]["image_size"]) == size


@pytest.mark.slow
def test_a_killed_run_keeps_its_finished_shards(tmp_path, tokenizer, images):
    run = flags(tokenizer, images, tmp_path / "out", "--flip", "true")
    run_module("tokenizer.encode", *run)
    whole = codes(tmp_path / "out")
    assert whole.shape == (6, 2, 48)
    # As a kill would leave it: the last shard unfinished, no index.
    (tmp_path / "out" / "index.json").unlink()
    (tmp_path / "out" / "shard_00002.json").unlink()
    first = (tmp_path / "out" / "codes_00000.npy").stat().st_mtime_ns
    run_module("tokenizer.encode", *run)
    assert (tmp_path / "out" / "codes_00000.npy").stat().st_mtime_ns == first
    assert np.array_equal(codes(tmp_path / "out"), whole)
    failed = run_module("tokenizer.encode", *run, "--image_size", "[16,16]", ok=False)
    assert failed.returncode == 2
    assert "other settings" in failed.stderr


@pytest.mark.slow
def test_two_processes_encode_every_image_once(tmp_path, tokenizer, images):
    run_module("tokenizer.encode", *flags(tokenizer, images, tmp_path / "one"))
    run_module("tokenizer.encode", *flags(tokenizer, images, tmp_path / "two"), processes=2)
    assert np.array_equal(codes(tmp_path / "one"), codes(tmp_path / "two"))
    images = ShardReader(tmp_path / "two", "images")
    assert len(set(images[np.arange(6)].tolist())) == 6


@pytest.mark.slow
def test_reconstruction_scores_are_written_with_a_image(tmp_path, tokenizer, images):
    out = tmp_path / "scores"
    run = flags(tokenizer, images, out)
    position = run.index("--shard_size")
    del run[position : position + 2]
    rfid = ("--rfid", "true", "--metrics.extractor", "proxy", "--metrics.batch_size", 4)
    run_module("tokenizer.reconstruct", *run, *rfid)
    scores = json.loads((out / "scores.json").read_text())
    assert scores["n"] == 6
    assert len(scores["skipped"]) == 2
    assert {"psnr", "ssim", "ssim_reference_inflated", "codebook_usage", "perplexity"} <= set(
        scores
    )
    assert scores["proxy_fd"] > 0
    assert not {"fid", "rfid"} & set(scores)
    assert (out / "reconstructions.png").exists()
    failed = run_module("tokenizer.reconstruct", *run, "--image_size", "[15,16]", ok=False)
    assert failed.returncode == 2


@pytest.mark.slow
def test_real_photographs_are_read_whatever_their_mode_and_size():
    folder = SHARED_DATA / "imagenet_sample"
    if not folder.is_dir():
        pytest.skip("the photographs are not here")
    for path in sorted(folder.rglob("*.JPEG")):
        assert center_crop(load_image(path), 256, 256).size == (256, 256), path
