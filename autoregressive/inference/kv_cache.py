"""Key-value caches: where keys and values are kept, and how new positions attend to them.

Three kinds, by what the attention reads. `PrefixCache` reads a slice whose end is a Python int.
`VarlenCache` takes the lengths from a device tensor, so that one CUDA graph serves every position.
`QuantizedCache` stores one byte per number: half the memory, and no longer exact.
"""

import functools
import inspect
from typing import NamedTuple

import torch
from torch.nn import functional as F

from autoregressive.inference.quantized_linear import QUANTIZED, quantize
from autoregressive.models.transformer import causal_attention

KVBuffer = tuple[torch.Tensor, ...]  # the keys of one layer, or its values


class LayerCache(NamedTuple):
    """The keys and values that one transformer block has stored."""

    keys: KVBuffer
    values: KVBuffer


class AttentionMetadata(NamedTuple):
    """Where the keys and values of new positions go, and what the new positions attend to.

    scale: multiplies the scores.
    slots: (rows, new) int64, cache slots of the new positions.
    row_lengths: (rows,) int32, slots in use in each row, the new ones included.
    kv_end: number of cache slots to read.
    kv_length: number of slots in use, if it is the same for every row; the new positions are the
        last of them. Used only without a mask.
    mask: (rows, new, kv_end) bool, True where a query must not attend; None if every query may
        attend to the first kv_length slots.
    is_group: Without a mask, new positions see one another; False only where one is new.
    """

    scale: float
    slots: torch.Tensor
    row_lengths: torch.Tensor
    kv_end: int
    kv_length: int
    mask: torch.Tensor | None
    is_group: bool = False


