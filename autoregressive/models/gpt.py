"""The decoder: a Llama-style transformer that predicts the next code of an image.

Facts that the released weights depend on: packed q | k | v, 2-D rotary embedding in interleaved
pairs, RMSNorm in float32 cast back before its weight, and code i at its own cell of the grid.
"""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from autoregressive.models.conditioning import (
    ClassEmbedding,
    Condition,
    TextEmbedding,
    ragged_order,
)
from autoregressive.models.config import PRESETS, GPTConfig, TransformerConfig
from autoregressive.models.rope import rotary_table, rotate
from core.config import InputError
from core.training.initialization import Constant, Normal, initialize


class RMSNorm(nn.Module):
    """Root-mean-square norm: float32 inside, cast back, then weighted."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., dim) -> (..., dim)."""
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).type_as(x) * self.weight


class Attention(nn.Module):
    """Causal self-attention with rotary positions and optionally grouped keys and values."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.num_heads, self.kv_heads = config.num_heads, config.kv_heads
        self.head_dim = config.head_dim
        packed = (self.num_heads + 2 * self.kv_heads) * self.head_dim
        self.wqkv = nn.Linear(config.dim, packed, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(self, x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
        """x (batch, length, dim) -> the same."""
        heads = self.wqkv(x).unflatten(-1, (-1, self.head_dim))
        queries, keys, values = heads.split([self.num_heads, self.kv_heads, self.kv_heads], dim=-2)
        queries = rotate(queries, rotary).transpose(1, 2)
        keys, values = rotate(keys, rotary).transpose(1, 2), values.transpose(1, 2)
        attended = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            is_causal=True,
            enable_gqa=self.kv_heads != self.num_heads,
        )
        return self.dropout(self.wo(attended.transpose(1, 2).flatten(-2)))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)
        self.dropout = nn.Dropout(config.ffn_dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., dim) -> (..., dim)."""
        return self.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class Block(nn.Module):
    """Pre-norm attention and FFN, each added to the residual stream."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.drop_path = _drop_path(config, layer)

    def forward(self, x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
        """x (batch, length, dim) -> the same."""
        attended = self.attention(self.attention_norm(x), rotary)
        x = x + self.drop_path(attended)
        return x + self.drop_path(self.feed_forward(self.ffn_norm(x)))


def _drop_path(config: TransformerConfig, layer: int) -> nn.Module:
    rate = config.drop_path * layer / max(1, config.num_layers - 1)
    if rate == 0:
        return nn.Identity()
    from timm.layers.drop import DropPath  # seconds to import: only where it is used

    return DropPath(rate)


class GPT(nn.Module):
    """Predicts each code of an image from the codes before it and the condition."""

    rotary_bits: torch.Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        if config.condition == "class":
            self.cls_embedding = ClassEmbedding(config.num_classes, config.dim)
        else:
            self.cls_embedding = TextEmbedding(config.text_dim, config.max_text_tokens, config.dim)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.tok_dropout = nn.Dropout(config.token_dropout)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.build_rotary()
        if not self.norm.weight.is_meta:
            # The seed comes from torch's own generator, so that torch.manual_seed decides it.
            initialize(self, int(torch.randint(2**62, (), device="cpu")))

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "GPT":  # noqa: ANN401 - any config field
        """A new model with random weights, e.g. from_preset("GPT-B", grid=(24, 24)).

        Raises InputError for an unknown name, TypeError for an unknown field.
        """
        if name not in PRESETS:
            raise InputError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
        shape = dict(zip(("num_layers", "num_heads", "dim"), PRESETS[name], strict=True))
        return cls(GPTConfig(**{**shape, **overrides}))

    @classmethod
    def from_pretrained(cls, path_or_hub_id: Any, **options: Any) -> "GPT":  # noqa: ANN401
        """Load a released file, a folder of ours or a Hub repository; see pretrained.load_gpt."""
        from autoregressive.models.pretrained import load_gpt

        return load_gpt(path_or_hub_id, **options).gpt

    @property
    def blocks(self) -> list[Block]:
        """The layers, in order, without what parallelism wraps around them."""
        return [module for module in self.layers.modules() if isinstance(module, Block)]

    def build_rotary(self) -> None:
        """Compute the rotary table; again after a model was built on the meta device."""
        config = self.config
        table = rotary_table(
            config.grid,
            config.head_dim,
            config.rope_base,
            config.num_condition,
            config.rope_condition,
        )
        # Kept as integer bits, because model.to(bfloat16) would round a float buffer. Computed on
        # the CPU, so that every device has the same bits.
        bits = table.view(torch.int32).to(self.norm.weight.device)
        self.register_buffer("rotary_bits", bits, persistent=False)

    def initial_distribution(self, name: str) -> Constant | Normal:
        """How a tensor of the state dict is initialised; see core.initialization."""
        if name.endswith("norm.weight"):
            return Constant(1.0)
        if name == "output.weight":
            return Constant(0.0)  # the first loss is ln(vocab_size)
        if name == "cls_embedding.uncond_embedding":
            return Normal(1 / math.sqrt(self.config.text_dim))
        return Normal(0.02)

    @property
    def rotary(self) -> torch.Tensor:
        """The rotary table (num_condition + codes, head_dim // 2, 2), always float32."""
        return self.rotary_bits.view(torch.float32)

    def forward(
        self,
        codes: torch.Tensor,
        condition: Condition,
        dropped: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Teacher forcing: codes (batch, N) int64 -> logits (batch, N, vocab) float32.

        condition: labels (batch,) int64, or (features (batch, T, text_dim), lengths (batch,)).
        dropped (batch,) bool: rows that see the null condition instead; none by default.
        """
        return self._head(self.hidden(codes, condition, dropped))

    def hidden(
        self,
        codes: torch.Tensor,
        condition: Condition,
        dropped: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What `forward` computes before the head: (batch, N, dim), in the dtype of computation."""
        if dropped is None:
            dropped = torch.zeros(len(codes), dtype=torch.bool, device=codes.device)
        prefix = self.cls_embedding(condition, dropped)
        x = torch.cat([prefix, self.tok_embeddings(codes[:, :-1])], dim=1)
        num_prefix, num_codes = prefix.shape[1], codes.shape[1]
        start = self.config.num_condition - num_prefix
        rotary = self.rotary[start : start + x.shape[1]]
        lengths = self.cls_embedding.lengths(condition)
        if lengths is None:
            return self._blocks(self.tok_dropout(x), rotary)[:, num_prefix - 1 :]
        order = ragged_order(lengths, num_prefix, num_codes - 1)
        x = x.gather(1, order[..., None].expand_as(x))
        hidden = self._blocks(self.tok_dropout(x), rotary[order])
        last = lengths[:, None] - 1 + torch.arange(num_codes, device=codes.device)
        return hidden.gather(1, last[..., None].expand(-1, -1, hidden.shape[-1]))

    def _blocks(self, x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
        for block in self.layers:
            x = block(x, rotary)
        return self.norm(x)

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.output(hidden).float()
