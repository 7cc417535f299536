"""Tiny models with random weights, and inputs for them."""

import torch

from autoregressive import GPT, GPTConfig
from tokenizer import VQConfig, VQModel

TINY = {"num_layers": 2, "num_heads": 4, "dim": 32, "vocab_size": 50, "num_classes": 5}
SMALL = {"base_channels": 32, "channel_multipliers": (1, 2), "num_res_blocks": 1, "z_channels": 16}


def tiny(seed: int = 0, **overrides) -> GPT:
    """A GPT of two layers on a grid of 4 x 4, whose logits are not all alike."""
    torch.manual_seed(seed)
    gpt = GPT(GPTConfig(**{**TINY, "grid": (4, 4), **overrides})).eval()
    torch.nn.init.normal_(gpt.output.weight, std=0.5)
    return gpt


def captions(lengths: list[int], text_dim: int = 2048) -> tuple[torch.Tensor, torch.Tensor]:
    """Random text features, zero after each length: (batch, longest, text_dim), (batch,)."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(len(lengths), max(lengths), text_dim, generator=generator)
    for i, length in enumerate(lengths):
        features[i, length:] = 0
    return features, torch.tensor(lengths)


def small(**overrides) -> VQModel:
    """A VQ model that halves its images once, with 40 codes."""
    torch.manual_seed(0)
    return VQModel(VQConfig(**{**SMALL, "vocab_size": 40, **overrides})).eval()
