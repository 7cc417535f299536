"""Loads a GPT: a released file, a run or checkpoint folder of ours, or a Hub repository."""

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from autoregressive.models.config import GPTConfig
from autoregressive.models.gpt import GPT
from autoregressive.models.transformer import infer_transformer_fields
from core.config import InputError, load_config
from core.weights import (
    Weights,
    file_sha256,
    find_weights,
    inference_files,
    load_weights,
    read_file,
)


class Loaded(NamedTuple):
    """A GPT in eval mode, and the sha256 of the file that its weights came from."""

    gpt: GPT
    sha256: str


def load_gpt(source: str | Path, weights: Weights = "auto", **overrides: Any) -> Loaded:  # noqa: ANN401
    """Load a GPT; every tensor of the file must fit, and none may be missing.

    source: a released `.pt` / `.pth` (DDP, FSDP or DeepSpeed layout), a `.safetensors` file, a
        checkpoint or run folder of ours, or `owner/name[/file]` on the Hub.
    weights: "auto" takes the EMA weights of our folders, and `model` of released files.
    overrides: fields of GPTConfig that a released file cannot tell, above all `grid`.
    Raises InputError if the weights do not fit, are damaged, or would run code.
    """
    path = find_weights(source, "model.safetensors")
    if path.is_dir():
        config_path, path = inference_files(path, weights)
        config = dataclasses.replace(load_config(GPTConfig, config_path), **overrides)
        tensors = read_file(path).weights("model", path)
    else:
        stored = read_file(path)
        tensors = stored.weights("model" if weights == "auto" else weights, path)
        config = _infer_config(tensors, stored.arguments, path, overrides)
        tensors.pop("freqs_cis", None)  # some released files carry the rotary table
    with torch.device("meta"):
        gpt = GPT(config)
    tensors = {key: value.float() for key, value in tensors.items()}
    load_weights(gpt, tensors, path, assign=True)
    gpt.build_rotary()
    return Loaded(gpt.eval(), file_sha256(path))


def _infer_config(
    tensors: Mapping[str, torch.Tensor],
    arguments: Mapping[str, Any],
    path: Path,
    overrides: Mapping[str, Any],
) -> GPTConfig:
    """The configuration that keys and shapes tell; grid from the file if it can, else 16 x 16."""
    try:
        fields = infer_transformer_fields(tensors, overrides.get("num_heads"))
        fields["vocab_size"] = len(tensors["tok_embeddings.weight"])
    except KeyError as error:
        raise InputError(f"{path}: not a GPT of this project ({error} is missing)") from error
    if "cls_embedding.embedding_table.weight" in tensors:
        fields["condition"] = "class"
        fields["num_classes"] = tensors["cls_embedding.embedding_table.weight"].shape[0] - 1
        num_condition = 1
    else:
        fields["condition"] = "text"
        null = tensors.get("cls_embedding.uncond_embedding")
        if null is None:
            raise InputError(f"{path}: neither a class nor a text embedding among the weights")
        num_condition, fields["text_dim"] = null.shape
        fields["max_text_tokens"] = num_condition
    if "grid" not in overrides:
        fields["grid"] = _infer_grid(tensors, arguments, num_condition, path)
    return GPTConfig(**{**fields, **overrides})


def _infer_grid(
    tensors: Mapping[str, torch.Tensor],
    arguments: Mapping[str, Any],
    num_condition: int,
    path: Path,
) -> tuple[int, int]:
    """The grid from the rotary table or the training flags, if the file carries them."""
    if "freqs_cis" in tensors:
        side = round((tensors["freqs_cis"].shape[0] - num_condition) ** 0.5)
    elif "image_size" in arguments:
        side = int(arguments["image_size"]) // int(arguments.get("downsample_size", 16))
    else:
        side = 16
        warnings.warn(f"{path} does not tell its grid; taking 16 x 16 (pass grid=)", stacklevel=4)
    return side, side
