"""Every released tokenizer layout loads strictly, from files fabricated on the spot."""

import argparse
import json
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from helpers.models import small
from safetensors.torch import save_file

from core.errors import InputError
from tokenizer.models.pretrained import load_tokenizer
from tokenizer.models.released_layouts import CODEBOOK_USED

LEVELS = 2


def seed_key(key: str) -> str:
    """Our key in SEED-Voken's names."""
    key = re.sub(
        r"\.mid\.(\d)\.", lambda m: f".mid.{('block_1', 'attn_1', 'block_2')[int(m[1])]}.", key
    )
    key = re.sub(r"encoder\.conv_blocks\.", "encoder.down.", key)
    level = lambda m: f"decoder.up.{LEVELS - 1 - int(m[1])}."  # noqa: E731
    return re.sub(r"decoder\.conv_blocks\.(\d)\.", level, key).replace(".res.", ".block.")


def fabricate(layout: str):
    """A model, the file's content as the published code saves it, and the state dict within it that
    is loaded: changes of this one change the content.
    """
    vq = small(quantizer="ibq", l2_normalize=False) if "IBQ" in layout else small()
    state = vq.state_dict()
    if layout == "no counter":
        del state[CODEBOOK_USED]
    if "IBQ" in layout:
        state = {seed_key(key): value for key, value in state.items()}
    other = {key: value + 1 for key, value in state.items()}
    if layout == "IBQ":
        shadows = {f"model_ema.{key.replace('.', '')}": value for key, value in state.items()}
        scalars = {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(7)}
        live = other | shadows | scalars | {"loss.discriminator.main.0.weight": torch.zeros(3)}
        return vq, {"state_dict": live, "epoch": 3}, live
    discriminator = {"main.0.weight": torch.zeros(1)}
    optimizer = {"state": {}, "param_groups": []}
    content = {
        "LlamaGen": {"model": state},
        "LlamaGen with EMA": {"model": other, "ema": state},
        "LlamaGen training": {
            "model": state,
            "discriminator": discriminator,
            "optimizer": optimizer,
            "optimizer_disc": optimizer,
            "steps": 7,
            "args": argparse.Namespace(lr=1e-4),
        },
        "no counter": {"model": state},
        "Hub mixin": state,
        "GEAR-VQ": {"vq": other, "vq_ema": state},
        "GEAR-IBQ": {"vq": other, "vq_ema": state},
        "Warmup-VQ": {
            "vq": other,
            "vq_ema": state,
            "discriminator": discriminator,
            "opt_vq": optimizer,
            "opt_disc": optimizer,
            "steps": 7,
        },
    }
    return vq, content[layout], state


def write(layout: str, content: dict, folder: Path) -> Path:
    """Write a file, or the folder of the Hub's mixin -> what to load."""
    if layout == "Hub mixin":
        (folder / "config.json").write_text(json.dumps({"codebook_size": 40}))
        save_file(content, folder / "model.safetensors")
        return folder
    torch.save(content, folder / "vq.ckpt")
    return folder / "vq.ckpt"


LAYOUTS = [
    "LlamaGen",
    "LlamaGen with EMA",
    "LlamaGen training",
    "no counter",
    "Hub mixin",
    "GEAR-VQ",
    "Warmup-VQ",
    "GEAR-IBQ",
    "IBQ",
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_loads_strictly_and_what_does_not_fit_is_named(tmp_path, layout):
    vq, content, state = fabricate(layout)
    loaded = load_tokenizer(write(layout, content, tmp_path)).vq
    assert loaded.config == vq.config
    images = torch.rand(1, 3, 16, 16)
    assert torch.equal(loaded.encode(images), vq.encode(images))
    whole = dict(state)
    key = "decoder.norm_out.bias"
    shadow = "model_ema.decodernorm_outbias"
    for change, message in (
        (lambda: [state.pop(key, None), state.pop(shadow, None)], "norm_out.bias is missing"),
        (lambda: state.update({"more.weight": torch.zeros(1)}), r"more\.?weight is"),
        (
            lambda: state.update({k: torch.zeros(3) for k in (key, shadow) if k in state}),
            r"norm_out\.bias is \(3,\)",
        ),
    ):
        change()
        path = write(layout, content, tmp_path)
        with pytest.raises(InputError, match=message):
            load_tokenizer(path)
        state.clear()
        state.update(whole)


def test_a_missing_averaged_weight_is_named_and_live_ones_can_be_taken(tmp_path):
    _, stored, state = fabricate("IBQ")
    del state["model_ema.encoderconv_inbias"]
    torch.save(stored, tmp_path / "vq.ckpt")
    with pytest.raises(InputError, match=r"model_ema\.encoderconv_inbias is missing"):
        load_tokenizer(tmp_path / "vq.ckpt")
    live = load_tokenizer(tmp_path / "vq.ckpt", weights="model").vq
    assert torch.equal(live.encoder.conv_in.bias, state["encoder.conv_in.bias"])


def test_settings_objects_of_a_lightning_file_are_not_run(tmp_path, monkeypatch):
    module = types.ModuleType("omegaconf")

    class DictConfig:
        def __init__(self):
            self.content = {"lr": 1}

    DictConfig.__module__, DictConfig.__qualname__ = "omegaconf", "DictConfig"
    module.DictConfig = DictConfig
    monkeypatch.setitem(sys.modules, "omegaconf", module)
    vq, stored, _ = fabricate("IBQ")
    torch.save({**stored, "hyper_parameters": DictConfig()}, tmp_path / "vq.ckpt")
    monkeypatch.delitem(sys.modules, "omegaconf")
    assert load_tokenizer(tmp_path / "vq.ckpt").vq.config == vq.config
