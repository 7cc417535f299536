"""What is checked before a request reaches vLLM; vLLM itself is not needed here."""

import json
import subprocess
import sys

import pytest
import torch
from helpers.paths import ROOT
from safetensors.torch import load_file

from autoregressive import GPT, convert
from autoregressive.inference.sampling_config import SamplingConfig
from autoregressive.models.config import GPTConfig
from autoregressive.models.transformer import PRESETS
from autoregressive.serving.export import export_vllm, model_card, padded_head_dim, vllm_config
from autoregressive.serving.guidance import guidance_scales, parse_guidance
from autoregressive.serving.vllm_requests import (
    caption_prompt,
    class_prompt,
    condition_prompt,
    sampling_arguments,
)
from core.config import InputError, save_config
from core.weights import save_tensors

TINY = {"num_layers": 1, "num_heads": 2, "dim": 32, "vocab_size": 16, "grid": (2, 3)}
CLASSES = GPTConfig(**TINY, num_classes=4)
TEXT = GPTConfig(**TINY, condition="text", text_dim=8, max_text_tokens=5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cfg_scale": 0}, "cfg_scale is 0, must be >= 1"),
        ({"cfg_scale": "3"}, "cfg_scale is '3', must be a finite number"),
        ({"cfg_scale": True}, "cfg_scale is True, must be a finite number"),
        ({"cfg_scale": float("nan")}, "cfg_scale is nan, must be a finite number"),
        ({"cfg_scale": [2.0]}, "cfg_scale is .*, must be a finite number"),
        ({"cfg_scale": None}, "cfg_scale is None, must be a finite number"),
        ({"cfg_interval": 2.5}, "cfg_interval is 2.5, must be an integer"),
        ({"cfg_interval": -2}, "cfg_interval is -2"),
        ({"cfg_start": -1}, "cfg_start must be >= 0"),
        ({"cfg_power": 0}, "cfg_power > 0"),
        ({"cfg_schedule": ["cosine"]}, "cfg_schedule is .*, must be one of constant, linear"),
        ({"cfg_sclae": 3.0}, "cfg_sclae is unknown; guidance takes cfg_scale"),
        ({"cfg_schedule": "x" * 5000}, "cfg_schedule is 'xxx"),
    ],
)
def test_wrong_guidance_is_refused_with_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_guidance(arguments)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_the_schedule_of_a_request_is_that_of_sampling_config():
    settings = {"cfg_scale": 5.0, "cfg_schedule": "cosine", "cfg_power": 2.0, "cfg_start": 3}
    assert guidance_scales(settings, "class", 20) == SamplingConfig(**settings).cfg_scales(20)
    assert guidance_scales({"other": 1}, "class", 2) == [2.0, 2.0]
    assert guidance_scales(None, "text", 2) == [7.5, 7.5]


def test_a_class_prompt_is_the_class_and_then_the_known_codes():
    assert class_prompt(CLASSES, 3, [5, 0]) == {"prompt_token_ids": [19, 5, 0]}


@pytest.mark.parametrize(
    ("label", "codes", "message"),
    [
        (4, [], "class is 4, must be in 0 .. 3"),
        (-1, [], "class is -1"),
        (True, [], "class is True"),
        (0, [16], "code is 16, must be in 0 .. 15"),
        (0, [-1], "code is -1"),
        (0, [0] * 6, "6 codes are given, an image has 6"),
    ],
)
def test_wrong_classes_and_codes_are_refused(label, codes, message):
    with pytest.raises(ValueError, match=message):
        class_prompt(CLASSES, label, codes)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.zeros(6, 8), "the caption has 6 tokens, must have 1 .. 5"),
        (torch.zeros(0, 8), "the caption has 0 tokens"),
        (torch.zeros(2, 7), r"features are \(2, 7\), must be \(n, 8\)"),
        (torch.zeros(8), "must be"),
        (torch.zeros(2, 8, dtype=torch.int64), "must be"),
        (torch.full((2, 8), float("nan")), "must be finite"),
    ],
)
def test_wrong_captions_are_refused(features, message):
    with pytest.raises(ValueError, match=message):
        caption_prompt(TEXT, features)


def test_a_caption_is_padded_to_the_width_that_codes_share():
    prompt = caption_prompt(TEXT, torch.ones(3, 8))["prompt_embeds"]
    assert prompt.shape == (3, 32)
    assert prompt.sum() == 24


def test_a_prompt_of_the_other_condition_is_refused():
    with pytest.raises(ValueError, match="conditioned on captions"):
        class_prompt(TEXT, 0)
    with pytest.raises(ValueError, match="conditioned on classes"):
        caption_prompt(CLASSES, torch.zeros(1, 8))


