"""The reference's sampling algorithm, written plainly: the baseline of benchmarks and tests.

It runs eagerly. Every step attends to the whole padded cache under a boolean mask, with
unfused arithmetic; unconditional rows are computed to the last code; guidance is applied after the
head; the filters sort the whole vocabulary; the cache is new for each batch, and a copy of every
code's probabilities is kept.
"""

import functools
from collections.abc import Callable, Iterator

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from autoregressive.inference.sampling_config import SamplingConfig
from autoregressive.models.conditioning import ClassCondition
from autoregressive.models.gpt import GPT

Sampler = Callable[[torch.Tensor, int], torch.Tensor]  # probabilities (batch, vocab), position


def multinomial(probabilities: torch.Tensor, position: int) -> torch.Tensor:
    """One sample per row from torch's own generator, as the reference does."""
    return probabilities.multinomial(1)[:, 0]


def probabilities(logits: torch.Tensor, config: SamplingConfig) -> torch.Tensor:
    """Guided logits (batch, vocab) -> the distribution that the reference samples, (batch, vocab).

    config: resolved.
    """
    if config.greedy:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
    logits = logits / max(config.temperature, 1e-5)
    if config.top_k:
        smallest = logits.topk(min(config.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if config.top_p < 1:
        ordered, order = logits.sort(descending=True)
        outside = ordered.softmax(-1).cumsum(-1) > config.top_p
        outside = F.pad(outside[:, :-1], (1, 0))  # keep the first code that crosses top_p
        logits = logits.masked_fill(outside.scatter(1, order, outside), float("-inf"))
    return logits.softmax(-1)


def generate(
    gpt: GPT, labels: torch.Tensor, config: SamplingConfig, sampler: Sampler = multinomial
) -> torch.Tensor:
    """Labels (batch,) int64 -> codes (batch, height, width) int64; config must be resolved."""
    codes = list(steps(gpt, labels, config, sampler))
    return torch.stack(codes, dim=1).view(len(labels), *gpt.config.grid)


@torch.no_grad()
def steps(
    gpt: GPT, labels: torch.Tensor, config: SamplingConfig, sampler: Sampler = multinomial
) -> Iterator[torch.Tensor]:
    """Yield each code (batch,) int64 of the images."""
    num_codes, weight = gpt.config.num_codes, gpt.tok_embeddings.weight
    cfg_scales = config.cfg_scales(num_codes)
    rows = torch.cat([labels, torch.full_like(labels, gpt.config.num_classes)])
    shape = (len(rows), gpt.config.kv_heads, num_codes + 1, gpt.config.head_dim)
    caches = [(weight.new_zeros(shape), weight.new_zeros(shape)) for _ in gpt.blocks]
    mask = torch.ones(num_codes + 1, num_codes + 1, device=weight.device).tril().bool()
    kept = []  # as the reference does, without using them
    keep_condition = torch.zeros(len(rows), dtype=torch.bool, device=weight.device)
    x = gpt.cls_embedding(ClassCondition(rows), keep_condition)
    for position in range(num_codes):
        rotary = gpt.rotary[position : position + 1]
        for block, cache in zip(gpt.blocks, caches, strict=True):
            x = block(x, rotary, functools.partial(_attend, cache, mask, position))
        conditional, null = gpt.output(gpt.norm(x))[:, -1].float().chunk(2)
        guided = null + cfg_scales[position] * (conditional - null)
        kept.append(probabilities(guided, config))
        code = sampler(kept[-1], position)
        yield code
        x = gpt.tok_embeddings(code.repeat(2))[:, None]


def _attend(
    cache: tuple[torch.Tensor, torch.Tensor],
    mask: torch.Tensor,
    position: int,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> torch.Tensor:
    """The reference's attention over the whole cache; see transformer.Attend for the shapes."""
    for stored, new in zip(cache, (keys, values), strict=True):
        stored[:, :, position] = new[:, 0]
    # The reference repeats keys and values even if every head has its own.
    repeats = queries.shape[2] // keys.shape[2]
    all_keys, all_values = (stored.repeat_interleave(repeats, 1) for stored in cache)
    with sdpa_kernel(SDPBackend.MATH):  # the reference forces this kernel
        attended = F.scaled_dot_product_attention(
            queries.transpose(1, 2), all_keys, all_values, attn_mask=mask[None, None, position]
        )
    return attended.transpose(1, 2)
