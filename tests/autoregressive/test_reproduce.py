"""Reproduction end to end against a hub on loopback: tiny models, the proxy network."""

import dataclasses
import hashlib
import io
import json
import shutil
import time
from collections import namedtuple

import numpy as np
import pytest
import torch
from helpers.local_hub import LocalHub
from helpers.models import TINY, tiny, write_models
from PIL import Image

from autoregressive import reproduce as command
from autoregressive.inference.compute import ComputeConfig
from autoregressive.models.pretrained import load_gpt
from autoregressive.reproduce import ReproduceConfig, reproduce
from autoregressive.sampling import run as sample_run
from core.config import InputError, load_config
from core.data.npz import save_npz
from core.released import PublishedScores, ReleasedModel
from evaluations import reference_stats
from evaluations.features.extractors import ExtractorConfig
from evaluations.reference import ReferenceConfig, build_reference
from evaluations.scorer import MetricsConfig
from tokenizer.models.pretrained import load_tokenizer

COUNT = 240  # more than the proxy's features, so that the distance has an error bar
PROXY = MetricsConfig(extractor="proxy")
FP32 = ComputeConfig(precision="fp32", device="cpu")
GPT = ReleasedModel(
    name="tiny_gpt",
    kind="gpt",
    source="this test",
    repository="owner/models",
    file="gpt.pt",
    architecture={"num_heads": TINY["num_heads"], "grid": (4, 4), "vocab_size": 50},
    tokenizer="tiny_vq",
    sampling={"cfg_scale": 2.0},
)
VQ = ReleasedModel(
    name="tiny_vq",
    kind="tokenizer",
    source="this test",
    repository="owner/models",
    file="vq.pt",
    architecture={"channel_multipliers": (1, 1)},
)


class StoppedError(Exception):
    """What ends a run in the middle."""


def stop(*_: object, **__: object) -> None:
    raise StoppedError


def saved(model: torch.nn.Module) -> bytes:
    file = io.BytesIO()
    torch.save({"model": model.state_dict()}, file)
    return file.getvalue()


@pytest.fixture
def hub(monkeypatch, tmp_path, world):
    """A hub with the two models and a reference, and a table that names them."""
    gpt, vq = write_models(tmp_path, tiny(vocab_size=50))
    real = np.random.default_rng(0).integers(0, 256, (300, 8, 8, 3), dtype=np.uint8)
    save_npz(tmp_path / "real.npz", 300, [real])
    built = tmp_path / "reference.npz"
    extractor = ExtractorConfig(extractor="proxy")
    build_reference(
        ReferenceConfig(images=tmp_path / "real.npz", out=built, metrics=extractor, device="cpu"),
        world,
    )
    files = {
        "gpt.pt": saved(load_gpt(gpt).gpt),
        "vq.pt": saved(load_tokenizer(vq).vq),
        "reference.npz": built.read_bytes(),
    }
    with LocalHub() as server:
        server.use(monkeypatch, tmp_path / "cache")
        server.add("owner/models", files)
        url = f"{server.url}/owner/models/resolve/main/reference.npz"
        monkeypatch.setitem(reference_stats.REFERENCE_URLS, "reference.npz", url)
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
        publish(monkeypatch, 1.0)
        yield server


def publish(
    monkeypatch,
    distance: float,
    models: tuple[ReleasedModel, ...] = (GPT, VQ),
    **changes: object,
) -> None:
    """Make the table say that these models have this distance."""
    row = PublishedScores(
        **{
            "metrics": {"proxy_fd": distance},
            "image_size": 8,
            "source": "this test",
            "num_images": COUNT,
            "reference": "reference.npz",
            **changes,
        }
    )
    table = {m.name: dataclasses.replace(m, scores=(row,)) for m in models}
    monkeypatch.setattr("core.released.released_models", lambda: table)


