"""The transformer block: Llama's, with 2-D rotary positions, for training and sampling alike.

Facts that the released weights depend on: q | k | v packed in one matrix, a rotary embedding of
interleaved pairs, and RMSNorm that computes in float32 and casts back before its weight.

The block knows nothing of caches. It gets an `attend` function, which receives the rotated queries
and keys and the values: causal attention by default, a key-value cache in the inference engine.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from autoregressive.models.config import PRESETS, TransformerConfig
from autoregressive.models.rope import rotate

USUAL_HEAD_DIM = 64  # of weights that do not tell their number of heads

# (queries (batch, length, heads, head_dim), keys and values (batch, length, kv_heads, head_dim))
# -> (batch, length, heads, head_dim)
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def infer_transformer_fields(
    tensors: Mapping[str, torch.Tensor], num_heads: int | None = None
) -> dict[str, Any]:
    """Fields of TransformerConfig that a state dict tells by its keys and shapes.

    num_heads can be told from shapes only with qk_norm. If None, it is the published one for this
    width, else that of heads of width 64. Raises KeyError for a state dict without transformer
    blocks, ValueError for a width that heads of 64 do not divide.
    """
    dim = tensors["tok_embeddings.weight"].shape[1]
    packed = tensors["layers.0.attention.wqkv.weight"].shape[0]
    num_heads = num_heads or _infer_num_heads(tensors, dim)
    more: dict[str, Any] = {}
    if "learned.cls_token" in tensors:
        width = len(tensors["layers.0.feed_forward.w1.weight"])
        more = {"family": "rar", "ffn_width": width, "norm_eps": 1e-6}
    kv_heads = (packed - dim) // 2 // (dim // num_heads)
    return {
        "num_layers": 1 + max(int(key.split(".")[1]) for key in tensors if key[:7] == "layers."),
        "num_heads": num_heads,
        "num_kv_heads": 0 if kv_heads == num_heads else kv_heads,
        "dim": dim,
        "qk_norm": "layers.0.attention.q_norm.weight" in tensors,
        "adaln": _infer_adaln(tensors),
        **more,
    }


def _infer_num_heads(tensors: Mapping[str, torch.Tensor], dim: int) -> int:
    norm = tensors.get("layers.0.attention.q_norm.weight")
    if norm is not None:
        return dim // len(norm)
    heads_of_width = {width: heads for _, heads, width in PRESETS.values()}
    if dim in heads_of_width:
        return heads_of_width[dim]
    if dim % USUAL_HEAD_DIM:
        raise ValueError(
            f"their width is {dim}, which is no multiple of {USUAL_HEAD_DIM}, and no file tells "
            "the number of heads: in Python, give it to GPT.from_pretrained(..., num_heads=...), "
            "and write a folder with save_pretrained"
        )
    return dim // USUAL_HEAD_DIM


def _infer_adaln(tensors: Mapping[str, torch.Tensor]) -> str:
    if "shared_ada_lin.1.weight" in tensors:
        return "shared"
    return "full" if "layers.0.ada_lin.1.weight" in tensors else "none"


def norm_layer(config: TransformerConfig, dim: int, weighted: bool = True) -> nn.Module:
    """The norm of the model's family. weighted: it has weights of its own."""
    if config.family == "rar":
        return nn.LayerNorm(dim, config.norm_eps, elementwise_affine=weighted)
    return RMSNorm(dim, config.norm_eps)


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
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Every position attends to itself and the positions before it; see Attend for the shapes.

    scale multiplies the scores; None: 1 / sqrt(head_dim).
    mask: (batch or 1, 1, length, length) bool, true where a query attends to a key instead.
    """
    attended = F.scaled_dot_product_attention(
        queries.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
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
        self.wqkv = nn.Linear(config.dim, packed, bias=config.family == "rar")
        self.wo = nn.Linear(config.dim, config.dim, bias=config.family == "rar")
        self.dropout = _dropout(config.residual_dropout)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = norm_layer(config, config.head_dim)
            self.k_norm = norm_layer(config, config.head_dim)

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


class GELUFeedForward(nn.Module):
    """The FFN of a ViT, with biases: w2(GELU(w1 x))."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim)
        self.w2 = nn.Linear(config.ffn_dim, config.dim)
        self.dropout = _dropout(config.ffn_dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., dim) -> (..., dim)."""
        out = self.w2(F.gelu(self.w1(x)))
        return out if self.dropout is None else self.dropout(out)


class Block(nn.Module):
    """Pre-norm attention and FFN, each added to the residual stream.

    With config.adaln, `ada_lin` maps the condition to a gain, a scale and a shift for each of the
    two: x + gain * f(norm(x) * (1 + scale) + shift) (IBQ, SEED-Voken). With shared, the condition
    is what the layer that all blocks share returns.
    """

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.attention = Attention(config)
        rar = config.family == "rar"
        self.feed_forward = GELUFeedForward(config) if rar else FeedForward(config)
        self.attention_norm = norm_layer(config, config.dim)
        self.ffn_norm = norm_layer(config, config.dim)
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

        condition: (batch, 1, dim), with adaln; (batch, 1, 6 dim) where it is shared; (batch,
            length, dim) in the family rar.
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


def with_one(x: torch.Tensor) -> torch.Tensor:
    """(..., dim) -> (..., dim + 1): a last column of ones, which the head's bias multiplies."""
    return F.pad(x, (0, 1), value=1.0)


def modulated(x: torch.Tensor, modulation: torch.Tensor | None) -> torch.Tensor:
    """The last norm's output, scaled and shifted by modulation (batch, 1, 2 dim), if any."""
    if modulation is None:
        return x
    scale, shift = modulation.chunk(2, dim=-1)
    return x * (1 + scale) + shift


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