def test_guidance_as_an_input_is_part_of_the_prompt():
    gpt = GPT(GPTConfig(**TINY, num_classes=4, guidance_input=True))
    tokens = torch.ones(1, 32)
    assert condition_prompt(gpt.config, tokens)["prompt_embeds"] is tokens
    for wrong in (torch.ones(2, 32), torch.ones(1, 31), torch.ones(32), tokens / 0, tokens.int()):
        with pytest.raises(ValueError, match="condition tokens"):
            condition_prompt(gpt.config, wrong)
    with pytest.raises(ValueError, match="takes guidance as an input"):
        class_prompt(gpt.config, 0)
    with pytest.raises(ValueError, match="cfg_scale: this model takes guidance in its prompt"):
        sampling_arguments(gpt.config, cfg_scale=2.0)
    with pytest.raises(ValueError, match="does not take guidance as an input"):
        condition_prompt(CLASSES, tokens)
    config = vllm_config(gpt.config, "float32")
    assert (config["num_attention_heads"], config["hidden_size"]) == (2, 32)  # one row per image
    assert "GuidanceInPrompt" in model_card(gpt.config, "gft")


def test_a_request_asks_for_the_rest_of_one_image():
    arguments = sampling_arguments(CLASSES, num_known=2, top_k=5, seed=3, cfg_scale=4.0)
    assert (arguments["max_tokens"], arguments["extra_args"]) == (4, {"cfg_scale": 4.0})
    with pytest.raises(ValueError, match="top_p"):
        sampling_arguments(CLASSES, top_p=0.0)
    with pytest.raises(ValueError, match="cfg_scale is"):
        sampling_arguments(CLASSES, cfg_scale=0.5)


def test_convert_exports_a_folder_for_vllm(tmp_path, monkeypatch):
    gpt = GPT(CLASSES)
    source = tmp_path / "gpt"
    source.mkdir()
    save_tensors(gpt.state_dict(), source / "model.safetensors")
    save_config(gpt.config, source / "config.yaml")
    folder = tmp_path / "exported"
    flags = ["--source", str(source), "--format", "vllm", "--out", str(folder)]
    monkeypatch.setattr(sys, "argv", ["convert", *flags])
    convert.main()
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaGenClassModel"]
    assert (config["num_attention_heads"], config["vocab_size"]) == (4, 16 + 5)
    assert config["max_position_embeddings"] == 7
    assert GPTConfig(**{**config["gpt"], "grid": tuple(config["gpt"]["grid"])}) == CLASSES
    assert json.loads((folder / "generation_config.json").read_text())["max_new_tokens"] == 6
    tensors = load_file(folder / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in gpt.state_dict().items()
    }
    with pytest.raises(InputError, match="exists and is not empty"):
        convert.main()


@pytest.mark.parametrize("config", [CLASSES, TEXT])
def test_the_model_card_says_how_to_start_and_ask(tmp_path, config):
    export_vllm(GPT(config), tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "$" not in card
    assert "--logits-processors autoregressive.serving.vllm_guidance:Guidance" in card
    assert ("--enable-prompt-embeds" in card) == (config.condition == "text")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"target_position": True}, "does not know target_position = True"),
        ({"condition": "none"}, "does not know condition = 'none'"),
        ({"adaln": "full"}, "does not know adaln = 'full'"),
    ],
)
def test_a_model_that_vllm_cannot_run_is_refused_by_name_at_export(tmp_path, option, message):
    gpt = GPT(GPTConfig(**{**TINY, "num_classes": 4, **option}))
    with pytest.raises(InputError, match=message) as caught:
        export_vllm(gpt, tmp_path / "out")
    assert "this model with the native engine" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_every_published_size_has_a_head_that_vllm_knows():
    sizes = {name: padded_head_dim(dim // heads) for name, (_, heads, dim) in PRESETS.items()}
    assert sizes["GPT-3B"] == 112
    assert sizes["GPT-B"] == 64
    with pytest.raises(InputError, match="wider than"):
        padded_head_dim(300)


@pytest.mark.slow
def test_the_modules_that_run_inside_vllm_need_no_library_of_our_commands():
    """vLLM's environment lacks them: what the plugin imports must not import them."""
    code = (
        "import sys, autoregressive.serving.vllm_plugin, autoregressive.serving.vllm_requests\n"
        "import autoregressive.models.rope\n"
        "print({m.split('.')[0] for m in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    heavy = ("jsonargparse", "transformers", "vllm", "fastapi", "gradio", "timm", "wandb")
    assert not [name for name in heavy if f"'{name}'" in done.stdout]
