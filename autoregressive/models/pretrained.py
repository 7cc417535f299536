"""Loads a GPT: a released file, a run or checkpoint folder of ours, or a Hub repository."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from autoregressive.models.config import GPTConfig
from autoregressive.models.gpt import GPT
from autoregressive.models.lora import LoRAWeights, merge_lora
from autoregressive.models.parallel_regions import REGION_TOKENS
from autoregressive.models.released_layouts import TransformerWeights, read_transformer
from autoregressive.models.transformer import infer_transformer_fields
from core.config import InputError, load_config
from core.hub import Weights
from core.released import released_architecture
from core.weights import (
    check_shapes,
    file_sha256,
    find_model,
    load_weights,
    read_file,
    tensors_sha256,
)


class Loaded(NamedTuple):
    """A GPT in eval mode, and the sha256 of the file that its weights came from."""

    gpt: GPT
    sha256: str


class Stored(NamedTuple):
    """A GPT as its file has it: not yet checked against its configuration."""

    config: GPTConfig
    tensors: dict[str, torch.Tensor]
    path: Path
    sha256: str | None = None  # of the file, where its checkpoint has recorded it
    trained_grid: tuple[int, int] | None = None  # if the configuration tells


def load_gpt(
    source: str | Path,
    weights: Weights = "auto",
    revision: str | None = None,
    verify_weights: bool = True,
    **overrides: Any,  # noqa: ANN401 - any config field
) -> Loaded:
    """Load a GPT; every tensor of the file must fit, and none may be missing.

    source: a released model's name (see autoregressive.convert --list), a released file in any
        layout of released_layouts, a checkpoint or run folder of ours, or
        `owner/name[/file][@revision]` on the Hub.
    weights: "auto" takes the EMA weights of our folders, and `model` of released files.
    revision: branch, tag or commit on the Hub.
    verify_weights: compare the files of our checkpoints with their checksums.
    overrides: fields of GPTConfig that a released file cannot tell, above all `grid`.
    LoRA weights are merged into their base, which their checkpoint names.
    Raises InputError if the weights do not fit, are damaged, or would run code.
    """
    config, tensors, path, sha256, grid = read_gpt(
        source, weights, revision, verify_weights, **overrides
    )
    if grid is not None and grid != config.grid:
        raise InputError(f"{source}: has a grid of {grid} codes, not {config.grid}: leave grid out")
    with torch.device("meta"):
        gpt = GPT(config)
    tensors = {key: value.float() for key, value in tensors.items()}
    load_weights(gpt, tensors, path, assign=True)
    gpt.build_rotary()
    return Loaded(gpt.eval(), sha256 or file_sha256(path))


def read_gpt(
    source: str | Path,
    weights: Weights = "auto",
    revision: str | None = None,
    verify_weights: bool = True,
    **overrides: Any,  # noqa: ANN401 - any config field
) -> Stored:
    """The configuration and the weights of a GPT, for the arguments of load_gpt.

    The tensors are mapped from the file and have its dtype: all processes of a node share one copy.
    """
    path, config_path, sha256 = find_model(source, weights, revision, verify_weights)
    if config_path:
        told = load_config(GPTConfig, config_path)
        tensors = read_file(path).weights("model", path)
        if told.lora:
            tensors = merge_with_base(told, tensors, path)
        config = _valid_config(source, lambda: dataclasses.replace(told, lora=None, **overrides))
        return Stored(config, tensors, path, sha256, told.grid)
    stored = read_transformer(path, weights)
    fields = {**released_architecture(source), **overrides}
    config = _valid_config(source, lambda: _infer_config(stored, path, fields))
    return Stored(config, stored.tensors, path)


def merge_with_base(
    config: GPTConfig, tensors: Mapping[str, torch.Tensor], path: Path
) -> dict[str, torch.Tensor]:
    """The weights of an ordinary GPT, of the LoRA weights in `path` and their base.

    Raises InputError if the base is missing or has other weights, or if `tensors` do not fit.
    """
    lora = config.lora
    assert lora is not None
    with torch.device("meta"):
        adapted = GPT(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    check_shapes(LoRAWeights(adapted), shapes, path)
    beside = Path(os.path.normpath(path.parent / lora.base_path)) if lora.base_path else None
    source = str(beside) if beside and beside.exists() else lora.base
    try:
        base = read_gpt(source, grid=config.grid)
    except InputError as error:
        raise InputError(f"{path}: LoRA weights, whose base cannot be loaded: {error}") from error
    if (found := tensors_sha256(base.tensors)) != lora.base_sha256:
        raise InputError(
            f"{path}: LoRA weights of another base: {source} has weights of sha256 {found[:12]}, "
            f"they were trained on {lora.base_sha256[:12]}"
        )
    return merge_lora({**base.tensors, **tensors}, lora)


def _valid_config(source: str | Path, build: Callable[[], GPTConfig]) -> GPTConfig:
    """The configuration that `build` makes; raises InputError for fields that cannot be."""
    try:
        return build()
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{source}: {error}") from error


def _infer_config(
    stored: TransformerWeights, path: Path, overrides: Mapping[str, Any]
) -> GPTConfig:
    """The configuration that keys and shapes tell, and the grid, if the file carries it."""
    tensors = stored.tensors
    try:
        fields = infer_transformer_fields(tensors, overrides.get("num_heads"))
        fields["vocab_size"] = len(tensors["tok_embeddings.weight"])
        fields["guidance_input"] = "t_embedder.mlp.0.weight" in tensors
        fields["target_position"] = "target_position.weight" in tensors
        if REGION_TOKENS in tensors:
            fields["parallel_regions"] = 1 + len(tensors[REGION_TOKENS])
    except KeyError as error:
        raise InputError(f"{path}: not a GPT of this project ({error} is missing)") from error
    except (ValueError, IndexError, ZeroDivisionError, TypeError) as error:
        raise InputError(f"{path}: weights of another shape than a GPT's ({error})") from error
    if "cls_embedding.embedding_table.weight" in tensors:
        fields["num_classes"] = tensors["cls_embedding.embedding_table.weight"].shape[0] - 1
        fields["condition"] = "class" if fields["num_classes"] else "none"
        num_condition = 1
    else:
        fields["condition"] = "text"
        null = tensors.get("cls_embedding.uncond_embedding")
        if null is None:
            raise InputError(f"{path}: neither a class nor a text embedding among the weights")
        if null.ndim != 2:
            raise InputError(f"{path}: cls_embedding.uncond_embedding is not a matrix")
        num_condition, fields["text_dim"] = null.shape
        fields["max_text_tokens"] = num_condition
    if "grid" not in overrides:
        fields["grid"] = _infer_grid(stored, num_condition, path)
    return GPTConfig(**{**fields, **overrides})


def _infer_grid(stored: TransformerWeights, num_condition: int, path: Path) -> tuple[int, int]:
    """The grid from the rotary table or the training flags, if the file carries them."""
    flags = stored.arguments
    for name in ("image_size", "downsample_size", "block_size"):
        value = flags.get(name, 1)
        if type(value) is not int or value < 1:
            raise InputError(f"{path}: its training flag {name} is {value!r}, expected a number")
    if stored.rotary_rows is not None:
        side = round((stored.rotary_rows - num_condition) ** 0.5)
    elif "image_size" in flags:
        side = int(flags["image_size"]) // int(flags.get("downsample_size", 16))
    elif "block_size" in flags:  # the number of codes
        side = round(int(flags["block_size"]) ** 0.5)
    else:
        raise InputError(
            f"{path}: does not tell its grid of codes; give --grid 16 16 for 256 px, 24 24 "
            "for 384 px or 32 32 for 512 px at 16 pixels per code (grid=(24, 24) in Python), "
            "or load it by its name in autoregressive.convert --list true"
        )
    return side, side
