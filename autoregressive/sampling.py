"""From a condition to codes: guided, filtered, seeded sampling."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from autoregressive.conditioning import Condition
from autoregressive.decoding import Decoder, Request, decoder_of
from autoregressive.drawing import Drawing
from autoregressive.model import GPT, GPTConfig
from core.config import InputError
from core.randomness import random_bits


@dataclass(frozen=True)
class SamplingConfig:
    """How codes are drawn from logits.

    Args:
        cfg_scale: Classifier-free guidance, logits = null + cfg_scale * (conditional - null);
            1 for none, null for the usual: 2.0 under classes, 7.5 under text.
        cfg_interval: The first cfg_interval + 2 codes are guided, the rest are not; -1 guides all.
        temperature: Divides the logits.
        top_k: Only the top_k likeliest codes (and those that tie); 0 for all, null for the
            usual: all under classes, 1000 under text.
        top_p: Only the likeliest codes that together reach this probability (and those that tie
            with the last of them); 1 for all.
        greedy: Always the likeliest code.
        seed: Sample i's codes depend on (seed, i) alone.
        cfg_start: Guidance begins at this code: with constant guidance a step up, with
            cfg_interval too an interval.
        cfg_schedule: constant, or from 1 at the first code towards cfg_scale at the last, in a
            straight line or along half a cosine wave.
        cfg_power: Exponent of the progress in a linear or cosine schedule; a cosine's above 1 is
            the power-cosine of RAR (arXiv 2411.00776).
        speculative: Codes drawn in a step, by guessing ahead; 0 draws one by one. The pictures are
            the same; what it saves depends on the model, and pays at small batches alone.
    """

    cfg_scale: float | None = None
    cfg_interval: int = -1
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    greedy: bool = False
    seed: int = 0
    cfg_start: int = 0
    cfg_schedule: Literal["constant", "linear", "cosine"] = "constant"
    cfg_power: float = 1.0
    speculative: int = 0

    def __post_init__(self) -> None:
        # Saved configurations of before spell "the usual" 0 and -1.
        if self.cfg_scale == 0:
            object.__setattr__(self, "cfg_scale", None)
        if self.top_k == -1:
            object.__setattr__(self, "top_k", None)
        if self.cfg_scale is not None and self.cfg_scale < 1:
            raise ValueError(f"cfg_scale is {self.cfg_scale}, must be >= 1 (1: no guidance)")
        if self.cfg_interval < -1:
            raise ValueError(f"cfg_interval is {self.cfg_interval}, must be >= -1 (-1: all codes)")
        if self.cfg_start < 0 or self.cfg_power <= 0:
            raise ValueError("cfg_start must be >= 0, cfg_power > 0")
        if self.temperature < 0 or (self.top_k is not None and self.top_k < 0):
            raise ValueError("temperature and top_k must be >= 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, must be in (0, 1]")
        if self.speculative < 0:
            raise ValueError(f"speculative is {self.speculative}, must be >= 0 (0: one by one)")

    def resolved(self, condition: str) -> "SamplingConfig":
        """With the usual values for a model under `condition`, class or text, filled in."""
        usual_scale, usual_k = (7.5, 1000) if condition == "text" else (2.0, 0)
        return replace(
            self,
            cfg_scale=usual_scale if self.cfg_scale is None else self.cfg_scale,
            top_k=usual_k if self.top_k is None else self.top_k,
        )

    def arguments(self, condition: str) -> dict[str, Any]:
        """The arguments of `generate` for a model under `condition`: class or text."""
        return asdict(self.resolved(condition))

    def guidance(self, num_codes: int) -> list[float]:
        """The scale of guidance at each code, of resolved settings; 1 where there is none."""
        assert self.cfg_scale is not None
        last = num_codes - 1 if self.cfg_interval == -1 else self.cfg_interval + 1
        return [
            1 + (self.cfg_scale - 1) * self._share(position / num_codes)
            if self.cfg_start <= position <= last
            else 1.0
            for position in range(num_codes)
        ]

    def _share(self, progress: float) -> float:
        """How much of the guidance acts after this share of the codes."""
        if self.cfg_schedule == "constant":
            return 1.0
        progress = progress**self.cfg_power
        return progress if self.cfg_schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2


def generate(
    gpt: GPT | Decoder,
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
    gpt: GPT | Decoder,
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
    gpt: GPT | Decoder,
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
    decoder = gpt if isinstance(gpt, Decoder) else decoder_of(gpt)
    return decoder.steps(request)


def request_of(
    gpt: GPTConfig,
    condition: Condition,
    config: SamplingConfig,
    sample_ids: torch.Tensor,
    negative: Condition | None = None,
    known: torch.Tensor | None = None,
) -> Request:
    """What a decoder is asked for; InputError for known codes that are none."""
    config = config.resolved(gpt.condition)
    assert config.top_k is not None
    return Request(
        condition,
        negative,
        config.guidance(gpt.num_codes),
        random_bits(config.seed, sample_ids[:, None]),
        Drawing(config.temperature, config.top_k, config.top_p, config.greedy),
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
