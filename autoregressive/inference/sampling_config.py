"""How codes are sampled from logits: guidance, filters, seed."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal


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
