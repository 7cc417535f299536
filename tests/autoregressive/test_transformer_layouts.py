"""Every released transformer layout loads strictly, from files fabricated on the spot."""

import json

import pytest
import torch
from helpers.local_hub import LocalHub
from helpers.models import tiny
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
    if layout == "IBQ":
        gpt = tiny(adaln="full", **SHAPE)
        tokenizer = {"first_stage_model.encoder.conv_in.weight": torch.zeros(3)}
        return gpt, {**seed_state(gpt.state_dict()), **tokenizer}
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
    return gpt, state


LAYOUTS = ["plain", "after generate", "raw FSDP", "GFT", "IBQ"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_loads_strictly_and_what_does_not_fit_is_named(tmp_path, layout):
    gpt, state = fabricate(layout)
    path = tmp_path / "released.pt"
    torch.save({"model": state}, path)
    loaded = GPT.from_pretrained(path, grid=(4, 4))
    assert loaded.config == gpt.config
    codes, labels = torch.randint(0, 50, (2, 16)), torch.tensor([0, 3])
    torch.testing.assert_close(loaded(codes, labels), gpt(codes, labels))

    key = next(key for key in state if key.endswith("w3.weight"))
    shorter = {name: value for name, value in state.items() if name != key}
    for wrong, message in (
        (shorter, r"feed_forward\.w3\.weight is missing"),
        ({**state, "more.weight": torch.zeros(1)}, r"more\.weight is not part of the model"),
        ({**state, key: torch.zeros(3, 3)}, r"feed_forward\.w3\.weight is \(3, 3\)"),
    ):
        torch.save({"model": wrong}, path)
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


def test_what_does_not_fit_in_a_folder_of_the_hub_mixin_is_named(tmp_path):
    state = tiny(**SHAPE).state_dict()
    (tmp_path / "config.json").write_text(json.dumps({"block_size": 16}))
    shorter = {name: value for name, value in state.items() if name != "norm.weight"}
    for wrong, message in (
        (shorter, r"norm\.weight is missing"),
        ({**state, "more.weight": torch.zeros(1)}, r"more\.weight is not part of the model"),
        ({**state, "norm.weight": torch.zeros(3)}, r"norm\.weight is \(3,\)"),
    ):
        save_file(wrong, tmp_path / "model.safetensors")
        with pytest.raises(InputError, match=message):
            GPT.from_pretrained(tmp_path)
