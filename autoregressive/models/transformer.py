"""The transformer block: Llama's, with 2-D rotary positions, for training and sampling alike.

Facts that the released weights depend on: q | k | v packed in one matrix, a rotary embedding of
interleaved pairs, and RMSNorm that computes in float32 and casts back before its weight.

The block knows nothing of caches. It gets an `attend` function, which receives the rotated queries
and keys and the values: causal attention by default, a key-value cache in the inference engine.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from autoregressive.models.rope import rotate

# name: (num_layers, num_heads, dim)
PRESETS = {
    "GPT-B": (12, 12, 768),
    "GPT-L": (24, 16, 1024),
    "GPT-XL": (36, 20, 1280),
    "GPT-XXL": (48, 24, 1536),
    "GPT-XXXL": (48, 40, 2560),
    "GPT-1B": (22, 32, 2048),
    "GPT-3B": (24, 32, 3200),
    "GPT-7B": (32, 32, 4096),
}

MAX_LAYERS = 1000  # more would take minutes to build even without memory

# (queries (batch, length, heads, head_dim), keys and values (batch, length, kv_heads, head_dim))
# -> (batch, length, heads, head_dim)
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class TransformerConfig:
    """Shape and regularisation of the transformer, without what the training data decides.

    Args:
        num_layers: Number of transformer blocks.
        num_heads: Number of attention heads.
        dim: Width of the residual stream; a multiple of 4 x num_heads (2-D rotary embedding).
        num_kv_heads: Number of key and value heads, for grouped-query attention; 0: num_heads.
        ffn_multiple: The FFN's hidden width, 8/3 dim, is rounded up to a multiple of this.
        norm_eps: Epsilon of the RMSNorms.
        rope_base: Base of the rotary frequencies.
        rope_condition: Rotary rows of condition tokens: zero, as in the released models, or
            identity, which leaves their queries and keys as they are.
        token_dropout: Dropout rate on the embedded sequence.
        residual_dropout: Dropout rate on the attention's output.
        ffn_dropout: Dropout rate on the FFN's output.
        drop_path: Stochastic depth rate; grows linearly over the blocks from 0 to this value. The
            paper sets residual_dropout and ffn_dropout to 0 when it is used.
        qk_norm: RMSNorm over head_dim on queries and keys, before the rotation (Henry et al.,
            arXiv 2010.04245; Dehghani et al., arXiv 2302.05442): stabilises large models.
        adaln: Adaptive norms, for a condition of one token: a class. none; full: in every block a
            linear layer turns the condition into scales, shifts and gains of attention and FFN
            (IBQ, arXiv 2412.02692); shared: one such layer for all blocks, and in each block a
            table that is added (VAR, arXiv 2404.02905): 6 dim instead of 6 dim^2 weights per block.
            With both, one more layer gives scale and shift of the last norm.
        adaln_gain: Factor on the initial weights of the gains, with adaln; IBQ takes 1e-3 for its
            B and L models, 1e-4 for XL and 1e-5 for XXL.
    """

    num_layers: int = 12
    num_heads: int = 12
    dim: int = 768
    num_kv_heads: int = 0
    ffn_multiple: int = 256
    norm_eps: float = 1e-5
    rope_base: float = 10000.0
    rope_condition: Literal["zero", "identity"] = "zero"
    token_dropout: float = 0.0
    residual_dropout: float = 0.0
    ffn_dropout: float = 0.0
    drop_path: float = 0.0
    qk_norm: bool = False
    adaln: Literal["none", "shared", "full"] = "none"
    adaln_gain: float = 1e-3

    def __post_init__(self) -> None:
        if min(self.num_layers, self.num_heads, self.dim, self.ffn_multiple) < 1:
            raise ValueError("model: num_layers, num_heads, dim and ffn_multiple must be >= 1")
        if self.num_layers > MAX_LAYERS:
            raise ValueError(f"model.num_layers is {self.num_layers}, must be <= {MAX_LAYERS}")
        if self.dim % (4 * self.num_heads):
            raise ValueError(
                f"model.dim {self.dim} must be a multiple of 4 x model.num_heads "
                f"{self.num_heads}: the 2-D rotary embedding splits each head into four parts"
            )
        if self.norm_eps <= 0 or self.rope_base <= 0:
            raise ValueError("model: norm_eps and rope_base must be > 0")
        if self.num_kv_heads < 0 or self.num_heads % self.kv_heads:
            raise ValueError(
                f"model.num_kv_heads {self.num_kv_heads} must divide num_heads {self.num_heads}"
            )
        for name in ("token_dropout", "residual_dropout", "ffn_dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}, must be in [0, 1)")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def ffn_dim(self) -> int:
        """Hidden width of the FFN."""
        return -(-int(8 * self.dim / 3) // self.ffn_multiple) * self.ffn_multiple


def infer_transformer_fields(
    tensors: Mapping[str, torch.Tensor], num_heads: int | None = None
) -> dict[str, Any]:
    """Fields of TransformerConfig that a state dict tells by its keys and shapes.

    num_heads cannot be told from shapes: the published one for this width if None, else heads of
    width 64. Raises KeyError for a state dict without transformer blocks.
    """
    dim = tensors["tok_embeddings.weight"].shape[1]
    packed = tensors["layers.0.attention.wqkv.weight"].shape[0]
    heads_of_width = {width: heads for _, heads, width in PRESETS.values()}
    num_heads = num_heads or heads_of_width.get(dim, dim // 64)
    kv_heads = (packed - dim) // 2 // (dim // num_heads)
    return {
        "num_layers": 1 + max(int(key.split(".")[1]) for key in tensors if key[:7] == "layers."),
        "num_heads": num_heads,
        "num_kv_heads": 0 if kv_heads == num_heads else kv_heads,
        "dim": dim,
        "qk_norm": "layers.0.attention.q_norm.weight" in tensors,
        "adaln": _infer_adaln(tensors),
    }


def _infer_adaln(tensors: Mapping[str, torch.Tensor]) -> str:
    if "shared_ada_lin.1.weight" in tensors:
        return "shared"
    return "full" if "layers.0.ada_lin.1.weight" in tensors else "none"


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467): float32 inside, cast back, then weighted."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., dim) -> (..., dim)."""
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).type_as(x) * self.weight


