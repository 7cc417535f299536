"""Sampling again into a folder: what is missing is made, what does not fit is refused."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.models import tiny, write_models

from autoregressive import generate
from autoregressive import sample as sample_command
from autoregressive.inference.sampling_config import ComputeConfig, SamplingConfig
from autoregressive.sample import SampleConfig, sample
from core.config import InputError
from core.lock import writer_lock
from evaluations.image_source import open_image_source


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    gpt, vq = write_models(tmp_path_factory.mktemp("models"), tiny(vocab_size=50))
    return {"gpt": str(gpt), "tokenizer": str(vq)}


def settings(models: dict[str, str], out: Path, **changes: object) -> SampleConfig:
    run = {"compute": ComputeConfig(precision="fp32", device="cpu"), "num_images": 6}
    return SampleConfig(**{**models, "out": out, **run, "shard_size": 4, **changes})


def pngs(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / "png").glob("*.png")}


def test_png_files_can_be_asked_for_in_a_finished_folder(tmp_path, models, world):
    sample(settings(models, tmp_path / "at_once", png=True), world)
    expected = pngs(tmp_path / "at_once")
    assert len(expected) == 6
    out = tmp_path / "later"
    sample(settings(models, out), world)
    sample(settings(models, out, png=True), world)
    assert pngs(out) == expected
    (out / "png" / "000005.png").unlink()
    kept = (out / "png" / "000000.png").stat().st_mtime_ns
    sample(settings(models, out, png=True), world)
    assert pngs(out) == expected
    assert (out / "png" / "000000.png").stat().st_mtime_ns == kept


def test_an_npz_of_other_samples_is_refused(tmp_path, models, world):
    for name, count in (("six", 6), ("five", 5)):
        sample(settings(models, tmp_path / name, num_images=count), world)
    assert open_image_source(tmp_path / "six", (8, 8)).count == 6
    shutil.copy(tmp_path / "five" / "samples.npz", tmp_path / "six" / "samples.npz")
    with pytest.raises(InputError, match=r"samples\.npz: not the images of the index\.json"):
        open_image_source(tmp_path / "six", (8, 8))
    shutil.copy(tmp_path / "five" / "index.json", tmp_path / "six" / "index.json")
    assert open_image_source(tmp_path / "six", (8, 8)).count == 5


def test_an_npz_with_other_labels_is_refused(tmp_path, models, world):
    sample(settings(models, tmp_path), world)
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as file:
        images, labels = file["arr_0"], file["arr_1"]
    np.savez(tmp_path / "samples.npz", arr_0=images, arr_1=(labels + 1) % 5)
    with pytest.raises(InputError, match="not the images of"):
        open_image_source(tmp_path, (8, 8))


def test_a_damaged_shard_is_sampled_again(tmp_path, models, world):
    sample(settings(models, tmp_path), world)
    before = (tmp_path / "codes_00001.npy").read_bytes()
    (tmp_path / "codes_00001.npy").write_bytes(before[:-2])
    sample(settings(models, tmp_path), world)
    assert (tmp_path / "codes_00001.npy").read_bytes() == before


def test_a_grid_that_contradicts_the_folder_of_the_gpt_is_refused(tmp_path, models, world):
    sample(settings(models, tmp_path / "same", grid=(4, 4)), world)
    with pytest.raises(InputError, match=r"has a grid of \(4, 4\) codes, not \(2, 8\)"):
        sample(settings(models, tmp_path / "other", grid=(2, 8)), world)
    assert not (tmp_path / "other").exists()


def test_guidance_that_would_never_start_is_refused(tmp_path, models, world):
    never = SamplingConfig(cfg_start=16)
    with pytest.raises(InputError, match="cfg_start is 16, but an image has 16 codes"):
        sample(settings(models, tmp_path / "other", sampling=never), world)
    assert not (tmp_path / "other").exists()
    with pytest.raises(InputError, match="give at most 15"):
        generate(tiny(), torch.tensor([1]), cfg_scale=3.0, cfg_start=16)


def test_a_second_command_in_the_same_folder_is_refused(tmp_path, models, monkeypatch):
    out = tmp_path / "out"
    command = ["sample", "--gpt", models["gpt"], "--tokenizer", models["tokenizer"], "--out", out]
    monkeypatch.setattr(sys, "argv", [*map(str, command), "--compute.device", "cpu"])
    with writer_lock(out):
        with pytest.raises(InputError, match="has been writing here since"):
            sample_command.main()
        assert [path.name for path in out.iterdir()] == [".lock"]
