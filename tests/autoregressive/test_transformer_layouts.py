"""Every released transformer layout loads strictly, from files fabricated on the spot."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from helpers.local_hub import LocalHub
from helpers.models import captions, tiny
from safetensors.torch import save, save_file

from autoregressive import GPT
from autoregressive.models.released_layouts import SEED_NAMES
from core.errors import InputError

SHAPE = {"dim": 128, "num_heads": 2}
WEIGHT = "tok_embeddings.weight"


def seed_state(state: dict) -> dict:
    renamed = {}
    for key, value in state.items():
        theirs = next(a + key.removeprefix(b) for a, b in SEED_NAMES if key.startswith(b))
        renamed[f"transformer.{theirs}"] = value
    return renamed


def fabricate(layout: str) -> tuple[GPT, dict]:
    """A model, and a state dict of it as the published code would save it."""
    if layout == "text":
        text = {"condition": "text", "text_dim": 12, "max_text_tokens": 9, "num_classes": 1000}
        gpt = tiny(**text, **SHAPE)
        return gpt, gpt.state_dict()
    if "IBQ" in layout:
        gpt = tiny(adaln="full", **SHAPE)
        state = seed_state(gpt.state_dict())
        tokenizer = {"first_stage_model.encoder.conv_in.weight": torch.zeros(3)}
        if layout == "IBQ with EMA":
            shadows = {f"model_ema.{key.replace('.', '')}": state[key] for key in state}
            state = {key: value + 1 for key, value in state.items()}
            state |= {**shadows, "model_ema.decay": torch.tensor(0.999)}
        return gpt, {**state, **tokenizer}
    gpt = tiny(guidance_input=layout == "GFT", **SHAPE)
    state = gpt.state_dict()
    if layout == "after generate":
        for i in range(2):
            for name in ("k_cache", "v_cache"):
                state[f"layers.{i}.attention.kv_cache.{name}"] = torch.zeros(2, 2, 20, 64)
    if layout == "raw FSDP":
        state = {
            key.replace("layers.", "layers._fsdp_wrapped_module."): v for key, v in state.items()
        }
        state = {f"_fsdp_wrapped_module.{key}": value for key, value in state.items()}
    if layout == "compiled DDP":
        state = {f"module._orig_mod.{key}": value for key, value in state.items()}
    return gpt, state


def write(layout: str, state: dict, folder: Path) -> Path:
    """Write a state dict as the published code does -> what to load."""
    if layout == "Hub mixin":
        (folder / "config.json").write_text(json.dumps({"block_size": 16}))
        save_file(state, folder / "model.safetensors")
        return folder
    flags = argparse.Namespace(image_size=64, downsample_size=16)
    training = {"model": state, "optimizer": {"state": {}}, "steps": 7, "args": flags}
    content = {
        "LlamaGen training": training,
        "NPP": training,
        "FSDP": state,
        "DeepSpeed": {"module": state},
        "IBQ": {"state_dict": state, "epoch": 3},
        "IBQ with EMA": {"state_dict": state, "epoch": 3},
    }
    torch.save(content.get(layout, {"model": state}), folder / "released.pt")
    return folder / "released.pt"


LAYOUTS = [
    "LlamaGen",
    "LlamaGen training",
    "text",
    "Hub mixin",
    "after generate",
    "compiled DDP",
    "FSDP",
    "raw FSDP",
    "DeepSpeed",
    "CCA",
    "NPP",
    "GFT",
    "IBQ",
    "IBQ with EMA",
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_loads_strictly_and_what_does_not_fit_is_named(tmp_path, layout):
    gpt, state = fabricate(layout)
    loaded = GPT.from_pretrained(write(layout, state, tmp_path), grid=(4, 4))
    assert loaded.config == gpt.config
    codes, labels = torch.randint(0, 50, (2, 16)), torch.tensor([0, 3])
    condition = captions([3, 9], 12) if layout == "text" else labels
    torch.testing.assert_close(loaded(codes, condition), gpt(codes, condition))

    key = next(key for key in state if key.endswith("w3.weight"))
    both = (key, f"model_ema.{key.replace('.', '')}")  # the weight and its average, if there is one
    shorter = {name: value for name, value in state.items() if name not in both}
    misshapen = {name: torch.zeros(3, 3) if name in both else v for name, v in state.items()}
    for wrong, message in (
        (shorter, r"feed_forward\.w3\.weight is missing"),
        ({**state, "more.weight": torch.zeros(1)}, r"more\.?weight is"),
        (misshapen, r"feed_forward\.w3\.weight is \(3, 3\)"),
    ):
        path = write(layout, wrong, tmp_path)
        with pytest.raises(InputError, match=message):
            GPT.from_pretrained(path, grid=(4, 4))


def test_a_folder_of_the_hub_mixin_loads_locally_and_from_the_hub(tmp_path, monkeypatch):
    gpt = tiny(**SHAPE)
    config = json.dumps({"block_size": 16})
    (tmp_path / "config.json").write_text(config)
    save_file(gpt.state_dict(), tmp_path / "model.safetensors")
    assert GPT.from_pretrained(tmp_path).config == gpt.config
    with LocalHub() as hub:
        hub.use(monkeypatch, tmp_path / "cache")
        files = {"config.json": config.encode(), "model.safetensors": save(gpt.state_dict())}
        hub.add("owner/name", files)
        loaded = GPT.from_pretrained("owner/name")
    assert torch.equal(loaded.state_dict()[WEIGHT], gpt.state_dict()[WEIGHT])