def causal_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """Every position attends to itself and the positions before it; see Attend for the shapes.

    scale multiplies the scores; None: 1 / sqrt(head_dim).
    """
    attended = F.scaled_dot_product_attention(
        queries.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        is_causal=True,
        scale=scale,
        enable_gqa=queries.shape[2] != keys.shape[2],
    )
    return attended.transpose(1, 2)


class Attention(nn.Module):
    """Self-attention with rotary positions and optionally grouped keys and values."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.num_heads, self.kv_heads = config.num_heads, config.kv_heads
        self.head_dim = config.head_dim
        packed = (self.num_heads + 2 * self.kv_heads) * self.head_dim
        self.wqkv = nn.Linear(config.dim, packed, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)
        self.dropout = _dropout(config.residual_dropout)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(
        self, x: torch.Tensor, rotary: torch.Tensor, attend: Attend = causal_attention
    ) -> torch.Tensor:
        """x (batch, length, dim), rotary as for rope.rotate -> (batch, length, dim)."""
        heads = self.wqkv(x).unflatten(-1, (-1, self.head_dim))
        # Queries and keys are rotated in one go: half as many kernels in the inference engine.
        rotated, values = heads.split([self.num_heads + self.kv_heads, self.kv_heads], dim=-2)
        if self.qk_norm:
            queries, keys = rotated.split([self.num_heads, self.kv_heads], dim=-2)
            rotated = torch.cat([self.q_norm(queries), self.k_norm(keys)], dim=-2)
        rotated = rotate(rotated, rotary)
        queries, keys = rotated.split([self.num_heads, self.kv_heads], dim=-2)
        out = self.wo(attend(queries, keys, values).flatten(-2))
        return out if self.dropout is None else self.dropout(out)


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): w2(SiLU(w1 x) * w3 x)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)
        self.dropout = _dropout(config.ffn_dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., dim) -> (..., dim)."""
        gate, up = self.gate_up(x)
        out = self.w2(F.silu(gate) * up)
        return out if self.dropout is None else self.dropout(out)

    def gate_up(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The two projections (..., dim) -> (..., ffn_dim); inference/packing.py fuses them."""
        return self.w1(x), self.w3(x)


class Block(nn.Module):
    """Pre-norm attention and FFN, each added to the residual stream.

    With config.adaln, `ada_lin` maps the condition to a gain, a scale and a shift for each of the
    two: x + gain * f(norm(x) * (1 + scale) + shift) (IBQ, SEED-Voken). With shared, the condition
    is what the layer that all blocks share returns.
    """

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.ada_lin = _adaptive(config)
        self.drop_path = _drop_path(config, layer)

    def forward(
        self,
        x: torch.Tensor,
        rotary: torch.Tensor,
        attend: Attend = causal_attention,
        condition: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x (batch, length, dim), rotary as for rope.rotate -> (batch, length, dim).

        condition: (batch, 1, dim), with adaln; (batch, 1, 6 dim) where it is shared.
        """
        if self.ada_lin is None:
            x = self._add(x, self.attention(self.attention_norm(x), rotary, attend))
            return self._add(x, self.feed_forward(self.ffn_norm(x)))
        modulation = self.ada_lin(condition).chunk(6, dim=-1)
        attention_gain, ffn_gain, attention_scale, ffn_scale, attention_shift, ffn_shift = (
            modulation
        )
        h = self.attention_norm(x) * (1 + attention_scale) + attention_shift
        x = self._add(x, attention_gain * self.attention(h, rotary, attend))
        h = self.ffn_norm(x) * (1 + ffn_scale) + ffn_shift
        return self._add(x, ffn_gain * self.feed_forward(h))

    def _add(self, x: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        return x + (branch if self.drop_path is None else self.drop_path(branch))


class AdaptiveLinear(nn.Sequential):
    """The layer of an adaptive norm: condition (..., dim) -> (..., parts * dim)."""

    def __init__(self, dim: int, parts: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(dim, parts * dim))


class AdaptiveTable(nn.Module):
    """What a block adds to the scales, shifts and gains that all blocks share."""

    def __init__(self, dim: int, parts: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(parts, dim))

    def forward(self, shared: torch.Tensor) -> torch.Tensor:
        """(..., parts * dim) -> (..., parts * dim)."""
        return shared + self.table.flatten()


def _adaptive(config: TransformerConfig) -> nn.Module | None:
    if config.adaln == "none":
        return None
    kind = AdaptiveTable if config.adaln == "shared" else AdaptiveLinear
    return kind(config.dim, 6)


# None instead of a module that does nothing: at batch 1 the calls of such modules take 1 to 2 % of
# a sampling step.
def _dropout(rate: float) -> nn.Module | None:
    return nn.Dropout(rate) if rate else None


def _drop_path(config: TransformerConfig, layer: int) -> nn.Module | None:
    rate = config.drop_path * layer / max(1, config.num_layers - 1)
    if rate == 0:
        return None
    from timm.layers.drop import DropPath  # takes seconds to import, and few runs use it

    return DropPath(rate)
