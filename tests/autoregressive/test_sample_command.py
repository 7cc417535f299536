import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from helpers.commands import kill_when, run_module
from helpers.models import tiny, write_models
from PIL import Image

from autoregressive.inference.compute import ComputeConfig
from autoregressive.inference.sampling_config import SamplingConfig
from autoregressive.sample import SampleConfig
from autoregressive.sampling.conditions import ConditionConfig, image_grid_ids, sample_labels
from autoregressive.sampling.run import sample
from autoregressive.tune_guidance import TuneConfig, tune_guidance
from core.config import InputError, parse_config
from core.data.npz import save_npz
from core.data.shards import ShardReader
from evaluations.features.extractors import ExtractorConfig
from evaluations.reference import ReferenceConfig, build_reference
from evaluations.score import ScoreConfig, score_samples
from evaluations.scorer import MetricsConfig

COMPUTE = ComputeConfig(precision="fp32", device="cpu")
BALANCED = ConditionConfig(labels="balanced")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """A small GPT and tokenizer on disk -> the two fields that name them."""
    gpt, vq = write_models(tmp_path_factory.mktemp("models"), tiny(vocab_size=50))
    return {"gpt": str(gpt), "tokenizer": str(vq)}


def settings(models: dict[str, str], out: Path, **changes: object) -> SampleConfig:
    run = {"compute": COMPUTE, "num_images": 30, "shard_size": 4, "batch_size": 3}
    return SampleConfig(**{**models, "out": out, **run, **changes})


def flags(config: SampleConfig) -> list[object]:
    """The command line that parses into `config`."""
    run = ("--gpt", config.gpt, "--tokenizer", config.tokenizer, "--out", config.out)
    sizes = ("--num_images", 30, "--shard_size", 4, "--batch_size", config.batch_size)
    found = [*run, *sizes, "--compute.precision", "fp32", "--compute.device", "cpu"]
    assert parse_config(SampleConfig, list(map(str, found))) == config
    return found


