"""Export a GPT to a folder that vLLM loads, with the plugin of this package beside it.

python -m autoregressive.convert --source c2i_B_256.pt --format vllm --out weights/gpt_b_vllm
"""

import dataclasses
import os
import shutil
from pathlib import Path
from string import Template
from typing import Any

from autoregressive.models.config import GPTConfig
from autoregressive.models.gpt import GPT
from autoregressive.serving.vllm_plugin import ARCHITECTURES, MODEL_TYPE, ONE_STREAM
from autoregressive.serving.vllm_requests import prompt_width
from core.config import InputError, config_values
from core.files import write_json
from core.lock import writer_lock
from core.weights import save_tensors

# The logits processor of vLLM's V1 runner, by whether the model takes guidance as an input.
PROCESSORS = {
    False: "autoregressive.serving.vllm_guidance:Guidance",
    True: "autoregressive.serving.vllm_guidance:GuidanceInPrompt",
}
# Sizes that the attention kernels of vLLM know, on CPU and CUDA; others are padded to the next.
_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)
# What the vLLM model does as the GPT does it. Dropout acts in training only.
_SUPPORTED = {
    *("num_layers", "num_heads", "dim", "num_kv_heads", "ffn_multiple", "norm_eps", "qk_norm"),
    *("rope_base", "rope_condition", "condition", "num_classes", "vocab_size", "grid"),
    *("tokenizer_sha256", "text_dim", "max_text_tokens", "text_encoder"),
    *("token_dropout", "residual_dropout", "ffn_dropout", "drop_path", "guidance_input"),
}


def export_vllm(gpt: GPT, folder: Path) -> None:
    """Write model.safetensors, config.json, generation_config.json and README.md, or nothing.

    Weights keep their names and dtype. Raises InputError if the folder holds something, or the
    model has an option that the vLLM model does not know.
    """
    folder = Path(folder)
    config = _serving_config(gpt.config)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder}: exists and is not empty; choose another folder or delete it")
    with writer_lock(folder.parent, file=folder.name):
        temporary = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        dtype = str(next(gpt.parameters()).dtype).removeprefix("torch.")
        save_tensors(gpt.state_dict(), temporary / "model.safetensors")
        write_json(temporary / "config.json", vllm_config(config, dtype))
        write_json(temporary / "generation_config.json", _generation_config(config))
        (temporary / "README.md").write_text(model_card(config, folder.name))
        os.replace(temporary, folder)


def vllm_config(config: GPTConfig, dtype: str) -> dict[str, Any]:
    """config.json: the fields that vLLM sizes its buffers by, and the GPT's own under `gpt`."""
    is_text, one_stream = config.condition == "text", config.guidance_input
    streams = 1 if one_stream else 2
    classes = 0 if is_text or one_stream else config.num_classes + 1
    return {
        "architectures": [ONE_STREAM if one_stream else ARCHITECTURES[config.condition]],
        "model_type": MODEL_TYPE,
        "dtype": dtype,
        # Width of what vLLM embeds: the streams, or a caption's features.
        "hidden_size": prompt_width(config) if is_text else streams * config.dim,
        "num_hidden_layers": config.num_layers,
        # Both streams share one KV cache.
        "num_attention_heads": streams * config.num_heads,
        "num_key_value_heads": streams * config.kv_heads,
        "head_dim": padded_head_dim(config.head_dim),
        # Codes, then classes, the null class last.
        "vocab_size": config.vocab_size + classes,
        "max_position_embeddings": config.num_condition + config.num_codes,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        # M-RoPE gives a request positions of its own: a caption ends at the same place always.
        **({"mrope_section": [1, 1, 1]} if is_text else {}),
        "gpt": config_values(config),
    }


def padded_head_dim(head_dim: int) -> int:
    """The least size that vLLM's attention kernels know and that a head fits in."""
    for size in _HEAD_SIZES:
        if size >= head_dim:
            return size
    raise InputError(f"heads of {head_dim} are wider than vLLM's attention allows (256)")


