"""Keys and values of what was decoded so far, and how new positions attend to them.

Three layouts, by what the attention reads. `PrefixCache` slices: its prefix is a Python int.
`VarlenCache` takes the lengths on the device, so that one CUDA graph serves every position.
`QuantizedCache` keeps eight bits a number: half the memory, and no longer exact.
"""

import inspect
from typing import NamedTuple

import torch

from autoregressive.inference.quantized_linear import QUANTIZED, quantize

KVBuffer = tuple[torch.Tensor, ...]  # one layer's keys, or its values


class AttentionMetadata(NamedTuple):
    """Where the new positions of each row go, and what they see.

    slots (rows, new) int64; lengths (rows,) int32, slots in use with the new ones; rotary
    (rows, new, head_dim // 2, 2); end: no slot in use is beyond it; hidden (rows, new, end) bool
    marks slots before `end` that a new position may not see, None where each may see all of the
    first `valid`, of which the new ones are the last.
    """

    slots: torch.Tensor
    lengths: torch.Tensor
    rotary: torch.Tensor
    end: int
    valid: int
    hidden: torch.Tensor | None


class PrefixCache:
    """Buffers (rows, kv_heads, capacity, head_dim) per layer; attention over a slice."""

    def __init__(
        self, num_layers: int, rows: int, capacity: int, heads: tuple[int, int], like: torch.Tensor
    ) -> None:
        self.rows, self.capacity = rows, capacity
        shape = (rows, heads[0], capacity, heads[1])
        stores = ((self.store(shape, like), self.store(shape, like)) for _ in range(num_layers))
        self.layers = list(stores)

    @classmethod
    def store(cls, shape: tuple[int, ...], like: torch.Tensor) -> KVBuffer:
        """Empty buffers in the dtype and on the device of `like`."""
        return (like.new_zeros(shape),)

    @classmethod
    def coded(cls, new: torch.Tensor) -> KVBuffer:
        """(rows, new, kv_heads, head_dim) as it is stored."""
        return (new,)

    @classmethod
    def read(cls, store: KVBuffer, rows: int, end: int, dtype: torch.dtype) -> torch.Tensor:
        """(rows, kv_heads, end, head_dim) in `dtype`."""
        return store[0][:rows, :, :end]

    @classmethod
    def write(cls, store: KVBuffer, place: AttentionMetadata, new: torch.Tensor) -> None:
        """Store (rows, new, kv_heads, head_dim) at each row's own slots."""
        rows, count = new.shape[:2]
        row = torch.arange(rows, device=new.device)[:, None]
        for buffer, part in zip(store, cls.coded(new), strict=True):
            if place.hidden is None:  # no row has slots of its own
                buffer[:rows, :, place.valid - count : place.valid] = part.transpose(1, 2)
            else:
                buffer[row, :, place.slots] = part

    @classmethod
    def attend(
        cls,
        queries: torch.Tensor,
        keys: KVBuffer,
        values: KVBuffer,
        place: AttentionMetadata,
        scale: float,
    ) -> torch.Tensor:
        """Queries (rows, new, heads, head_dim) -> the same shape.

        Plain products, keys first: on CPUs two to three times as fast as the fused attention for
        one query in bfloat16, and no slower in float32; compiled, one pass over memory.
        """
        rows, new = queries.shape[:2]
        past = cls.read(keys, rows, place.end, queries.dtype)
        # Query heads that share keys, and new positions, are columns.
        columns = queries.unflatten(2, (past.shape[1], -1)).permute(0, 2, 4, 3, 1)
        scores = (past @ columns.flatten(3)).float() * scale
        if place.hidden is not None:
            hidden = place.hidden.transpose(1, 2)[:, None, :, None]
            scores = scores.unflatten(3, (-1, new)).masked_fill(hidden, float("-inf")).flatten(3)
        elif place.valid < place.end:
            scores[:, :, place.valid :] = float("-inf")
        weights = scores.softmax(dim=2).to(queries.dtype).transpose(2, 3)
        attended = weights @ cls.read(values, rows, place.end, queries.dtype)
        return attended.unflatten(2, (-1, new)).permute(0, 3, 1, 2, 4).flatten(2, 3)


