"""From a condition to codes: guided, filtered, seeded sampling over a key-value cache."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn import functional as F

from autoregressive.conditioning import Condition
from autoregressive.model import GPT
from core.config import InputError
from core.randomness import random_uniform


@dataclass(frozen=True)
class SamplingConfig:
    """How codes are drawn from logits.

    Args:
        cfg_scale: Classifier-free guidance, logits = null + cfg_scale * (conditional - null);
            1 for none, 0 for the usual: 2.0 under classes, 7.5 under text.
        cfg_interval: The first cfg_interval + 2 codes are guided, the rest are not; -1 guides all.
        temperature: Divides the logits.
        top_k: Only the top_k likeliest codes (and those that tie); 0 for all, -1 for the usual:
            all under classes, 1000 under text.
        top_p: Only the likeliest codes that together reach this probability; 1 for all.
        greedy: Always the likeliest code.
        seed: Sample i's codes depend on (seed, i) alone.
    """

    cfg_scale: float = 0.0
    cfg_interval: int = -1
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    greedy: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.cfg_scale < 1 and self.cfg_scale != 0:
            raise ValueError(f"cfg_scale is {self.cfg_scale}, must be >= 1 (1: no guidance)")
        if self.cfg_interval < -1:
            raise ValueError(f"cfg_interval is {self.cfg_interval}, must be >= -1 (-1: all codes)")
        if self.temperature < 0 or self.top_k < -1:
            raise ValueError("temperature must be >= 0, top_k >= -1")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, must be in (0, 1]")

    def arguments(self, condition: str) -> dict[str, Any]:
        """The arguments of `generate` for a model under `condition`: class or text."""
        usual_scale, usual_k = (7.5, 1000) if condition == "text" else (2.0, 0)
        scale = self.cfg_scale or usual_scale
        top_k = usual_k if self.top_k == -1 else self.top_k
        return {**asdict(self), "cfg_scale": scale, "top_k": top_k}

    def guides(self, position: int) -> bool:
        """Whether code number `position` is drawn from guided logits."""
        inside = self.cfg_interval == -1 or position <= self.cfg_interval + 1
        return self.cfg_scale > 1 and inside


@torch.no_grad()
def generate(
    gpt: GPT,
    condition: Condition,
    cfg_scale: float = 2.0,
    cfg_interval: int = -1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    greedy: bool = False,
    seed: int = 0,
    sample_ids: torch.Tensor | None = None,
    negative: Condition | None = None,
    known: torch.Tensor | None = None,
) -> torch.Tensor:
    """Draw one image's codes per condition -> (batch, height, width) int64.

    condition: labels (batch,) int64, or (features (batch, T, text_dim), lengths (batch,)).
    sample_ids: (batch,) int64, 0 .. batch - 1 by default; sample i's randomness depends on
        (seed, sample_ids[i], position) alone, not on the batch.
    negative: A condition per image that guidance leads away from, in place of the null condition.
    known: (batch, height, width) int64, codes that are given, -1 where a code is to be drawn. A
        code is drawn from the codes before it in raster order: given codes after it are not seen.
    The other arguments are those of SamplingConfig. Raises ValueError for what cannot be sampled.
    """
    config = SamplingConfig(cfg_scale, cfg_interval, temperature, top_k, top_p, greedy, seed)
    for given in (condition, negative):
        if given is not None:
            gpt.cls_embedding.check(given)
    if known is not None:
        known = check_known(gpt, known)
    training = gpt.training
    gpt.eval()
    try:
        return _generate(gpt, condition, config, sample_ids, negative, known)
    finally:
        gpt.train(training)


def check_known(gpt: GPT, known: torch.Tensor) -> torch.Tensor:
    """Given codes as (batch, codes) on the device; raises InputError for what is none."""
    grid, vocab_size = gpt.config.grid, gpt.config.vocab_size
    if known.shape[1:] != grid or not -1 <= int(known.min()) <= int(known.max()) < vocab_size:
        raise InputError(
            f"known codes must be (batch, {grid[0]}, {grid[1]}), each in -1 .. {vocab_size - 1}"
        )
    return known.flatten(1).to(gpt.tok_embeddings.weight.device)


def _generate(
    gpt: GPT,
    condition: Condition,
    config: SamplingConfig,
    sample_ids: torch.Tensor | None,
    negative: Condition | None,
    known: torch.Tensor | None,
) -> torch.Tensor:
    device = gpt.tok_embeddings.weight.device
    batch = len(condition if isinstance(condition, torch.Tensor) else condition[1])
    guided = config.guides(0)
    rows = _rows(condition, (negative or condition) if guided else None, device)
    ids = torch.arange(batch) if sample_ids is None else sample_ids
    ids = ids.to(device)
    dropped = torch.arange(2 * batch if guided else batch, device=device) >= batch
    if negative is not None:
        dropped.zero_()

    cache = gpt.new_cache(len(dropped))
    visible = _visible(gpt, rows, cache.keys[0].shape[2])
    codes = torch.empty(batch, gpt.config.num_codes, dtype=torch.int64, device=device)
    logits = gpt.prefill(rows, dropped, cache)
    for position in range(gpt.config.num_codes):
        if guided:
            conditional, null = logits.chunk(2)
            logits = null + config.cfg_scale * (conditional - null)
        codes[:, position] = draw(logits, config, ids, position)
        if known is not None:
            given = known[:, position]
            codes[:, position] = torch.where(given < 0, codes[:, position], given)
        if position + 1 == gpt.config.num_codes:
            break
        if guided and not config.guides(position + 1):
            # The null rows are never needed again.
            guided = False
            cache.keep_rows(batch)
            visible = None if visible is None else visible[:batch]
        new = codes[:, position]
        logits = gpt.decode_one(new.repeat(2) if guided else new, position, cache, visible)
    return codes.view(batch, *gpt.config.grid)


def _rows(condition: Condition, away: Condition | None, device: torch.device) -> Condition:
    """The condition's rows on the device, followed by those that guidance leads away from."""
    parts = [condition] if away is None else [condition, away]
    if isinstance(condition, torch.Tensor):
        return torch.cat([part.to(device) for part in parts if isinstance(part, torch.Tensor)])
    texts = [part for part in parts if isinstance(part, tuple)]
    longest = max(features.shape[1] for features, _ in texts)
    features = [F.pad(f.to(device), (0, 0, 0, longest - f.shape[1])) for f, _ in texts]
    return torch.cat(features), torch.cat([lengths.to(device) for _, lengths in texts])


