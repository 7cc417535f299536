import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import kill_when, run_module
from helpers.models import tiny
from PIL import Image
from safetensors.torch import save_file

from autoregressive.conditions import sample_labels
from autoregressive.sample import SampleConfig, grid_ids
from core.config import save_config
from core.data.npz import save_npz
from core.data.shards import ShardReader
from tokenizer import VQConfig, VQModel


@pytest.fixture
def models(tmp_path: Path) -> list[object]:
    """A small decoder and tokenizer on disk -> the flags that name them."""
    torch.manual_seed(0)
    vq = VQModel(
        VQConfig(
            base_channels=32,
            channel_multipliers=(1, 1),
            num_res_blocks=1,
            z_channels=32,
            vocab_size=50,
        )
    )
    gpt = tiny(vocab_size=50)
    for name, model in (("vq", vq), ("gpt", gpt)):
        (tmp_path / name).mkdir()
        save_config(model.config, tmp_path / name / "config.yaml")
        save_file(model.state_dict(), tmp_path / name / "model.safetensors")
    flags = ("--gpt", tmp_path / "gpt", "--tokenizer", tmp_path / "vq", "--precision", "fp32")
    return [*flags, "--device", "cpu", "--num_images", 30, "--shard_size", 4, "--batch_size", 3]