class QuantizedCache(PrefixCache):
    """A byte a number, and a scale for each position of each head."""

    storage: torch.dtype

    @classmethod
    def store(cls, shape: tuple[int, ...], like: torch.Tensor) -> KVBuffer:
        """Codes, and their scales in float32."""
        codes = torch.zeros(shape, dtype=cls.storage, device=like.device)
        return codes, torch.zeros((*shape[:-1], 1), device=like.device)

    @classmethod
    def coded(cls, new: torch.Tensor) -> KVBuffer:
        """(rows, new, kv_heads, head_dim) as it is stored."""
        codes, scales = quantize(new, cls.storage)
        return codes, scales[..., None]

    @classmethod
    def read(cls, store: KVBuffer, rows: int, end: int, dtype: torch.dtype) -> torch.Tensor:
        """(rows, kv_heads, end, head_dim) in `dtype`."""
        codes, scales = (part[:rows, :, :end] for part in store)
        return codes.to(dtype) * scales.to(dtype)


class Int8Cache(QuantizedCache):
    """Integers."""

    storage = QUANTIZED["int8"]


class Fp8Cache(QuantizedCache):
    """Floats of 4 exponent and 3 mantissa bits."""

    storage = QUANTIZED["fp8"]


class VarlenCache(PrefixCache):
    """Buffers (rows, capacity, kv_heads, head_dim) per layer; flash attention of the valid slots.

    Reads each row's valid prefix and nothing else, with the lengths in a device tensor.
    """

    def __init__(
        self, num_layers: int, rows: int, capacity: int, heads: tuple[int, int], like: torch.Tensor
    ) -> None:
        self.rows, self.capacity = rows, capacity
        shape = (rows, capacity, *heads)
        self.layers = [
            ((like.new_zeros(shape),), (like.new_zeros(shape),)) for _ in range(num_layers)
        ]

    @staticmethod
    def available(like: torch.Tensor) -> bool:
        """Whether torch has this attention for a tensor's device and dtype."""
        if like.device.type != "cuda" or like.dtype not in (torch.bfloat16, torch.float16):
            return False
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError:
            return False
        newer = {"seqused_k", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters)
        return newer and torch.cuda.get_device_capability(like.device) >= (8, 0)

    @classmethod
    def write(cls, store: KVBuffer, place: AttentionMetadata, new: torch.Tensor) -> None:
        """Store (rows, new, kv_heads, head_dim) at each row's own slots."""
        store[0][torch.arange(len(new), device=new.device)[:, None], place.slots] = new

    @classmethod
    def attend(
        cls,
        queries: torch.Tensor,
        keys: KVBuffer,
        values: KVBuffer,
        place: AttentionMetadata,
        scale: float,
    ) -> torch.Tensor:
        """Queries (rows, new, heads, head_dim), the last ones of their rows -> the same shape."""
        from torch.nn.attention.varlen import varlen_attn

        rows, new, heads = queries.shape[:3]
        capacity, kv_heads = keys[0].shape[1:3]
        starts = torch.arange(rows + 1, dtype=torch.int32, device=queries.device)
        attended = varlen_attn(
            queries.flatten(0, 1),
            keys[0][:rows].flatten(0, 1),
            values[0][:rows].flatten(0, 1),
            starts * new,
            starts * capacity,
            new,
            capacity,
            scale=scale,
            window_size=(-1, 0),  # causal, counted from the last slot in use
            enable_gqa=heads != kv_heads,
            seqused_k=place.lengths,
        )
        assert isinstance(attended, torch.Tensor)
        return attended.unflatten(0, (rows, new))
