"""A decoder's blocks with packed weights, for one or a few new positions over a cache."""

import torch
from torch import nn
from torch.nn import functional as F

from autoregressive.inference.kv_cache import AttentionMetadata, KVBuffer, PrefixCache
from autoregressive.inference.quantized_linear import pack
from autoregressive.models.gpt import Block, RMSNorm
from autoregressive.models.rope import rotate

ALIGNMENT = 8  # head_dim is padded to a multiple of this once: attention kernels want it


class Norm(nn.Module):
    """A copy of an RMSNorm in the dtype and on the device of decoding."""

    weight: torch.Tensor

    def __init__(self, norm: RMSNorm, like: torch.Tensor) -> None:
        super().__init__()
        self.eps = norm.eps
        self.register_buffer("weight", norm.weight.detach().to(like))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., dim) -> (..., dim)."""
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).type_as(x) * self.weight


class Layer(nn.Module):
    """One block with packed weights: wqkv and wo padded to aligned heads, w1 and w3 in one.

    like: a tensor of the dtype and on the device to compute with.
    """

    def __init__(
        self, block: Block, like: torch.Tensor, precision: str | None, cache: type[PrefixCache]
    ) -> None:
        super().__init__()
        attention, ffn = block.attention, block.feed_forward
        self.heads, self.kv_heads = attention.num_heads, attention.kv_heads
        self.cache = cache
        self.scale = attention.head_dim**-0.5
        padding = -attention.head_dim % ALIGNMENT
        self.head_dim = attention.head_dim + padding

        def packed(weight: torch.Tensor) -> nn.Module:
            return pack(weight.detach().to(like.device), like.dtype, precision)

        wqkv = attention.wqkv.weight.unflatten(0, (-1, attention.head_dim))
        wo = attention.wo.weight.unflatten(1, (-1, attention.head_dim))
        self.wqkv = packed(F.pad(wqkv, (0, 0, 0, padding)).flatten(0, 1))
        self.wo = packed(F.pad(wo, (0, padding)).flatten(1))
        self.w13 = packed(torch.cat([ffn.w1.weight, ffn.w3.weight]))
        self.w2 = packed(ffn.w2.weight)
        self.attention_norm = Norm(block.attention_norm, like)
        self.ffn_norm = Norm(block.ffn_norm, like)

    def forward(
        self, x: torch.Tensor, keys: KVBuffer, values: KVBuffer, place: AttentionMetadata
    ) -> torch.Tensor:
        """x (rows, new, dim) over what the cache holds -> the same; writes keys and values."""
        queries, _, _ = self._heads(x, keys, values, place)
        attended = self.cache.attend(queries, keys, values, place, self.scale)
        return self._finish(x, attended)

    def prefill(
        self, x: torch.Tensor, keys: KVBuffer, values: KVBuffer, place: AttentionMetadata
    ) -> torch.Tensor:
        """The same over an empty cache; padding comes last, where nothing valid can see it."""
        q, k, v = (part.transpose(1, 2) for part in self._heads(x, keys, values, place))
        grouped = self.heads != self.kv_heads
        attended = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.scale, enable_gqa=grouped
        )
        return self._finish(x, attended.transpose(1, 2))

    def _heads(
        self, x: torch.Tensor, keys: KVBuffer, values: KVBuffer, place: AttentionMetadata
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values (rows, new, heads, head_dim); the latter two are stored."""
        heads = self.wqkv(self.attention_norm(x)).unflatten(-1, (-1, self.head_dim))
        turned, new_values = heads.split([self.heads + self.kv_heads, self.kv_heads], dim=-2)
        queries, new_keys = rotate(turned, place.rotary).split([self.heads, self.kv_heads], dim=-2)
        self.cache.write(keys, place, new_keys)
        self.cache.write(values, place, new_values)
        return queries, new_keys, new_values

    def _finish(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        x = x + self.wo(attended.flatten(-2))
        gate, up = self.w13(self.ffn_norm(x)).chunk(2, dim=-1)
        return x + self.w2(F.silu(gate) * up)
