"""PrefixCache.fit: the buffers change their layout, and nothing that is stored."""

import pytest
import torch

from autoregressive.inference.kv_cache import AttentionMetadata, Int8Cache, PrefixCache


@pytest.mark.parametrize("kind", [PrefixCache, Int8Cache])
def test_fit_keeps_what_is_stored_and_fills_up_with_zeros(kind):
    torch.manual_seed(0)
    cache = kind(3, 4, 12, (2, 8), torch.zeros(0, dtype=torch.bfloat16), fitted=True)
    cache.fit(4, 5)
    stored = {}
    for i, layer in enumerate(cache.layers):
        for j, buffer in enumerate(layer):
            for k, part in enumerate(buffer):
                part.copy_(torch.randint(-9, 9, part.shape))
                stored[i, j, k] = part.clone()
    for rows, end in ((4, 8), (3, 12), (3, 12)):
        cache.fit(rows, end)
        for (i, j, k), before in stored.items():
            part = cache.layers[i][j][k]
            assert part.shape[:3] == (rows, 2, end)
            assert part.is_contiguous()
            assert torch.equal(part[:, :, :5], before[:rows])
            assert not part[:, :, 5:].any()
    addresses = {p.data_ptr() for layer in cache.layers for buffer in layer for p in buffer}
    assert len(addresses) == len(stored)


def test_a_cache_that_graphs_know_does_not_move():
    cache = PrefixCache(2, 4, 12, (2, 8), torch.zeros(0))
    before = [buffer[0].data_ptr() for layer in cache.layers for buffer in layer]
    cache.fit(2, 5)
    assert [buffer[0].data_ptr() for layer in cache.layers for buffer in layer] == before
    assert cache.layers[0].keys[0].shape == (4, 2, 12, 8)


@pytest.mark.parametrize("masked", [False, True])
def test_one_query_in_bf16_attends_as_in_float32(masked):
    """Rows of 8 slots of which fewer are in use: the same ones, or under a mask each its own."""
    random = torch.Generator().manual_seed(0)
    rows, heads, capacity, width = 3, 4, 8, 16
    cache = PrefixCache(1, rows, capacity, (heads, width), torch.empty(0, dtype=torch.bfloat16))
    for buffer in (*cache.layers[0].keys, *cache.layers[0].values):
        buffer.copy_(torch.randn(buffer.shape, generator=random))
    query, key, value = torch.randn(3, rows, 1, heads, width, generator=random).bfloat16()
    lengths = torch.tensor([5, 3, 6]) if masked else torch.full((rows,), 5)
    slots = lengths[:, None] - 1
    mask = torch.arange(capacity) > slots[..., None] if masked else None
    metadata = AttentionMetadata(0.25, slots, lengths.int(), capacity, 5, mask)
    found = PrefixCache.attend(cache.layers[0], metadata, query, key, value)
    assert found.shape == query.shape
    for row, length in enumerate(lengths):
        keys, values = (part[0][row, :, :length].float() for part in cache.layers[0])
        assert torch.equal(keys[:, -1], key[row, 0].float())
        weights = (0.25 * keys @ query[row, 0].float()[..., None]).softmax(dim=1)
        wanted = (weights * values).sum(dim=1)
        assert (found[row, 0].float() - wanted).abs().max() < 0.02