def settings(out, **changes: object) -> ReproduceConfig:
    run = {"metrics": PROXY, "compute": FP32, "batch_size": 120, "num_workers": 0}
    return ReproduceConfig(**{"name": "tiny_gpt", "out": out, **run, **changes})


def report(out) -> dict:
    return json.loads((out / "report.json").read_text())


def downloads(hub) -> list[str]:
    requests = hub.repositories["owner/models"].requests
    return sorted(name for method, name, _ in requests if method == "GET")


def test_a_run_that_is_stopped_at_every_stage_continues_and_its_report_says_pass_or_fail(
    hub, tmp_path, world, monkeypatch, capsys
):
    out = tmp_path / "out"
    config = settings(out)
    stages = [
        (command, "fetch_web"),  # the models are there, the reference is not
        (command, "sample"),  # everything is downloaded
        (sample_run, "publish"),  # everything is sampled
        (command, "write_report"),  # everything is scored
    ]
    for module, name in stages:
        with monkeypatch.context() as patch, pytest.raises(StoppedError):
            patch.setattr(module, name, stop)
            if name == "write_report":  # what was sampled before is not sampled again
                patch.setattr(sample_run, "sample_batches", stop)
            reproduce(config, world)
        assert not (out / "report.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(command, "sample", stop)
        reproduce(config, world)
    assert downloads(hub) == ["gpt.pt", "reference.npz", "vq.pt"]
    first = report(out)
    assert len(first["starts"]) == len(stages) + 1
    assert first["verdict"] == "fail"
    score = first["scores"][0]
    assert score["error"] > 0
    publish(monkeypatch, score["ours"] + score["tolerance"] / 2)
    reproduce(config, world)
    found = report(out)
    assert found["verdict"] == "pass"
    assert found["not_compared_because"] == []
    assert set(found["files"]) == {
        "owner/models/gpt.pt",
        "owner/models/vq.pt",
        "reference.npz",
    }
    assert {len(sha256) for sha256 in found["files"].values()} == {64}
    text = (out / "report.md").read_text()
    assert found["not_pinned"].startswith("No sha256 is known for any of these files")
    assert found["not_pinned"] in text
    for text_part in ("**pass**", "± ", "1 x ", "torch", "cfg_scale", "published num_images: 240"):
        assert text_part in text, text_part
    again = found["commands"][0].split("--config ")[1]
    assert load_config(ReproduceConfig, tmp_path / again) == config
    stage = found["commands"][1].split("--config ")[1]
    assert load_config(sample_run.SampleRunConfig, tmp_path / stage).num_images == COUNT
    assert "not compared" not in capsys.readouterr().out


def test_fewer_images_are_a_smoke_run_without_a_verdict(hub, tmp_path, world, capsys):
    out = tmp_path / "out"
    reproduce(settings(out, num_images=20), world)
    assert report(out)["verdict"] == "not compared"
    text = (out / "report.md").read_text()
    assert "**not compared: smoke run: 20 images, published with 240**" in text
    assert "| pass |" not in text
    assert "| fail |" not in text
    assert "reference.npz: " in capsys.readouterr().out


def test_without_network_one_line_names_what_is_missing_and_where_it_is_published(
    hub, tmp_path, world, monkeypatch
):
    monkeypatch.setattr(time, "sleep", lambda _: None)  # between huggingface_hub's retries
    hub.stop()
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"gpt\.pt.*(published at|see) http.*owner/models"):
        reproduce(settings(out), world)
    assert not out.exists()


def test_a_full_disk_is_noticed_before_the_download(hub, tmp_path, world, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=r"the disk has 0\.00 MB free"):
        reproduce(settings(tmp_path / "out"), world)
    assert downloads(hub) == []
    assert not (tmp_path / "out").exists()