def model_card(config: GPTConfig, name: str) -> str:
    """README.md of the exported folder: what it holds, and how to start and ask vLLM."""
    is_text, one_stream = config.condition == "text", config.guidance_input
    prompt = _ONE_STREAM_PROMPT if one_stream else _TEXT_PROMPT if is_text else _CLASS_PROMPT
    embeds = is_text or one_stream
    scale = "7.5" if is_text else "2.0"
    return Template(_CARD).substitute(
        name=name,
        conditioned="captions" if is_text else f"{config.num_classes} classes",
        layers=config.num_layers,
        heads=config.num_heads,
        dim=config.dim,
        grid=f"{config.grid[0]} x {config.grid[1]}",
        codes=config.num_codes,
        vocab=config.vocab_size,
        tokenizer=config.tokenizer_sha256 or "unknown",
        flags=" --enable-prompt-embeds" if embeds else "",
        processor=PROCESSORS[one_stream],
        prompt=Template(prompt).substitute(
            first=config.vocab_size, longest=config.num_condition, width=prompt_width(config)
        ),
        request='"prompt_embeds": "<base64>"' if embeds else f'"prompt": [{config.vocab_size}]',
        guidance="" if one_stream else f',\n        "vllm_xargs": {{"cfg_scale": {scale}}}',
        extra=_IN_PROMPT if one_stream else _EXTRA,
    )


def _serving_config(config: GPTConfig) -> GPTConfig:
    if config.condition not in ARCHITECTURES:
        raise InputError(
            f"the vLLM model does not know condition = {config.condition!r}; sample this model "
            "with the native engine"
        )
    for field in dataclasses.fields(config):
        if field.name not in _SUPPORTED and getattr(config, field.name) != field.default:
            raise InputError(
                f"the vLLM model does not know {field.name} = {getattr(config, field.name)!r}; "
                "serve this model with the native engine"
            )
    return config


def _generation_config(config: GPTConfig) -> dict[str, Any]:
    """What a request over HTTP gets where it does not say: one whole image."""
    usual_top_k = {"top_k": min(1000, config.vocab_size)} if config.condition == "text" else {}
    return {"do_sample": True, "max_new_tokens": config.num_codes, **usual_top_k}


_CLASS_PROMPT = """The prompt is one token, $first + class index, and then the
codes that are already known, if any."""

_TEXT_PROMPT = """The prompt is a caption's features, 1 to $longest tokens without padding, as
`prompt_embeds` (n, $width): base64 of `torch.save`. Use the text encoder of the training run."""

_ONE_STREAM_PROMPT = """The model takes the strength of guidance as an input, so that an image is
one row. The prompt is its condition tokens, 1 to $longest of them, as `prompt_embeds` (n, $width):
base64 of `torch.save` of `gpt.prefix(condition, drop, guidance)[0]`."""

_EXTRA = """`vllm_xargs` takes `cfg_scale` (1: no guidance), `cfg_schedule` (constant, linear,
cosine), `cfg_power`, `cfg_interval` and `cfg_start`, each request its own."""

_IN_PROMPT = "The prompt holds the strength of guidance; `cfg_scale` is refused."

_CARD = """---
library_name: vllm
tags: [llamagen, autoregressive-image-generation]
---
# $name

An autoregressive image model (LlamaGen, arXiv 2406.06525) exported for vLLM: $layers layers,
$heads heads, width $dim, conditioned on $conditioned, $grid = $codes codes per image out of $vocab.
It draws codes; the VQGAN tokenizer that it was trained with (sha256 $tokenizer) decodes them.

## Start

Install the `llamagen` package beside vLLM (`pip install -e .` in its repository), then

    vllm serve . --skip-tokenizer-init$flags \\
        --logits-processors $processor

vLLM serves float32 weights in bfloat16 unless `--dtype float32` is given. On CUDA, set
`VLLM_USE_V2_MODEL_RUNNER=0` with this processor. vLLM's V2 runner takes
`autoregressive.serving.vllm_state:GuidanceParameters` instead; that path has not run on a GPU yet.
Do not expose this server to strangers: it checks guidance, but not token ids or caption lengths.

## Ask

$prompt

    curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d '{
        "model": ".", $request, "max_tokens": $codes, "ignore_eos": true,
        "return_token_ids": true$guidance}'

$extra `choices[0].token_ids` holds the codes in raster order.
"""
