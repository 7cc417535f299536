import argparse
import os
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import nn

from core.config import InputError
from core.weights import (
    file_sha256,
    find_weights,
    load_tensors,
    load_weights,
    read_file,
    save_tensors,
)

STATE = {"a.weight": torch.arange(3.0), "b": torch.ones(2, 2)}


@pytest.mark.parametrize(
    ("stored", "part"),
    [
        ({"model": STATE, "steps": 7, "optimizer": {"state": {}}}, "model"),
        ({"module": STATE}, "model"),
        ({"state_dict": STATE}, "model"),
        (STATE, "model"),
        ({"model": {"x": torch.zeros(1)}, "ema": STATE}, "ema"),
        ({"model": {"x": torch.zeros(1)}, "discriminator": STATE}, "discriminator"),
        ({"model": {f"module.{key}": value for key, value in STATE.items()}}, "model"),
        ({f"_orig_mod.{key}": value for key, value in STATE.items()}, "model"),
    ],
    ids=["DDP", "DeepSpeed", "state_dict", "FSDP", "ema", "discriminator", "module.", "compiled"],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_every_released_layout_is_read(tmp_path, stored, part, zipped):
    path = tmp_path / "released.pt"
    torch.save(stored, path, _use_new_zipfile_serialization=zipped)
    weights = read_file(path).weights(part, path)
    assert weights.keys() == STATE.keys()
    assert all(torch.equal(weights[key], STATE[key]) for key in STATE)


def test_the_flags_of_a_released_file_are_kept_and_missing_parts_named(tmp_path):
    path = tmp_path / "released.pt"
    torch.save({"model": STATE, "args": argparse.Namespace(lr=1e-4, image_size=384)}, path)
    released = read_file(path)
    assert released.arguments == {"lr": 1e-4, "image_size": 384}
    with pytest.raises(InputError, match="has no ema weights, only model"):
        released.weights("ema", path)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    path = Path("evil.pt")
    torch.save({**STATE, "args": Malicious()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match="could run code"):
        read_file(path)
    assert not Path("ran").exists()


def test_what_holds_no_weights_is_refused_in_one_line(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"model": STATE}, path)
    whole = path.read_bytes()
    for content in (b"", b"hello", whole[: len(whole) // 2], b"PK" + b"junk" * 9):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"x\.pt"):
            read_file(path)
    for stored in ([1, 2], {"lr": 3}, torch.zeros(2)):
        torch.save(stored, path)
        with pytest.raises(InputError, match=r"x\.pt"):
            read_file(path)


def test_safetensors_round_trip_and_damage_is_named(tmp_path):
    path = tmp_path / "w.safetensors"
    save_tensors({**STATE, "b": STATE["b"].t()}, path)
    assert torch.equal(read_file(path).parts["model"]["a.weight"], STATE["a.weight"])
    assert len(file_sha256(path)) == 64
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(InputError, match="damaged"):
        load_tensors(path)
    with pytest.raises(InputError, match="no such file"):
        load_tensors(tmp_path / "missing.safetensors")


def test_every_mismatch_is_named_and_nothing_is_loaded():
    layer = nn.Linear(2, 3)
    before = layer.weight.clone()
    for tensors, message in (
        ({"weight": torch.zeros(3, 2)}, "bias is missing"),
        (
            {"weight": torch.zeros(2, 2), "bias": torch.zeros(3)},
            r"\(2, 2\), the model has \(3, 2\)",
        ),
        ({**layer.state_dict(), "extra": torch.zeros(1)}, "extra is not part of the model"),
    ):
        with pytest.raises(InputError, match=f"file.pt: .*{message}"):
            load_weights(layer, tensors, "file.pt")
    assert torch.equal(layer.weight, before)


def test_a_hub_id_is_fetched_through_its_cache(tmp_path, monkeypatch):
    asked = []

    def download(repository: str, filename: str, **_: object) -> str:
        asked.append((repository, filename))
        return str(tmp_path / "snapshot" / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert find_weights(tmp_path, "x") == tmp_path
    assert find_weights("owner/name/sub/a.pt", "x") == tmp_path / "snapshot" / "sub" / "a.pt"
    assert find_weights("owner/name", "model.safetensors") == tmp_path / "snapshot"
    files = ("sub/a.pt", "config.yaml", "checksums.json", "model.safetensors")
    assert asked == [("owner/name", name) for name in files]
    for wrong in ("nothing.pt", "../up/there.pt", "/not/here.pt"):
        with pytest.raises(InputError, match="no such file or folder"):
            find_weights(wrong, "x")

    def offline(*_: str, **__: object) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(InputError, match="nor to be had from the Hub"):
        find_weights("owner/name", "x")