def _visible(gpt: GPT, condition: Condition, capacity: int) -> torch.Tensor | None:
    """Which cache slots each row may see: all but the padding between a caption and the codes."""
    lengths = gpt.cls_embedding.lengths(condition)
    if lengths is None:
        return None
    slots = torch.arange(capacity, device=lengths.device)
    padding = (slots >= lengths[:, None]) & (slots < condition[0].shape[1])
    return ~padding[:, None, None]


def draw(
    logits: torch.Tensor, config: SamplingConfig, sample_ids: torch.Tensor, position: int
) -> torch.Tensor:
    """Logits (batch, vocab) float32 -> codes (batch,) int64, one draw each.

    Gumbel-max with noise from (seed, sample id, position, code): exact, needs no sum over the
    vocabulary, and rounding differences between batch sizes almost never change the winner.
    """
    if config.greedy:
        return logits.argmax(dim=-1)
    logits = filter_logits(logits / max(config.temperature, 1e-5), config.top_k, config.top_p)
    places = torch.full((1, 1), position, dtype=torch.int64, device=logits.device)
    entries = torch.arange(logits.shape[-1], device=logits.device)
    uniform = random_uniform(config.seed, sample_ids[:, None], places, entries)
    return (logits - torch.log(-torch.log1p(-uniform))).argmax(dim=-1)


def filter_logits(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Set what top-k, then top-p on the rest, leave out to -inf: (batch, vocab) -> the same."""
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        total = ordered.softmax(dim=-1).cumsum(dim=-1)
        before = F.pad(total[:, :-1], (1, 0))
        # The first code that crosses top_p stays.
        outside = torch.zeros_like(before, dtype=torch.bool).scatter(1, order, before > top_p)
        logits = logits.masked_fill(outside, float("-inf"))
    return logits