def arrays(out: Path) -> dict[str, np.ndarray]:
    with np.load(out / "samples.npz", allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def codes(out: Path) -> np.ndarray:
    return ShardReader(out, "codes")[np.arange(30)]


@pytest.mark.slow
def test_batch_size_processes_and_a_kill_change_no_image(tmp_path, models, world):
    sample(settings(models, tmp_path / "one"), world)
    two = settings(models, tmp_path / "two", batch_size=8)
    run_module("autoregressive.sample", *flags(two), processes=2)
    killed = settings(models, tmp_path / "killed")
    second_shard = killed.out / "shard_00001.json"
    kill_when(second_shard.exists, "autoregressive.sample", *flags(killed))
    assert not (killed.out / "index.json").exists()
    first = (killed.out / "pixels_00000.npy").stat().st_mtime_ns
    sample(killed, world)
    assert (killed.out / "pixels_00000.npy").stat().st_mtime_ns == first
    one = arrays(tmp_path / "one")
    assert one["arr_0"].shape == (30, 8, 8, 3)
    assert one["arr_0"].dtype == np.uint8
    for name, array in arrays(killed.out).items():
        assert np.array_equal(array, one[name]), name
    assert np.array_equal(codes(two.out), codes(tmp_path / "one"))
    # Another batch size may round a pixel differently in the tokenizer's convolutions.
    assert np.abs(arrays(two.out)["arr_0"].astype(int) - one["arr_0"]).max() <= 1


def test_the_index_holds_labels_and_every_setting(tmp_path, models, world):
    out = tmp_path / "out"
    more = {"conditions": BALANCED, "png": True, "resize": 16, "sampling": SamplingConfig(top_k=7)}
    sample(settings(models, out, **more), world)
    index = json.loads((out / "index.json").read_text())
    assert index["image_labels"] == [i % 5 for i in range(30)]
    assert index["count"] == 30
    assert index["sampling"]["top_k"] == 7
    assert len(index["gpt_sha256"]) == len(index["tokenizer_sha256"]) == 64
    assert len(list((out / "png").glob("*.png"))) == 30
    first = np.asarray(Image.open(out / "png" / "000000.png"))
    assert np.array_equal(first, arrays(out)["arr_0"][0])
    assert first.shape == (16, 16, 3)
    assert (out / "samples.png").exists()


def test_settings_json_has_the_keys_and_values_of_folders_that_older_versions_began(
    tmp_path, models, world
):
    sample(settings(models, tmp_path, num_images=4), world)
    found = json.loads((tmp_path / "settings.json").read_text())
    del found["gpt_sha256"], found["tokenizer_sha256"], found["sampling"]
    assert found == {
        **models,
        "precision": ["fp32", "model", "fp32"],
        "grid": [4, 4],
        "resize": 0,
        "npz": True,
        "labels": "random",
        "classes": [],
        "items": 4,
        "shard_size": 4,
    }


def scores(folder: Path) -> dict[str, float]:
    found = json.loads((folder / "scores.json").read_text())
    return {k: v for k, v in found.items() if k.startswith("proxy") or k == "n"}


@pytest.fixture
def metrics(tmp_path, world) -> MetricsConfig:
    """A reference of random images."""
    real = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    save_npz(tmp_path / "real.npz", 40, [real])
    path = tmp_path / "reference.npz"
    made = ReferenceConfig(
        images=tmp_path / "real.npz",
        out=path,
        metrics=ExtractorConfig(extractor="proxy"),
        device="cpu",
    )
    build_reference(made, world)
    return MetricsConfig(reference=path, extractor="proxy", batch_size=7)


def test_images_scored_while_they_are_sampled_get_the_scores_of_the_npz(
    tmp_path, models, metrics, world
):
    """Nothing is written but the image grid; a second run scores the codes of the first."""
    stream = settings(models, tmp_path / "stream", npz=False, metrics=metrics)
    sample(stream, world)
    written = {path.name for path in stream.out.rglob("*") if path.suffix in (".png", ".npz")}
    assert written == {"samples.png"}
    assert not list(stream.out.glob("pixels*"))
    sample(settings(models, tmp_path / "file"), world)
    of_file = ScoreConfig(
        samples=tmp_path / "file", out=tmp_path / "scored", metrics=metrics, device="cpu"
    )
    score_samples(of_file, world)
    expected = scores(tmp_path / "scored")
    assert scores(stream.out) == expected
    assert expected["n"] == 30
    (stream.out / "shard_00001.json").unlink()
    sample(stream, world)
    assert scores(stream.out) == expected
    one = settings(models, tmp_path / "one", metrics=metrics, num_images=1)
    with pytest.raises(InputError, match="scores need at least 2 images, there are 1"):
        sample(one, world)


def test_a_search_scores_every_guidance_once_and_names_the_best(
    tmp_path, models, metrics, world, capsys
):
    config = TuneConfig(
        **models,
        out=tmp_path / "out",
        compute=COMPUTE,
        num_images=12,
        metrics=metrics,
        schedules=("constant", "cosine"),
        powers=(1.0, 2.0),
        scales=(1.5,),
    )
    tune_guidance(config, world)
    first = json.loads((config.out / "search.json").read_text())["rows"]
    assert [row["run"] for row in first] == ["constant 1 1.5", "cosine 1 1.5", "cosine 2 1.5"]
    tune_guidance(dataclasses.replace(config, scales=(1.5, 3.0)), world)
    rows = json.loads((config.out / "search.json").read_text())["rows"]
    assert rows[:3] == first
    assert len(rows) == 6
    best = min(rows, key=lambda row: row["proxy_fd"])
    assert f"--sampling.cfg_scale {best['cfg_scale']}" in capsys.readouterr().out
    assert (config.out / "search.png").exists()
    many = tuple(1 + i / 1000 for i in range(3000))
    with pytest.raises(ValueError, match="9,000,000 combinations, at most 10,000"):
        dataclasses.replace(config, scales=many, powers=many, schedules=("cosine",))
    with pytest.raises(InputError, match="choose another folder"):
        tune_guidance(dataclasses.replace(config, conditions=BALANCED), world)
    path = config.out / "search.json"
    stored = json.loads(path.read_text())
    del stored["rows"][1]["proxy_fd"]
    path.write_text(json.dumps(stored))
    with pytest.raises(InputError, match=r"search\.json: a row has no proxy_fd"):
        tune_guidance(config, world)


def test_quantised_precision_reports_its_effect_and_speculative_decoding_has_none(
    tmp_path, models, world, capsys
):
    sample(settings(models, tmp_path / "plain"), world)
    assert "Prepacked linears; not compiled" in capsys.readouterr().out
    ahead = SamplingConfig(speculation_window=4)
    sample(settings(models, tmp_path / "ahead", sampling=ahead), world)
    assert "codes per step" in capsys.readouterr().out
    assert np.array_equal(codes(tmp_path / "ahead"), codes(tmp_path / "plain"))
    low = ComputeConfig(precision="int8", cache_precision="int8", device="cpu")
    sample(settings(models, tmp_path / "low", compute=low), world)
    assert "nats (KL)" in capsys.readouterr().out
    index = json.loads((tmp_path / "low" / "index.json").read_text())
    assert index["precision"] == ["int8", "int8", "fp32"]
    fp8 = dataclasses.replace(COMPUTE, precision="fp8")
    with pytest.raises(InputError):
        sample(settings(models, tmp_path / "fp8", compute=fp8), world)


def test_what_does_not_fit_together_is_refused_in_one_line(tmp_path, models, world):
    sample(settings(models, tmp_path / "out", num_images=4), world)
    other_seed = {"sampling": SamplingConfig(seed=1), "num_images": 4}
    wrong = [
        (settings(models, tmp_path / "out", **other_seed), r"other settings \(sampling\)"),
        (settings(models, tmp_path / "new", conditions=ConditionConfig(classes=(7,))), "0 .. 4"),
        (settings(models, tmp_path / "new", conditions=ConditionConfig(prompt="a")), "text model"),
        (settings({**models, "tokenizer": models["gpt"]}, tmp_path / "new"), "config.yaml"),
    ]
    for config, message in wrong:
        with pytest.raises(InputError, match=message):
            sample(config, world)
        assert not (tmp_path / "new").exists()
    with pytest.raises(InputError, match="cfg_scale"):
        words = [*flags(settings(models, tmp_path)), "--sampling.cfg_scale", 0.5]
        parse_config(SampleConfig, list(map(str, words)))


def test_labels_depend_on_the_image_number():
    config = ConditionConfig()
    labels = sample_labels(config, 5000, 10, seed=0)
    assert np.bincount(labels, minlength=10).min() > 400
    assert np.array_equal(sample_labels(config, 50, 10, seed=0), labels[:50])
    chosen = ConditionConfig(classes=(3, 1))
    assert sample_labels(chosen, 5, 10, seed=0).tolist() == [3, 1, 3, 1, 3]


def test_the_image_grid_has_a_row_per_class():
    labels = np.arange(100) % 4
    assert labels[image_grid_ids(labels, rows=3, columns=5)].tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert image_grid_ids(np.arange(6), rows=2, columns=2).tolist() == [0, 1, 2, 3]
