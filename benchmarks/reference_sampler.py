"""The reference's sampling algorithm, plainly: what benchmarks and tests compare ours with.

Eager; every step attends over the whole padded cache under a boolean mask, in plain arithmetic;
null rows are computed to the last code; guidance is mixed after the head; the filters sort the
whole vocabulary; a new cache and a full copy of the probabilities of every code are kept.
"""

from collections.abc import Callable, Iterator

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from autoregressive.inference.sampling_config import SamplingConfig
from autoregressive.models.gpt import GPT, Block
from autoregressive.models.rope import rotate

Draw = Callable[[torch.Tensor, int], torch.Tensor]  # probabilities (batch, vocab), position


def multinomial(probabilities: torch.Tensor, position: int) -> torch.Tensor:
    """One draw a row from torch's own generator, as the reference does."""
    return probabilities.multinomial(1)[:, 0]


def probabilities(logits: torch.Tensor, config: SamplingConfig) -> torch.Tensor:
    """Guided logits (batch, vocab) -> what the reference draws from, (batch, vocab)."""
    if config.greedy:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
    logits = logits / max(config.temperature, 1e-5)
    if config.top_k:
        least = logits.topk(min(config.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if config.top_p < 1:
        ordered, order = logits.sort(descending=True)
        outside = ordered.softmax(-1).cumsum(-1) > config.top_p
        outside = F.pad(outside[:, :-1], (1, 0))  # the first code that crosses top_p stays
        logits = logits.masked_fill(outside.scatter(1, order, outside), float("-inf"))
    return logits.softmax(-1)


def generate(
    gpt: GPT, labels: torch.Tensor, config: SamplingConfig, draw: Draw = multinomial
) -> torch.Tensor:
    """Labels (batch,) int64 -> codes (batch, height, width) int64."""
    codes = list(steps(gpt, labels, config, draw))
    return torch.stack(codes, dim=1).view(len(labels), *gpt.config.grid)


@torch.no_grad()
def steps(
    gpt: GPT, labels: torch.Tensor, config: SamplingConfig, draw: Draw = multinomial
) -> Iterator[torch.Tensor]:
    """Yield each code (batch,) int64 of the images."""
    num_codes, weight = gpt.config.num_codes, gpt.tok_embeddings.weight
    scales = config.guidance(num_codes)
    rows = torch.cat([labels, torch.full_like(labels, gpt.config.num_classes)])
    shape = (len(rows), gpt.config.kv_heads, num_codes + 1, gpt.config.head_dim)
    caches = [(weight.new_zeros(shape), weight.new_zeros(shape)) for _ in gpt.blocks]
    mask = torch.ones(num_codes + 1, num_codes + 1, device=weight.device).tril().bool()
    kept = []  # as the reference keeps them, for nothing
    x = gpt.cls_embedding(rows, torch.zeros(len(rows), dtype=torch.bool, device=weight.device))
    for position in range(num_codes):
        for block, cache in zip(gpt.blocks, caches, strict=True):
            x = _block(block, x, gpt.rotary[position : position + 1], cache, mask, position)
        conditional, null = gpt.output(gpt.norm(x))[:, -1].float().chunk(2)
        kept.append(probabilities(null + scales[position] * (conditional - null), config))
        code = draw(kept[-1], position)
        yield code
        x = gpt.tok_embeddings(code.repeat(2))[:, None]


def _block(
    block: Block,
    x: torch.Tensor,
    rotary: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor],
    mask: torch.Tensor,
    position: int,
) -> torch.Tensor:
    attention = block.attention
    heads = attention.wqkv(block.attention_norm(x)).unflatten(-1, (-1, attention.head_dim))
    kv_heads = attention.kv_heads
    queries, keys, values = heads.split([attention.num_heads, kv_heads, kv_heads], dim=-2)
    cache[0][:, :, position] = rotate(keys, rotary)[:, 0]
    cache[1][:, :, position] = values[:, 0]
    # The reference repeats keys and values even where there is nothing to repeat.
    keys, values = (part.repeat_interleave(attention.num_heads // kv_heads, 1) for part in cache)
    with sdpa_kernel(SDPBackend.MATH):  # as the reference forces
        attended = F.scaled_dot_product_attention(
            rotate(queries, rotary).transpose(1, 2),
            keys,
            values,
            attn_mask=mask[None, None, position],
        )
    x = x + attention.wo(attended.transpose(1, 2).flatten(-2))
    return x + block.feed_forward(block.ffn_norm(x))
