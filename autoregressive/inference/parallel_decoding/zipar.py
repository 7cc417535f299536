"""ZipAR: rows of codes are sampled side by side (He et al. 2024, arXiv 2412.04062).

Row 0 is sampled alone, row 1 after it; row r + 1 begins as soon as row r has `window` codes, and
every open row gets one code per step. An image of g x g codes takes 2 g + (g - 2) window steps
instead of g^2. Codes no longer see the end of the row above, so the images change, and for most
models get worse with a smaller window; nothing is trained. With a window of a whole row, the images
are those of raster order.

The first code of a row follows the last code of the row above, which may not exist yet. As in the
published code, the newest code two rows up stands in for it; once the true code is sampled, it is
run at its position and replaces the keys and values there. The published code lets codes attend to
cache slots that nothing was written to; here they are masked.
"""

import functools
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


class ZipARStep(NamedTuple):
    """What one step runs, as grid positions in raster order.

    sampled: Positions that get a code, from the uppermost open row to the lowest.
    repeated: Positions whose true code is run again, in place of a placeholder.
    placeholders: Pairs of a position without a code and the position whose code stands in for it.
    done: Final codes after this step, counted up to the first gap.
    """

    sampled: list[int]
    repeated: list[int]
    placeholders: list[tuple[int, int]]
    done: int

    @property
    def inputs(self) -> list[int]:
        """Positions whose codes the step runs: those before the sampled ones, then the repeated."""
        return [position - 1 for position in self.sampled] + self.repeated


def zipar_schedule(grid: tuple[int, int], window: int) -> Iterator[ZipARStep]:
    """The steps after the first code, for a grid of (rows, columns)."""
    (rows, columns), window = grid, min(window, grid[1])
    # Row r gets its code c in step starts[r] + c.
    starts = [0, *(columns + window * row for row in range(rows - 1))]
    for step in range(1, starts[-1] + columns):
        open_rows = [row for row in range(rows) if 0 <= step - starts[row] < columns]
        late = [row for row in range(1, rows) if starts[row] < step == starts[row - 1] + columns]
        early = [row for row in open_rows[1:] if step == starts[row]]
        counts = [min(max(0, step - start), columns) for start in starts]
        next_counts = [min(max(0, step + 1 - start), columns) for start in starts]
        first = next((row for row in open_rows if next_counts[row] < columns), open_rows[-1])
        if next_counts[first] == columns and first + 1 < rows:
            first += 1
        yield ZipARStep(
            [row * columns + counts[row] for row in open_rows],
            [row * columns - 1 for row in late],
            [(row * columns - 1, (row - 2) * columns + counts[row - 2] - 1) for row in early],
            first * columns + next_counts[first],
        )


@torch.no_grad()
def zipar_steps(
    engine: InferenceEngine, request: GenerationRequest
) -> Iterator[tuple[torch.Tensor, int]]:
    """Like InferenceEngine.steps; a step samples the next code of every open row."""
    config, sampler = engine.config, request.sampler
    assert request.zipar_window is not None
    guided_until = num_guided_codes(request.cfg_scales)
    state = engine.begin(request)
    longest, _ = engine.prefill(request, state, guided_until > 0)
    codes = state.codes[:, : config.num_codes]
    yield codes, 1
    steps = list(zipar_schedule(config.grid, request.zipar_window))
    widest = max((len(step.inputs) for step in steps), default=0)
    padded = [step.inputs + [0] * (widest - len(step.inputs)) for step in steps]
    plan = torch.tensor(padded, dtype=torch.int64).view(-1, widest).to(engine.device)
    for step, inputs in zip(steps, plan, strict=True):
        count, sampled = len(step.inputs), len(step.sampled)
        for position, source in step.placeholders:
            forced = state.forced_codes[:, position]
            codes[:, position] = torch.where(forced < 0, codes[:, source], forced)
        state.inputs[:count] = inputs[:count]
        state.written.index_fill_(0, inputs[:count], True)
        guided = step.sampled[0] < guided_until
        kv_end, _ = engine.kv_extent(longest + max(step.inputs) + 1, needs_mask=True)
        run = functools.partial(_step, engine, state, sampled, count, guided, kv_end, sampler)
        key = "zipar", state.batch, sampled, count, guided, kv_end, sampler
        engine.advance(key, state, run, request.eager)
        yield codes, step.done


def _step(
    engine: InferenceEngine,
    state: GenerationState,
    sampled: int,
    count: int,
    guided: bool,
    kv_end: int,
    sampler: Sampler,
) -> None:
    """Run the first `count` positions of state.inputs; sample a code after each of the first."""
    positions = state.inputs[:count].expand(state.batch, -1)
    hidden = engine.hidden(state, positions, guided, kv_end, None, state.written)
    following = positions[:, :sampled] + 1
    logits = engine.logits(state, hidden[:, :sampled], following, guided)
    state.sample(sampler, logits, following)
