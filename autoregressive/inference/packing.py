"""Converts a transformer block for inference: the same Block class, with packed weights."""

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import nn
from torch.nn import functional as F

from autoregressive.inference.quantized_linear import pack
from autoregressive.models.config import TransformerConfig
from autoregressive.models.gpt import GPT
from autoregressive.models.transformer import Block, FeedForward, RMSNorm

ALIGNMENT = 8  # attention kernels want head_dim to be a multiple of this


def aligned_head_dim(config: TransformerConfig) -> int:
    """Width of a head in the inference engine: head_dim, zero-padded to a multiple of 8."""
    return -(-config.head_dim // ALIGNMENT) * ALIGNMENT


def inference_block(
    block: Block, config: TransformerConfig, like: torch.Tensor, precision: str | None
) -> Block:
    """A copy of `block` for inference, in the dtype and on the device of `like`.

    Its linear layers are those of quantized_linear.pack, heads are zero-padded to an aligned
    width, and w1 and w3 are fused into one product. The padding does not change the result if
    `attend` scales by the true head_dim.
    """
    attention, ffn, head_dim = block.attention, block.feed_forward, config.head_dim
    padding = aligned_head_dim(config) - head_dim

    def packed(weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Module:
        product = pack(weight.detach().to(like.device), like.dtype, precision)
        return product if bias is None else Biased(product, bias.detach().to(like))

    with torch.device("meta"):
        copy = Block(config, layer=0).eval()
    wqkv = attention.wqkv.weight.unflatten(0, (-1, head_dim))
    wo = attention.wo.weight.unflatten(1, (-1, head_dim))
    copy.attention.head_dim = head_dim + padding
    qkv_bias, out_bias = attention.wqkv.bias, attention.wo.bias  # in the family rar, unpadded
    wqkv = F.pad(wqkv, (0, 0, 0, padding)).flatten(0, 1)
    copy.attention.add_module("wqkv", packed(wqkv, qkv_bias))
    copy.attention.add_module("wo", packed(F.pad(wo, (0, padding)).flatten(1), out_bias))
    copy.attention.dropout = copy.drop_path = None
    if isinstance(ffn, FeedForward):
        copy.feed_forward = FusedFeedForward(ffn, packed)
    else:
        copy.feed_forward.add_module("w1", packed(ffn.w1.weight, ffn.w1.bias))
        copy.feed_forward.add_module("w2", packed(ffn.w2.weight, ffn.w2.bias))
        copy.feed_forward.dropout = None
    if config.family == "rar":  # the condition changes with the token
        weight, bias = (block.get_parameter(f"ada_lin.1.{name}") for name in ("weight", "bias"))
        copy.add_module("ada_lin", nn.Sequential(nn.SiLU(), packed(weight, bias)))
    elif copy.ada_lin is not None:
        # The engine computes scales, shifts and gains once per image and passes them instead of
        # the condition.
        copy.add_module("ada_lin", nn.Identity())
    for name, norm in block.named_modules():
        if isinstance(norm, RMSNorm | nn.LayerNorm):
            padded = padding if name.startswith("attention.") else 0  # a norm over head_dim
            copy.set_submodule(name, inference_norm(norm, like, padded))
    left = [name for name, parameter in copy.named_parameters() if parameter.is_meta]
    assert not left, f"parameters that the inference engine does not know: {left}"
    return copy


class Biased(nn.Module):
    """A packed product, and a bias."""

    def __init__(self, product: nn.Module, bias: torch.Tensor) -> None:
        super().__init__()
        self.product, self.bias = product, nn.Buffer(bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., inputs) -> (..., outputs)."""
        return self.product(x) + self.bias


def raster_vectors(gpt: GPT, like: torch.Tensor) -> torch.Tensor | None:
    """What is added to the tokens: row i to the token that predicts code i, (codes + 1, dim).

    They are those of the codes' own positions and of the positions to predict; None if the model
    has none. The last row is for the last code.
    """
    if gpt.target_position is None and gpt.learned is None:
        return None
    table = torch.zeros(gpt.config.num_codes + 1, gpt.config.dim)
    if gpt.target_position is not None:
        table[:-1] += gpt.target_position.weight.detach().float().cpu()
    if gpt.learned is not None:
        table[1:] += gpt.learned.positions[gpt.learned.PREFIX :].detach().float().cpu()
    return table.to(like)


class FusedFeedForward(FeedForward):
    """A FeedForward whose two projections are one product."""

    def __init__(self, ffn: FeedForward, packed: Callable[[torch.Tensor], nn.Module]) -> None:
        nn.Module.__init__(self)
        self.w13 = packed(torch.cat([ffn.w1.weight, ffn.w3.weight]))
        self.add_module("w2", packed(ffn.w2.weight))
        self.dropout = None

    def gate_up(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See FeedForward."""
        gate, up = self.w13(x).chunk(2, dim=-1)
        return gate, up


def inference_norm(norm: nn.Module, like: torch.Tensor, padding: int = 0) -> nn.Module:
    """A copy of a norm in the dtype and on the device of `like`, without gradients.

    padding: zeros that follow the inputs of an RMSNorm. They lower the mean square by dim / padded
    dim, which the copy's epsilon and weight compensate.
    """
    if not isinstance(norm, RMSNorm):
        assert padding == 0
        return deepcopy(norm).to(like).requires_grad_(False)
    weight = norm.weight.detach()
    dim = len(weight)
    share = dim / (dim + padding)
    with torch.device("meta"):
        copy = RMSNorm(dim + padding, norm.eps * share)
    weight = F.pad(weight * share**0.5, (0, padding)) if padding else weight
    copy.weight = nn.Parameter(weight.to(like), requires_grad=False)
    return copy
