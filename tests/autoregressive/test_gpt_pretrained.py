import argparse
import os

import pytest
import torch
from helpers.commands import run_module
from helpers.models import small, tiny
from safetensors.torch import save_file

from autoregressive import GPT, generate
from autoregressive.models.pretrained import load_gpt
from core.config import InputError, save_config
from core.released import released_architecture
from tokenizer import VQModel


def stored_layouts(state: dict, flags: argparse.Namespace) -> dict[str, object]:
    return {
        "DDP": {"model": state, "optimizer": {"state": {}}, "steps": 7, "args": flags},
        "DDP with prefixes": {"model": {f"module._orig_mod.{k}": v for k, v in state.items()}},
        "FSDP": state,
        "DeepSpeed": {"module": state},
        "state_dict": {"state_dict": state},
        "with a rotary table": {"model": {**state, "freqs_cis": torch.zeros(1 + 16, 4, 2)}},
    }


@pytest.mark.parametrize("layout", stored_layouts({}, argparse.Namespace()))
@pytest.mark.parametrize("num_kv_heads", [0, 1])
def test_every_released_layout_loads_strictly(tmp_path, layout, num_kv_heads):
    gpt = tiny(dim=128, num_heads=2, num_kv_heads=num_kv_heads)
    path = tmp_path / "released.pt"
    flags = argparse.Namespace(image_size=64, downsample_size=16)
    torch.save(stored_layouts(gpt.state_dict(), flags)[layout], path)
    loaded = GPT.from_pretrained(path, grid=(4, 4))
    assert not loaded.training
    assert loaded.config.num_layers == 2
    assert loaded.config.num_kv_heads == num_kv_heads
    codes, labels = torch.randint(0, 50, (2, 16)), torch.tensor([0, 3])
    torch.testing.assert_close(loaded(codes, labels), gpt(codes, labels))


def test_the_grid_comes_from_the_file_where_it_tells(tmp_path):
    gpt = tiny(dim=128, num_heads=2)
    path = tmp_path / "released.pt"
    layouts = stored_layouts(gpt.state_dict(), argparse.Namespace(image_size=384))
    torch.save(layouts["DDP"], path)
    assert GPT.from_pretrained(path).config.grid == (24, 24)
    torch.save(layouts["with a rotary table"], path)
    assert GPT.from_pretrained(path).config.grid == (4, 4)
    torch.save(layouts["FSDP"], path)
    with pytest.raises(InputError, match="--grid"):
        GPT.from_pretrained(path)


def test_a_registered_model_brings_its_grid_by_name_or_by_its_place_on_the_hub():
    for source in ("llamagen_l_384", "FoundationVision/LlamaGen/c2i_L_384.pt"):
        assert released_architecture(source)["grid"] == (24, 24)


def test_models_are_saved_and_loaded_on_a_device_in_a_dtype(tmp_path):
    gpt = tiny()
    gpt.save_pretrained(tmp_path / "gpt")
    loaded = GPT.from_pretrained(tmp_path / "gpt", device="cpu", dtype=torch.bfloat16)
    assert (loaded.device, loaded.dtype) == (torch.device("cpu"), torch.bfloat16)
    assert loaded.config == gpt.config
    vq = small()
    vq.save_pretrained(tmp_path / "vq")
    again = VQModel.from_pretrained(tmp_path / "vq")
    assert again.dtype == torch.float32
    assert torch.equal(again.quant_conv.weight, vq.quant_conv.weight)
    codes = gpt.generate(torch.tensor([1, 2]), seed=3)
    assert torch.equal(codes, generate(gpt, torch.tensor([1, 2]), seed=3))


