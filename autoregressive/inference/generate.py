"""From a condition to codes: guided, filtered, seeded sampling."""

from collections.abc import Iterator
from typing import Any

import torch

from autoregressive.inference.engine import GenerationRequest, InferenceEngine, engine_of
from autoregressive.inference.sampler import TopKTopPSampler
from autoregressive.inference.sampling_config import SamplingConfig
from autoregressive.models.conditioning import Condition
from autoregressive.models.config import GPTConfig
from autoregressive.models.gpt import GPT
from core.config import InputError
from core.rng import random_bits


def generate(
    gpt: GPT | InferenceEngine,
    condition: Condition,
    cfg_scale: float | None = None,
    cfg_interval: int = -1,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    greedy: bool = False,
    seed: int = 0,
    sample_ids: torch.Tensor | None = None,
    negative: Condition | None = None,
    known: torch.Tensor | None = None,
    **more: Any,  # noqa: ANN401 - fields of SamplingConfig
) -> torch.Tensor:
    """Draw one image's codes per condition -> (batch, height, width) int64.

    gpt: a model, or a Decoder of one, which keeps its packed weights, caches and graphs.
    condition: labels (batch,) int64, or (features (batch, T, text_dim), lengths (batch,)).
    sample_ids: (batch,) int64, 0 .. batch - 1 by default; sample i's randomness depends on
        (seed, sample_ids[i], position) alone, not on the batch.
    negative: A condition per image that guidance leads away from, in place of the null condition.
    known: (batch, height, width) int64, codes that are given, -1 where a code is to be drawn. A
        code is drawn from the codes before it in raster order: given codes after it are not seen.
    cfg_scale, top_k: None for the usual of the model's condition, as SamplingConfig says.
    more: cfg_start, cfg_schedule, cfg_power, speculative; these and the other arguments are those
        of SamplingConfig. Raises ValueError for what cannot be sampled.
    """
    config = SamplingConfig(
        cfg_scale, cfg_interval, temperature, top_k, top_p, greedy, seed, **more
    )
    # One buffer, yielded at every step.
    *_, (codes, _) = generate_steps(gpt, condition, config, sample_ids, negative, known)
    return codes.unflatten(1, gpt.config.grid).clone()


def generate_rows(
    gpt: GPT | InferenceEngine,
    condition: Condition,
    config: SamplingConfig,
    sample_ids: torch.Tensor | None = None,
    negative: Condition | None = None,
    known: torch.Tensor | None = None,
) -> Iterator[torch.Tensor]:
    """Like `generate`, row by row: yields codes (batch, rows so far, width), to show it growing."""
    width, rows = gpt.config.grid[1], 0
    for codes, done in generate_steps(gpt, condition, config, sample_ids, negative, known):
        if done // width > rows:
            rows = done // width
            yield codes[:, : rows * width].unflatten(1, (rows, width)).clone()


def generate_steps(
    gpt: GPT | InferenceEngine,
    condition: Condition,
    config: SamplingConfig,
    sample_ids: torch.Tensor | None = None,
    negative: Condition | None = None,
    known: torch.Tensor | None = None,
) -> Iterator[tuple[torch.Tensor, int]]:
    """The same step by step: yields one buffer (batch, codes) int64, and how many are drawn."""
    for given in (condition, negative):
        if given is not None:
            gpt.cls_embedding.check(given)
    count = len(condition if isinstance(condition, torch.Tensor) else condition[1])
    ids = torch.arange(count) if sample_ids is None else sample_ids
    if ids.shape != (count,):
        raise InputError(f"sample_ids: expected ({count},), one a condition, got {ids.shape}")
    request = request_of(gpt.config, condition, config, ids, negative, known)
    decoder = gpt if isinstance(gpt, InferenceEngine) else engine_of(gpt)
    return decoder.steps(request)


def request_of(
    gpt: GPTConfig,
    condition: Condition,
    config: SamplingConfig,
    sample_ids: torch.Tensor,
    negative: Condition | None = None,
    known: torch.Tensor | None = None,
) -> GenerationRequest:
    """What a decoder is asked for; InputError for known codes that are none."""
    config = config.resolved(gpt.condition)
    assert config.top_k is not None
    return GenerationRequest(
        condition,
        negative,
        config.guidance(gpt.num_codes),
        random_bits(config.seed, sample_ids[:, None]),
        TopKTopPSampler(config.temperature, config.top_k, config.top_p, config.greedy),
        None if known is None else check_known(gpt, known),
        max(1, config.speculative),
    )


def check_known(gpt: GPTConfig, known: torch.Tensor) -> torch.Tensor:
    """Given codes as (batch, codes); raises InputError for what is none."""
    grid, vocab_size = gpt.grid, gpt.vocab_size
    if known.shape[1:] != grid or not -1 <= int(known.min()) <= int(known.max()) < vocab_size:
        raise InputError(
            f"known codes must be (batch, {grid[0]}, {grid[1]}), each in -1 .. {vocab_size - 1}"
        )
    return known.flatten(1)