def arrays(out: Path) -> dict[str, np.ndarray]:
    with np.load(out / "samples.npz", allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def codes(out: Path) -> np.ndarray:
    return ShardReader(out, "codes")[np.arange(30)]


@pytest.mark.slow
def test_batch_size_processes_and_a_kill_change_no_image(tmp_path, models):
    run_module("autoregressive.sample", *models, "--out", tmp_path / "one")
    more = ("--batch_size", 8, "--out", tmp_path / "two")
    run_module("autoregressive.sample", *models, *more, processes=2)
    killed = [*models, "--out", tmp_path / "killed"]
    second_shard = tmp_path / "killed" / "shard_00001.json"
    kill_when(second_shard.exists, "autoregressive.sample", *killed)
    assert not (tmp_path / "killed" / "index.json").exists()
    first = (tmp_path / "killed" / "pixels_00000.npy").stat().st_mtime_ns
    run_module("autoregressive.sample", *killed)
    assert (tmp_path / "killed" / "pixels_00000.npy").stat().st_mtime_ns == first
    one = arrays(tmp_path / "one")
    assert one["arr_0"].shape == (30, 8, 8, 3)
    assert one["arr_0"].dtype == np.uint8
    for name, array in arrays(tmp_path / "killed").items():
        assert np.array_equal(array, one[name]), name
    assert np.array_equal(codes(tmp_path / "two"), codes(tmp_path / "one"))
    # Another batch size may round a pixel the other way in the tokenizer's convolutions.
    assert np.abs(arrays(tmp_path / "two")["arr_0"].astype(int) - one["arr_0"]).max() <= 1


@pytest.mark.slow
def test_the_index_holds_labels_and_every_setting(tmp_path, models):
    more = ("--labels", "balanced", "--png", "true", "--resize", 16, "--out", tmp_path / "out")
    run_module("autoregressive.sample", *models, *more, "--sampling.top_k", 7)
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["image_labels"] == [i % 5 for i in range(30)]
    assert index["count"] == 30
    assert index["sampling"]["top_k"] == 7
    assert len(index["gpt_sha256"]) == len(index["tokenizer_sha256"]) == 64
    assert len(list((tmp_path / "out" / "png").glob("*.png"))) == 30
    first = np.asarray(Image.open(tmp_path / "out" / "png" / "000000.png"))
    assert np.array_equal(first, arrays(tmp_path / "out")["arr_0"][0])
    assert first.shape == (16, 16, 3)
    assert (tmp_path / "out" / "samples.png").exists()


def scores(folder: Path) -> dict[str, float]:
    found = json.loads((folder / "scores.json").read_text())
    return {k: v for k, v in found.items() if k.startswith("proxy") or k == "n"}


LOOK = ("--detector", "proxy", "--batch_size", 7, "--device", "cpu")


@pytest.fixture
def judge(tmp_path: Path) -> tuple[object, ...]:
    """A reference of random pictures -> the flags that name it."""
    real = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    save_npz(tmp_path / "real.npz", 40, [real])
    made = ("--images", tmp_path / "real.npz", "--out", tmp_path / "reference.npz")
    run_module("evaluations.reference", *made, *LOOK)
    flags = ("--judge.reference", tmp_path / "reference.npz", "--judge.detector", "proxy")
    return (*flags, "--judge.batch_size", 7)


@pytest.mark.slow
def test_images_scored_as_they_are_sampled_equal_those_of_the_npz(tmp_path, models, judge):
    """And no picture is written but the grid; a second run scores the codes of the first."""
    stream = tmp_path / "stream"
    run_module("autoregressive.sample", *models, "--out", stream, "--npz", "false", *judge)
    written = {path.name for path in stream.rglob("*") if path.suffix in (".png", ".npz")}
    assert written == {"samples.png"}
    assert not list(stream.glob("pixels*"))
    run_module("autoregressive.sample", *models, "--out", tmp_path / "file")
    run = ("--samples", tmp_path / "file", "--reference", tmp_path / "reference.npz")
    run_module("evaluations.score", *run, *LOOK, "--out", tmp_path / "scored")
    expected = scores(tmp_path / "scored")
    assert scores(stream) == expected
    assert expected["n"] == 30
    (stream / "shard_00001.json").unlink()
    run_module("autoregressive.sample", *models, "--out", stream, "--npz", "false", *judge)
    assert scores(stream) == expected


@pytest.mark.slow
def test_a_search_scores_every_guidance_once_and_names_the_best(tmp_path, models, judge):
    flags = [*models[:6], "--device", "cpu", "--num_images", 12, *judge, "--out", tmp_path / "out"]
    flags += ["--schedules", "[constant,cosine]", "--powers", "[1,2]"]
    run_module("autoregressive.tune_guidance", *flags, "--scales", "[1.5]")
    first = json.loads((tmp_path / "out" / "search.json").read_text())["rows"]
    assert [row["run"] for row in first] == ["constant 1 1.5", "cosine 1 1.5", "cosine 2 1.5"]
    said = run_module("autoregressive.tune_guidance", *flags, "--scales", "[1.5,3]").stdout
    rows = json.loads((tmp_path / "out" / "search.json").read_text())["rows"]
    assert rows[:3] == first
    assert len(rows) == 6
    best = min(rows, key=lambda row: row["proxy_fd"])
    assert f"--sampling.cfg_scale {best['cfg_scale']}" in said
    assert (tmp_path / "out" / "search.png").exists()
    other = run_module("autoregressive.tune_guidance", *flags, "--labels", "balanced", ok=False)
    assert other.returncode == 2
    assert "choose another folder" in other.stderr


@pytest.mark.slow
def test_lower_precision_says_what_it_changes_and_guessing_ahead_changes_nothing(tmp_path, models):
    plain = run_module("autoregressive.sample", *models, "--out", tmp_path / "plain")
    assert "Prepacked linears; not compiled" in plain.stdout
    ahead = ("--sampling.speculative", 4, "--out", tmp_path / "ahead")
    assert "codes a step" in run_module("autoregressive.sample", *models, *ahead).stdout
    assert np.array_equal(codes(tmp_path / "ahead"), codes(tmp_path / "plain"))
    low = ("--precision", "int8", "--cache_precision", "int8", "--out", tmp_path / "low")
    assert "nats (KL)" in run_module("autoregressive.sample", *models, *low).stdout
    settings = json.loads((tmp_path / "low" / "index.json").read_text())
    assert settings["precision"] == ["int8", "int8", "fp32"]
    failed = run_module("autoregressive.sample", *models, "--precision", "fp8", *low[2:], ok=False)
    assert failed.returncode == 2


@pytest.mark.slow
def test_what_does_not_fit_together_is_refused_in_one_line(tmp_path, models):
    run_module("autoregressive.sample", *models, "--out", tmp_path / "out")
    wrong = [
        (["--out", tmp_path / "out", "--sampling.seed", 1], "other settings (sampling)"),
        (["--out", tmp_path / "new", "--classes", "[7]"], "7 is not in 0 .. 4"),
        (["--out", tmp_path / "new", "--sampling.cfg_scale", 0.5], "cfg_scale"),
        (["--out", tmp_path / "new", "--tokenizer", tmp_path / "gpt"], "config.yaml"),
    ]
    for more, message in wrong:
        failed = run_module("autoregressive.sample", *models, *more, ok=False)
        assert failed.returncode == 2
        assert message in failed.stderr.splitlines()[-1]
        assert not (tmp_path / "new").exists()


def test_labels_are_drawn_by_image_number():
    config = SampleConfig(gpt="gpt", tokenizer="vq", out=Path("out"), num_images=5000)
    labels = sample_labels(config, 10, seed=0)
    assert np.bincount(labels, minlength=10).min() > 400
    fewer = SampleConfig(gpt="gpt", tokenizer="vq", out=Path("out"), num_images=50)
    assert np.array_equal(sample_labels(fewer, 10, seed=0), labels[:50])
    chosen = SampleConfig(gpt="gpt", tokenizer="vq", out=Path("out"), num_images=5, classes=(3, 1))
    assert sample_labels(chosen, 10, seed=0).tolist() == [3, 1, 3, 1, 3]


def test_the_grid_has_a_row_per_class():
    labels = np.arange(100) % 4
    assert labels[grid_ids(labels, rows=3, columns=5)].tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert grid_ids(np.arange(6), rows=2, columns=2).tolist() == [0, 1, 2, 3]
