"""The grid positions of the codes are an input of the transformer: any order, not only raster."""

from functools import partial

import pytest
import torch
from helpers.models import captions, tiny
from torch.nn import functional as F

from autoregressive import GPT
from autoregressive.inference.kv_cache import AttentionMetadata, PrefixCache
from autoregressive.models.conditioning import as_condition

LABELS = torch.tensor([0, 4, 2])
RASTER = torch.arange(16).expand(3, -1)


def codes_and_orders() -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (3, 16) in raster order, and an order of its own for each image."""
    torch.manual_seed(2)
    orders = torch.stack([torch.randperm(16) for _ in LABELS])
    return torch.randint(50, (3, 16)), orders


def full_attention(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Every position attends to every position, so that the order has no meaning of its own."""
    heads_first = (part.transpose(1, 2) for part in (queries, keys, values))
    return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)


def test_raster_order_is_the_default():
    gpt, (codes, _) = tiny(), codes_and_orders()
    assert torch.equal(gpt(codes, LABELS), gpt(codes, LABELS, positions=RASTER))
    assert torch.equal(gpt(codes, LABELS), gpt(codes, LABELS, positions=RASTER[:1]))


@torch.no_grad()
@pytest.mark.parametrize("qk_norm", [False, True])
def test_blocks_of_permuted_codes_and_positions_give_the_permuted_result(qk_norm):
    gpt, (codes, orders) = tiny(qk_norm=qk_norm), codes_and_orders()
    expected = gpt.tok_embeddings(codes)
    permuted = gpt.tok_embeddings(codes.gather(1, orders))
    rotary = gpt.rotary[gpt.config.num_condition :]
    for block in gpt.blocks:
        expected = block(expected, rotary.expand(3, -1, -1, -1), full_attention)
        permuted = block(permuted, rotary[orders], full_attention)
    by_order = expected.gather(1, orders[..., None].expand_as(expected))
    torch.testing.assert_close(permuted, by_order)


@torch.no_grad()
def test_the_order_of_the_codes_before_does_not_change_a_prediction_if_their_positions_follow():
    # With one block, a position reads the others as a set of (code, grid position).
    gpt, (codes, _) = tiny(num_layers=1), codes_and_orders()
    order = torch.cat([torch.randperm(14), torch.tensor([14, 15])])  # the last input stays last
    expected = gpt(codes, LABELS)[:, -1]
    permuted = gpt(codes[:, order], LABELS, positions=order[None])[:, -1]
    torch.testing.assert_close(permuted, expected)
    without = gpt(codes[:, order], LABELS)[:, -1]
    assert (without - expected).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("condition", ["class", "text"])
def test_each_image_of_a_batch_has_its_own_order(condition):
    shape = {"condition": "text", "text_dim": 8, "max_text_tokens": 6}
    gpt = tiny() if condition == "class" else tiny(**shape)
    shown = as_condition(LABELS if condition == "class" else captions([3, 6, 1], 8))
    codes, orders = codes_and_orders()
    together = gpt(codes, shown, positions=orders)
    for i in range(3):
        row = torch.tensor([i])
        alone = gpt(codes[row], shown[row], positions=orders[row])
        torch.testing.assert_close(together[row], alone)
    assert (together - gpt(codes, shown)).abs().max() > 1e-3


def test_a_permuted_order_trains():
    gpt, (codes, orders) = tiny().train(), codes_and_orders()
    gpt(codes, LABELS, positions=orders).sum().backward()
    assert all(parameter.grad is not None for parameter in gpt.parameters())


def through_the_cache(gpt: GPT, codes: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The logits of every code, one step at a time: earlier keys and values are in the cache."""
    config, rows = gpt.config, len(codes)
    drop = torch.zeros(rows, dtype=torch.bool)
    prefix = gpt.prefix(as_condition(LABELS), drop, None)
    inputs = torch.cat([prefix, gpt.tok_embeddings(codes[:, :-1])], dim=1)
    condition = torch.zeros(rows, 1, dtype=torch.int64)
    rotary = gpt.rotary[torch.cat([condition, config.num_condition + positions[:, :-1]], dim=1)]
    heads = config.kv_heads, config.head_dim
    cache = PrefixCache(config.num_layers, rows, inputs.shape[1], heads, inputs)
    hidden = []
    for slot in range(inputs.shape[1]):
        used = torch.full((rows,), slot + 1, dtype=torch.int32)
        slots = torch.full((rows, 1), slot)
        metadata = AttentionMetadata(config.head_dim**-0.5, slots, used, slot + 1, slot + 1, None)
        x, now = inputs[:, slot : slot + 1], rotary[:, slot : slot + 1]
        for block, layer in zip(gpt.blocks, cache.layers, strict=True):
            x = block(x, now, partial(PrefixCache.attend, layer, metadata))
        hidden.append(gpt.norm(x))
    return gpt.output(torch.cat(hidden, dim=1))


@torch.no_grad()
@pytest.mark.parametrize("model", [{}, {"qk_norm": True}, {"num_kv_heads": 2}], ids=str)
def test_the_kv_cache_serves_any_order(model):
    gpt, (codes, orders) = tiny(**model), codes_and_orders()
    for positions in (RASTER, orders):
        expected = gpt(codes, LABELS, positions=positions)
        torch.testing.assert_close(through_the_cache(gpt, codes, positions), expected)