def test_qk_norm_is_recognised_in_a_file_and_kept_in_a_folder(tmp_path):
    gpt = tiny(dim=128, num_heads=2, qk_norm=True)
    for block in gpt.blocks:
        torch.nn.init.uniform_(block.attention.q_norm.weight)
    torch.save({"model": gpt.state_dict()}, tmp_path / "model.pt")
    (tmp_path / "folder").mkdir()
    save_config(gpt.config, tmp_path / "folder" / "config.yaml")
    save_file(gpt.state_dict(), tmp_path / "folder" / "model.safetensors")
    codes, labels = torch.randint(0, 50, (2, 16)), torch.tensor([0, 3])
    for path, given in ((tmp_path / "model.pt", {"grid": (4, 4)}), (tmp_path / "folder", {})):
        loaded = GPT.from_pretrained(path, **given)
        assert loaded.config == gpt.config
        torch.testing.assert_close(loaded(codes, labels), gpt(codes, labels))


@pytest.mark.parametrize("dim", [32, 96])
def test_a_file_that_cannot_tell_its_heads_is_refused(tmp_path, dim):
    torch.save(tiny(dim=dim).state_dict(), tmp_path / "narrow.pt")
    with pytest.raises(InputError, match=rf"width is {dim}.* num_heads="):
        GPT.from_pretrained(tmp_path / "narrow.pt", grid=(4, 4))
    gpt = GPT.from_pretrained(tmp_path / "narrow.pt", grid=(4, 4), num_heads=4)
    assert gpt.config.num_heads == 4
    torch.save(tiny(dim=dim, qk_norm=True).state_dict(), tmp_path / "normed.pt")
    assert GPT.from_pretrained(tmp_path / "normed.pt", grid=(4, 4)).config.num_heads == 4


def test_a_text_model_is_recognised(tmp_path):
    gpt = tiny(dim=128, num_heads=2, condition="text", text_dim=12, max_text_tokens=9)
    torch.save(gpt.state_dict(), tmp_path / "text.pt")
    config = GPT.from_pretrained(tmp_path / "text.pt", grid=(4, 4)).config
    assert (config.condition, config.text_dim, config.max_text_tokens) == ("text", 12, 9)


def test_wrong_weights_are_refused_by_name(tmp_path):
    state = tiny(dim=128, num_heads=2).state_dict()
    del state["layers.1.feed_forward.w3.weight"]
    torch.save(state, tmp_path / "broken.pt")
    with pytest.raises(InputError, match=r"layers\.1\.feed_forward\.w3\.weight is missing"):
        GPT.from_pretrained(tmp_path / "broken.pt", grid=(4, 4))
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(InputError, match="not a GPT"):
        GPT.from_pretrained(tmp_path / "other.pt")
    with pytest.raises(InputError, match="no such file"):
        GPT.from_pretrained(tmp_path / "nothing.pt")


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Malicious()}, "evil.pt")
    with pytest.raises(InputError, match="could run code"):
        GPT.from_pretrained("evil.pt")
    assert not (tmp_path / "pwned").exists()


def test_our_folder_prefers_averaged_weights(tmp_path):
    gpt, ema = tiny(seed=1), tiny(seed=2)
    save_config(gpt.config, tmp_path / "config.yaml")
    save_file(gpt.state_dict(), tmp_path / "model.safetensors")
    save_file(ema.state_dict(), tmp_path / "ema.safetensors")
    weight = "tok_embeddings.weight"
    assert torch.equal(load_gpt(tmp_path).gpt.state_dict()[weight], ema.state_dict()[weight])
    model = load_gpt(tmp_path, weights="model").gpt
    assert torch.equal(model.state_dict()[weight], gpt.state_dict()[weight])


@pytest.mark.slow
def test_the_command_converts_a_released_file(tmp_path):
    gpt = tiny(dim=128, num_heads=2)
    torch.save({"model": gpt.state_dict()}, tmp_path / "released.pt")
    flags = ("--source", tmp_path / "released.pt", "--grid", "[4,4]", "--out", tmp_path / "ours")
    run_module("autoregressive.convert", *flags)
    files = {"config.yaml", "model.safetensors", "checksums.json"}
    assert {path.name for path in (tmp_path / "ours").iterdir()} == files
    loaded = GPT.from_pretrained(tmp_path / "ours")
    assert loaded.config == gpt.config
    codes, labels = torch.randint(0, 50, (2, 16)), torch.tensor([0, 3])
    torch.testing.assert_close(loaded(codes, labels), gpt(codes, labels))
