"""Sampling with a model that has parallel_regions: one code of each region per step (PAR).

The order of the codes and the learned tokens are those of models/parallel_regions.py. n regions
take codes / n + n - 1 steps: of 24 x 24 codes 147 at n = 4, and 51 at n = 16.
"""

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from autoregressive.inference.engine import InferenceEngine
from autoregressive.inference.generation import (
    GenerationRequest,
    GenerationState,
    Sampler,
    num_guided_codes,
)


class RegionStep(NamedTuple):
    """What one step samples, as places in the order of the codes.

    first, count: It samples the codes first .. first + count - 1.
    done: Final codes after this step, in raster order, counted up to the first gap.
    """

    first: int
    count: int
    done: int


def region_schedule(grid: tuple[int, int], regions: int) -> Iterator[RegionStep]:
    """The steps after the first code, for a grid of (rows, columns)."""
    (rows, columns), width = grid, grid[1] // math.isqrt(regions)
    num_codes = rows * columns
    for first in (*range(1, regions), *range(regions, num_codes, regions)):
        count = 1 if first < regions else regions
        final = (first + count) // regions  # of the codes of every region
        done = max(1, final // width * columns + final % width)
        yield RegionStep(first, count, num_codes if first + count == num_codes else done)


@torch.no_grad()
def region_steps(
    engine: InferenceEngine, request: GenerationRequest
) -> Iterator[tuple[torch.Tensor, int]]:
    """Like InferenceEngine.steps; a step samples the next code of every region."""
    config, sampler = engine.config, request.sampler
    assert config.parallel_regions is not None
    regions, num_codes = config.parallel_regions, config.num_codes
    guided_until = num_guided_codes(request.cfg_scales)
    state = engine.begin(request)
    longest, ragged = engine.prefill(request, state, guided_until > 0)
    codes = state.codes[:, :num_codes]
    yield codes, 1
    places = torch.arange(num_codes, device=engine.device)
    for step in region_schedule(config.grid, regions):
        state.inputs[: step.count] = places[step.first : step.first + step.count]
        guided, begins = step.first < guided_until, step.first == regions
        length = longest + step.first - 1 + step.count
        kv_end, masked = engine.kv_extent(length, ragged)
        kv_length = None if masked else length
        run = functools.partial(
            _step, engine, state, step.count, begins, guided, kv_end, kv_length, sampler
        )
        key = "regions", state.batch, step.count, begins, guided, kv_end, masked, sampler
        engine.advance(key, state, run, request.eager)
        yield codes, step.done


def _step(
    engine: InferenceEngine,
    state: GenerationState,
    count: int,
    begins: bool,
    guided: bool,
    kv_end: int,
    kv_length: int | None,
    sampler: Sampler,
) -> None:
    """Sample the codes at the first `count` places of state.inputs, from the tokens before them.

    begins: These are the first group, which follows the learned tokens.
    """
    order, learned = engine.region_order, engine.region_tokens
    assert order is not None and learned is not None
    sampled = state.inputs[:count].expand(state.batch, -1)
    known = (sampled - count)[:, -1:] if begins else sampled - count
    positions = order[known]
    x = engine.embedding[state.codes.gather(1, positions)]
    rows = engine.config.num_condition + positions
    if begins:
        x = torch.cat([x, learned.expand(state.batch, -1, -1)], dim=1)
        condition = torch.full_like(sampled[:, 1:], engine.config.num_condition - 1)
        rows = torch.cat([rows, condition], dim=1)
    rotary = engine.rotary[rows]
    is_group = count > 1
    hidden = engine.run(state, x, rotary, sampled - 1, guided, kv_end, kv_length, is_group=is_group)
    logits = engine.logits(state, hidden, sampled, guided)
    state.sample(sampler, logits, order[sampled])