class PrefixCache:
    """Buffers (rows, kv_heads, capacity, head_dim) per layer; attention over a slice.

    Args:
        num_layers: Number of transformer blocks.
        rows: Number of sequences.
        capacity: Number of slots of a sequence.
        heads: Number of key and value heads, and their width.
        like: A tensor of the dtype and on the device of the keys and values.
        fitted: Let `fit` move the buffers; False where graphs keep their addresses.
    """

    def __init__(
        self,
        num_layers: int,
        rows: int,
        capacity: int,
        heads: tuple[int, int],
        like: torch.Tensor,
        fitted: bool = False,
    ) -> None:
        self.rows, self.capacity, self.fitted = rows, capacity, fitted
        self.extent = rows, capacity
        shape = self.shape(rows, capacity, heads)
        self.memory = [self.buffer(shape, like) for _ in range(2 * num_layers)]
        self.layers = _pairs(self.memory)

    def fit(self, rows: int, end: int) -> None:
        """Lay the buffers out for the first `rows` rows and `end` slots; what is in them stays.

        A slice of a larger buffer is not contiguous, and oneDNN copies it at every product in
        bfloat16. Here every buffer moves into the memory that the one before it has left.
        """
        if not self.fitted or self.extent == (rows, end):
            return
        buffers = [buffer for layer in self.layers for buffer in layer]
        if len(self.memory) == len(buffers):
            self.memory.append(tuple(torch.empty_like(part) for part in self.memory[0]))
        # Buffer i is in memory i, and the last memory is free.
        self.memory = self.memory[-1:] + self.memory[:-1]
        for i, buffer in enumerate(buffers):
            parts = zip(buffer, self.memory[i], strict=True)
            buffers[i] = tuple(_move(part, memory, rows, end) for part, memory in parts)
        self.layers, self.extent = _pairs(buffers), (rows, end)

    @classmethod
    def shape(cls, rows: int, capacity: int, heads: tuple[int, int]) -> tuple[int, ...]:
        """Shape of one layer's keys, and of its values."""
        return rows, heads[0], capacity, heads[1]

    @classmethod
    def buffer(cls, shape: tuple[int, ...], like: torch.Tensor) -> KVBuffer:
        """An empty buffer in the dtype and on the device of `like`."""
        return (like.new_zeros(shape),)

    @classmethod
    def attend(
        cls,
        layer: LayerCache,
        metadata: AttentionMetadata,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> torch.Tensor:
        """Store the new keys and values, then attend to everything stored.

        queries (rows, new, heads, head_dim), keys and values (rows, new, kv_heads, head_dim) ->
        (rows, new, heads, head_dim). With the first two arguments bound, this is an
        `attend` function of transformer.Block.
        """
        cls.store(layer, metadata, keys, values)
        return cls.attention(layer, metadata, queries)

    @classmethod
    def prefill(
        cls,
        layer: LayerCache,
        metadata: AttentionMetadata,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> torch.Tensor:
        """Like `attend`, for an empty cache: causal attention among the new positions.

        Padding must come last, where causal attention hides it from every valid position.
        """
        cls.store(layer, metadata, keys, values)
        return causal_attention(queries, keys, values, metadata.scale)

    @classmethod
    def store(
        cls,
        layer: LayerCache,
        metadata: AttentionMetadata,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        """Store keys and values (rows, new, kv_heads, head_dim) at each row's slots."""
        cls.write(layer.keys, metadata, keys)
        cls.write(layer.values, metadata, values)

    @classmethod
    def encode(cls, new: torch.Tensor) -> KVBuffer:
        """Keys or values (rows, new, kv_heads, head_dim) in the format that is stored."""
        return (new,)

    @classmethod
    def read(cls, buffer: KVBuffer, rows: int, end: int, dtype: torch.dtype) -> torch.Tensor:
        """The first `end` slots of the first rows, (rows, kv_heads, end, head_dim) in `dtype`."""
        return buffer[0][:rows, :, :end]

    @classmethod
    def write(cls, buffer: KVBuffer, metadata: AttentionMetadata, new: torch.Tensor) -> None:
        """Store (rows, new, kv_heads, head_dim) at each row's slots."""
        rows, count = new.shape[:2]
        if metadata.mask is None:  # the same slots in every row
            end = metadata.kv_length
            for stored, part in zip(buffer, cls.encode(new), strict=True):
                stored[:rows, :, end - count : end] = part.transpose(1, 2)
        else:
            row = torch.arange(rows, device=new.device)[:, None]
            for stored, part in zip(buffer, cls.encode(new), strict=True):
                stored[row, :, metadata.slots] = part

    @classmethod
    def attention(
        cls, layer: LayerCache, metadata: AttentionMetadata, queries: torch.Tensor
    ) -> torch.Tensor:
        """Attention of queries (rows, new, heads, head_dim) to the stored slots -> same shape.

        Plain matrix products with the keys on the left. For one query in bfloat16 on a CPU they
        are two to three times as fast as the fused attention, and in float32 no slower; a compiler
        fuses them into one pass over memory.
        """
        rows, new = queries.shape[:2]
        past = cls.read(layer.keys, rows, metadata.kv_end, queries.dtype)
        values = cls.read(layer.values, rows, metadata.kv_end, queries.dtype)
        if new == 1 and past.shape[1] == queries.shape[2] and _has_bag_kernel(values):
            return _one_query_attention(metadata, queries, past, values)
        # Query heads that share keys, and new positions, become columns of one product.
        columns = queries.unflatten(2, (past.shape[1], -1)).permute(0, 2, 4, 3, 1)
        scores = (past @ columns.flatten(3)).float() * metadata.scale
        if metadata.mask is not None:
            mask = metadata.mask.transpose(1, 2)[:, None, :, None]
            scores = scores.unflatten(3, (-1, new)).masked_fill(mask, float("-inf")).flatten(3)
        elif metadata.kv_length < metadata.kv_end:
            scores[:, :, metadata.kv_length :] = float("-inf")
        weights = scores.softmax(dim=2).to(queries.dtype).transpose(2, 3)
        attended = weights @ values
        return attended.unflatten(2, (-1, new)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _has_bag_kernel(values: torch.Tensor) -> bool:
    """Whether _one_query_attention is the faster way: eagerly, in bfloat16 on a CPU."""
    eager_cpu = values.device.type == "cpu" and not torch.compiler.is_compiling()
    return eager_cpu and values.dtype == torch.bfloat16 and values.is_contiguous()


def _one_query_attention(
    metadata: AttentionMetadata, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """PrefixCache.attention for one query (rows, 1, heads, head_dim) that shares no keys.

    The weighted sum of the values is an embedding bag, whose kernel reads them in place; oneDNN
    copies them at every product in bfloat16.
    """
    scores = (queries.transpose(1, 2) @ keys.transpose(2, 3)).float() * metadata.scale
    if metadata.mask is not None:
        scores = scores.masked_fill(metadata.mask[:, None], float("-inf"))
    elif metadata.kv_length < metadata.kv_end:
        scores[..., metadata.kv_length :] = float("-inf")
    weights = scores.softmax(dim=-1).to(queries.dtype).flatten(0, 2)
    slots = _slot_index(weights.numel()).view_as(weights)
    attended = F.embedding_bag(slots, values.flatten(0, 2), mode="sum", per_sample_weights=weights)
    return attended.view_as(queries)


@functools.lru_cache(maxsize=1)
def _slot_index(count: int) -> torch.Tensor:
    """0 .. count - 1; every layer of several steps asks for the same one."""
    return torch.arange(count, dtype=torch.int32)


def _pairs(buffers: list[KVBuffer]) -> list[LayerCache]:
    return list(map(LayerCache, buffers[::2], buffers[1::2]))


def _move(old: torch.Tensor, memory: torch.Tensor, rows: int, end: int) -> torch.Tensor:
    """`old` (rows, kv_heads, slots, width) in contiguous memory, cut or filled with zeros."""
    _, heads, slots, width = old.shape
    new = memory.view(-1)[: rows * heads * end * width].view(rows, heads, end, width)
    kept, slots = min(len(old), rows), min(slots, end)
    new[:kept, :, :slots] = old[:kept, :, :slots]
    new[:kept, :, slots:] = 0
    new[kept:] = 0
    return new


class QuantizedCache(PrefixCache):
    """One byte per number, and one float32 scale per position and head."""

    storage: torch.dtype

    @classmethod
    def buffer(cls, shape: tuple[int, ...], like: torch.Tensor) -> KVBuffer:
        """Empty codes and their scales."""
        codes = torch.zeros(shape, dtype=cls.storage, device=like.device)
        return codes, torch.zeros((*shape[:-1], 1), device=like.device)

    @classmethod
    def encode(cls, new: torch.Tensor) -> KVBuffer:
        """Keys or values (rows, new, kv_heads, head_dim) as codes and scales."""
        codes, scales = quantize(new, cls.storage)
        return codes, scales[..., None]

    @classmethod
    def read(cls, buffer: KVBuffer, rows: int, end: int, dtype: torch.dtype) -> torch.Tensor:
        """The first `end` slots of the first rows, (rows, kv_heads, end, head_dim) in `dtype`."""
        codes, scales = (part[:rows, :, :end] for part in buffer)
        return codes.to(dtype) * scales.to(dtype)


class Int8Cache(QuantizedCache):
    """8-bit integers."""

    storage = QUANTIZED["int8"]


class Fp8Cache(QuantizedCache):
    """8-bit floats (e4m3: 4 exponent bits, 3 mantissa bits)."""

    storage = QUANTIZED["fp8"]


class VarlenCache(PrefixCache):
    """Buffers (rows, capacity, kv_heads, head_dim) per layer; variable-length flash attention.

    The kernel takes each row's length from a device tensor and reads only the slots in use.
    """

    @classmethod
    def shape(cls, rows: int, capacity: int, heads: tuple[int, int]) -> tuple[int, ...]:
        """Shape of one layer's keys, and of its values."""
        return rows, capacity, *heads

    @staticmethod
    def available(like: torch.Tensor) -> bool:
        """Whether this torch has the kernel for a tensor's device and dtype."""
        if like.device.type != "cuda" or like.dtype not in (torch.bfloat16, torch.float16):
            return False
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError:
            return False
        newer = {"seqused_k", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters)
        return newer and torch.cuda.get_device_capability(like.device) >= (8, 0)

    @classmethod
    def read(cls, buffer: KVBuffer, rows: int, end: int, dtype: torch.dtype) -> torch.Tensor:
        """The first `end` slots of the first rows, (rows, kv_heads, end, head_dim) in `dtype`."""
        return buffer[0][:rows, :end].transpose(1, 2)

    @classmethod
    def write(cls, buffer: KVBuffer, metadata: AttentionMetadata, new: torch.Tensor) -> None:
        """Store (rows, new, kv_heads, head_dim) at each row's slots."""
        buffer[0][torch.arange(len(new), device=new.device)[:, None], metadata.slots] = new

    @classmethod
    def attention(
        cls, layer: LayerCache, metadata: AttentionMetadata, queries: torch.Tensor
    ) -> torch.Tensor:
        """Attention of queries (rows, new, heads, head_dim); without a mask the last of their rows.

        The kernel knows no masks: with one, this is plain attention.
        """
        if metadata.mask is not None:
            return super().attention(layer, metadata, queries)
        from torch.nn.attention.varlen import varlen_attn

        rows, new, heads = queries.shape[:3]
        capacity, kv_heads = layer.keys[0].shape[1:3]
        starts = torch.arange(rows + 1, dtype=torch.int32, device=queries.device)
        attended = varlen_attn(
            queries.flatten(0, 1),
            layer.keys[0][:rows].flatten(0, 1),
            layer.values[0][:rows].flatten(0, 1),
            starts * new,
            starts * capacity,
            new,
            capacity,
            scale=metadata.scale,
            # Causal, aligned to the last slot in use; or all slots in use.
            window_size=(-1, -1) if metadata.is_group else (-1, 0),
            enable_gqa=heads != kv_heads,
            seqused_k=metadata.row_lengths,
        )
        assert isinstance(attended, torch.Tensor)
        return attended.unflatten(0, (rows, new))
