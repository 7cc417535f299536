"""Requests to vLLM, checked before they reach its engine.

A model of codes has no text tokenizer, so vLLM itself checks no token id. These functions build
what `LLM.generate` and `AsyncLLM.generate` take, and raise ValueError with one line where a class,
a code, a caption or a setting is wrong.
"""

from collections.abc import Sequence
from typing import Any

import torch

from autoregressive.models.config import GPTConfig
from autoregressive.serving.guidance import parse_guidance

TAKES_GUIDANCE = "this model takes guidance as an input: give condition_prompt its tokens"


def class_prompt(config: GPTConfig, label: int, codes: Sequence[int] = ()) -> dict[str, Any]:
    """The prompt of a class model: the class's token, then the codes that are already known.

    label: 0 .. num_classes - 1. codes: the image's first codes in raster order, fewer than an
    image has.
    """
    if config.condition != "class":
        raise ValueError("this model is conditioned on captions, not on classes")
    if config.guidance_input:
        raise ValueError(TAKES_GUIDANCE)
    if not _is_index(label, config.num_classes):
        raise ValueError(f"class is {label!r}, must be in 0 .. {config.num_classes - 1}")
    if len(codes) >= config.num_codes:
        raise ValueError(f"{len(codes)} codes are given, an image has {config.num_codes}")
    for code in codes:
        if not _is_index(code, config.vocab_size):
            raise ValueError(f"code is {code!r}, must be in 0 .. {config.vocab_size - 1}")
    return {"prompt_token_ids": [config.vocab_size + label, *codes]}


def caption_prompt(config: GPTConfig, features: torch.Tensor) -> dict[str, Any]:
    """The prompt of a text model: the caption's features (n, text_dim), n in 1 .. max_text_tokens.

    Features are those of the text encoder that the model was trained with, without padding.
    """
    if config.condition != "text":
        raise ValueError("this model is conditioned on classes, not on captions")
    if config.guidance_input:
        raise ValueError(TAKES_GUIDANCE)
    _check_rows("caption features", features, config.text_dim)
    if not 1 <= len(features) <= config.max_text_tokens:
        raise ValueError(
            f"the caption has {len(features)} tokens, must have 1 .. {config.max_text_tokens}"
        )
    embedded = torch.nn.functional.pad(features, (0, prompt_width(config) - config.text_dim))
    return {"prompt_embeds": embedded}


def condition_prompt(config: GPTConfig, tokens: torch.Tensor) -> dict[str, Any]:
    """The prompt of a model that takes guidance as an input: its condition tokens (n, dim).

    They hold the class or caption and the strength of guidance; see GPT.prefix. vLLM's prefix
    cache is told apart by their values.
    """
    if not config.guidance_input:
        raise ValueError("this model does not take guidance as an input; use its class or caption")
    _check_rows("condition tokens", tokens, config.dim)
    if not 1 <= len(tokens) <= config.num_condition:
        raise ValueError(
            f"there are {len(tokens)} condition tokens, must be 1 .. {config.num_condition}"
        )
    return {"prompt_embeds": tokens}


def _check_rows(name: str, rows: torch.Tensor, width: int) -> None:
    """Raise ValueError unless `rows` are finite floats (n, width)."""
    if rows.ndim != 2 or rows.shape[1] != width or not rows.is_floating_point():
        raise ValueError(f"{name} are {tuple(rows.shape)}, must be (n, {width})")
    if not bool(rows.isfinite().all()):
        raise ValueError(f"{name} must be finite")


def prompt_width(config: GPTConfig) -> int:
    """Columns of `prompt_embeds`, which code embeddings share; features are padded with zeros."""
    return config.dim if config.guidance_input else max(config.text_dim, config.dim)


def sampling_arguments(
    config: GPTConfig,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    num_known: int = 0,
    **guidance: Any,  # noqa: ANN401 - cfg_scale and the other fields of guidance.FIELDS
) -> dict[str, Any]:
    """Keyword arguments of vLLM's SamplingParams for the rest of one image.

    temperature: 0 takes the likeliest code. top_k: 0 for all codes. seed: vLLM repeats a request
    of the same seed; its random numbers are not those of `generate`. num_known: codes in the
    prompt.
    """
    parse_guidance(guidance)
    if guidance and config.guidance_input:
        raise ValueError(f"{', '.join(guidance)}: this model takes guidance in its prompt")
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError("temperature and top_k must be >= 0, top_p in (0, 1]")
    if not 0 <= num_known < config.num_codes:
        raise ValueError(f"{num_known} codes are known, must be in 0 .. {config.num_codes - 1}")
    return {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "max_tokens": config.num_codes - num_known,
        "ignore_eos": True,
        "detokenize": False,
        "extra_args": guidance,
    }


def _is_index(value: object, count: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < count
