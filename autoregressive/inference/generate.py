"""From a condition to codes: guided, filtered, seeded sampling."""

from collections.abc import Iterator
from typing import Any

import torch

from autoregressive.inference.engine import InferenceEngine, engine_of
from autoregressive.inference.generation import GenerationRequest
from autoregressive.inference.parallel_decoding.regions import region_steps
from autoregressive.inference.parallel_decoding.zipar import zipar_steps
from autoregressive.inference.sampler import TopKTopPSampler
from autoregressive.inference.sampling_config import SamplingConfig
from autoregressive.models.conditioning import ConditionLike, as_condition
from autoregressive.models.config import GPTConfig
from autoregressive.models.gpt import GPT
from core.config import InputError
from core.rng import random_bits


def generate(
    gpt: GPT | InferenceEngine,
    condition: ConditionLike,
    cfg_scale: float | None = None,
    cfg_interval: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    greedy: bool = False,
    seed: int = 0,
    sample_ids: torch.Tensor | None = None,
    negative: ConditionLike | None = None,
    forced_codes: torch.Tensor | None = None,
    **more: Any,  # noqa: ANN401 - fields of SamplingConfig
) -> torch.Tensor:
    """Sample the codes of one image per condition -> (batch, height, width) int64.

    cfg_scale to seed, and `more` (cfg_start, cfg_schedule, ...): the
    fields of SamplingConfig. For the other arguments and what is raised, see `sample_codes`.
    """
    sampling = SamplingConfig(
        cfg_scale, cfg_interval, temperature, top_k, top_p, greedy, seed, **more
    )
    return sample_codes(gpt, condition, sampling, sample_ids, negative, forced_codes)


def sample_codes(
    engine: GPT | InferenceEngine,
    condition: ConditionLike,
    sampling: SamplingConfig,
    sample_ids: torch.Tensor | None = None,
    negative: ConditionLike | None = None,
    forced_codes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sample the codes of one image per condition -> (batch, height, width) int64.

    engine: an engine, which keeps its packed weights, caches and graphs; or a model.
    condition: labels (batch,) int64, (features (batch, T, text_dim), lengths (batch,) int64), or
        a Condition.
    sample_ids: (batch,) int64, default 0 .. batch - 1. Sample i's randomness depends only on
        (seed, sample_ids[i], position), not on the batch.
    negative: a condition per image that guidance leads away from, instead of the null condition.
    forced_codes: (batch, height, width) int64, codes to use instead of sampled ones; -1: sample.
        Codes are sampled in raster order (or that of parallel_regions), each from the codes before
        it; forced codes after it have no influence on it.
    Raises InputError (a ValueError) for arguments that do not fit the model.
    """
    request = generation_request(engine, condition, sampling, sample_ids, negative, forced_codes)
    *_, (codes, _) = generate_steps(engine, request)  # one buffer, yielded at every step
    return codes.unflatten(1, engine.config.grid).clone()


def generate_rows(
    engine: GPT | InferenceEngine, request: GenerationRequest
) -> Iterator[torch.Tensor]:
    """Sample row by row, for previews: yields codes (batch, rows so far, width) int64."""
    width, rows = engine.config.grid[1], 0
    for codes, done in generate_steps(engine, request):
        if done // width > rows:
            rows = done // width
            yield codes[:, : rows * width].unflatten(1, (rows, width)).clone()


def generate_steps(
    engine: GPT | InferenceEngine, request: GenerationRequest
) -> Iterator[tuple[torch.Tensor, int]]:
    """Sample step by step: yields one buffer (batch, codes) int64, and how many are final."""
    if not isinstance(engine, InferenceEngine):
        engine = engine_of(engine)
    if engine.config.parallel_regions:
        return region_steps(engine, request)
    return zipar_steps(engine, request) if request.zipar_window else engine.steps(request)


def generation_request(
    engine: GPT | InferenceEngine,
    condition: ConditionLike,
    sampling: SamplingConfig,
    sample_ids: torch.Tensor | None = None,
    negative: ConditionLike | None = None,
    forced_codes: torch.Tensor | None = None,
) -> GenerationRequest:
    """The checked arguments of `sample_codes`, as the engine takes them."""
    condition = as_condition(condition)
    engine.cls_embedding.check(condition)
    if negative is not None:
        negative = as_condition(negative)
        engine.cls_embedding.check(negative)
        if len(negative) != len(condition):
            raise InputError(f"negative: expected {len(condition)} conditions, got {len(negative)}")
    ids = torch.arange(len(condition)) if sample_ids is None else sample_ids
    if ids.shape != (len(condition),):
        raise InputError(
            f"sample_ids: expected ({len(condition)},), one per condition, got {tuple(ids.shape)}"
        )
    config = engine.config
    sampling.check_order(config.parallel_regions)
    sampling = sampling.resolved(config.condition, config.guidance_input)
    if sampling.guidance is not None and not config.guidance_input:
        raise InputError("guidance: this model does not take it as an input; use cfg_scale")
    return GenerationRequest(
        condition,
        negative,
        sampling.cfg_scales(config.num_codes),
        random_bits(sampling.seed, ids[:, None]),
        TopKTopPSampler(sampling.temperature, sampling.top_k or 0, sampling.top_p, sampling.greedy),
        None if forced_codes is None else _flat_codes(config, forced_codes, len(condition)),
        sampling.speculation_window,
        guidance=sampling.guidance,
        speculative_rule=sampling.speculative_rule,
        speculative_guess=sampling.speculative_guess,
        zipar_window=sampling.zipar_window,
    )


def _flat_codes(config: GPTConfig, forced_codes: torch.Tensor, batch: int) -> torch.Tensor:
    """Forced codes as (batch, codes); raises InputError for a wrong shape or code."""
    (height, width), last = config.grid, config.vocab_size - 1
    flat = forced_codes.flatten(1)
    if forced_codes.shape != (batch, height, width) or not -1 <= flat.min() <= flat.max() <= last:
        raise InputError(f"forced_codes must be ({batch}, {height}, {width}), each in -1 .. {last}")
    return flat