def test_a_known_sha256_is_enforced_and_the_report_names_the_files_without_one(
    hub, tmp_path, world, monkeypatch
):
    wrong = dataclasses.replace(GPT, sha256="0" * 64)
    publish(monkeypatch, 1.0, (wrong, VQ))
    with pytest.raises(InputError, match=r"gpt\.pt: downloaded with sha256 .* expected 0000"):
        reproduce(settings(tmp_path / "out"), world)
    known = hashlib.sha256(hub.repositories["owner/models"].branches["main"]["gpt.pt"])
    right = dataclasses.replace(GPT, sha256=known.hexdigest())
    publish(monkeypatch, 1.0, (right, VQ))
    reproduce(settings(tmp_path / "out", num_images=20), world)
    assert report(tmp_path / "out")["not_pinned"].startswith("No sha256 is known for tiny_vq:")


@pytest.mark.parametrize("theirs", [None, "4 to 8 bicubic, with antialiasing"])
def test_resized_samples_are_compared_only_under_the_published_interpolation(
    hub, tmp_path, world, monkeypatch, theirs
):
    out, target = tmp_path / "out", namedtuple("target", "model stage published")
    publish(monkeypatch, 1.0)
    stage = sample_run.SampleRunConfig(gpt="a", tokenizer="b", out=out, resize=16)
    row = PublishedScores({"proxy_fd": 1.0}, 16, "this test", COUNT, None, theirs)
    scores = {"n": COUNT, "proxy_fd": 1.0, "reference": "reference.npz"}
    (reason,) = command.differences(target(GPT, stage, row), scores)
    said = theirs or "an interpolation that the source does not state"
    assert reason == f"images resized by 8 to 16 bicubic, no antialiasing, published with {said}"
    same = dataclasses.replace(row, interpolation="8 to 16 bicubic, no antialiasing")
    assert command.differences(target(GPT, stage, same), scores) == []


def test_a_tokenizer_is_compared_only_under_the_interpolation_of_the_published_row(
    hub, tmp_path, world, monkeypatch
):
    data = tmp_path / "images"
    data.mkdir()
    pixels = np.random.default_rng(1).integers(0, 256, (COUNT, 16, 16, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(data / f"{number:03}.png")
    out = tmp_path / "out"
    config = settings(out, name="tiny_vq", data=data)
    for theirs, said in (("bilinear", "published with bilinear"), (None, "does not state")):
        publish(monkeypatch, 1.0, image_size=16, interpolation=theirs)
        reproduce(config, world)
        found = report(out)
        assert found["interpolation"] == "box halvings, then bicubic"
        assert found["verdict"] == "not compared"
        assert said in found["not_compared_because"][0]
    ours, interpolation = found["scores"][0]["ours"], found["interpolation"]
    publish(monkeypatch, ours, image_size=16, interpolation=interpolation)
    reproduce(config, world)
    assert report(out)["verdict"] == "pass"


def test_what_cannot_be_reproduced_is_refused_in_one_line(hub, tmp_path, world, monkeypatch):
    publish(monkeypatch, 1.0, reference="unknown.npz")
    wrong = [
        ({"name": "nothing"}, "no released model"),
        ({"image_size": 16}, r"no published score at 16 px, only at \[8\]"),
        ({"name": "tiny_vq"}, "scored on all images of --data"),
        ({}, r"reference \(unknown.npz\) cannot be downloaded"),
        ({"out": None}, "give --name and --out"),
    ]
    for changes, message in wrong:
        with pytest.raises(InputError, match=message):
            reproduce(settings(**{"out": tmp_path / "out", **changes}), world)
    assert not (tmp_path / "out").exists()
    command.print_list()


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("progress.json", "[]", "holds a list"),
        ("progress.json", '{"starts": 3, "seconds": {}}', "starts is 3"),
        ("samples/scores.json", "{}", "settings is missing"),
        ("samples/scores.json", '{"settings": []}', r"settings is \[\]"),
    ],
)
def test_a_damaged_record_of_an_earlier_start_is_named(hub, tmp_path, world, file, text, message):
    path = tmp_path / "out" / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(InputError, match=rf"{file}: {message}"):
        reproduce(settings(tmp_path / "out", num_images=20), world)
