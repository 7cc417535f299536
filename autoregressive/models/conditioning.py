"""What the decoder is conditioned on: a class label, or the features of a caption.

Both embeddings turn a condition into prefix tokens (batch, C, dim), valid ones first, and replace
the rows marked `dropped` by the null condition of classifier-free guidance.
"""

import torch
from torch import nn
from torch.nn import functional as F

from core.config import InputError

Text = tuple[torch.Tensor, torch.Tensor]  # features (batch, T, text_dim), lengths (batch,) int64
Condition = torch.Tensor | Text  # labels (batch,) int64, or a Text


def select(condition: Condition, rows: torch.Tensor) -> Condition:
    """Some rows (n,) int64 of a condition."""
    if isinstance(condition, torch.Tensor):
        return condition[rows]
    return condition[0][rows], condition[1][rows]


def repeat(condition: Condition, count: int) -> Condition:
    """The first row of a condition, `count` times."""
    return select(condition, torch.zeros(count, dtype=torch.int64))


class ClassEmbedding(nn.Module):
    """One token per class; the null class is number `num_classes`."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, labels: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
        """Labels (batch,) int64 in [0, num_classes], dropped (batch,) bool -> (batch, 1, dim)."""
        labels = torch.where(dropped, self.num_classes, labels)
        return self.embedding_table(labels).unsqueeze(1)

    def lengths(self, labels: Condition) -> None:
        """Every prefix has the same length: None."""

    def check(self, labels: Condition) -> None:
        """Raise InputError for labels that are no class of this model (a host sync)."""
        if not isinstance(labels, torch.Tensor) or labels.ndim != 1 or labels.is_floating_point():
            raise InputError("this model is conditioned on classes: give labels (batch,) int64")
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) <= self.num_classes:
            raise InputError(f"labels must be in 0 .. {self.num_classes - 1}")


class CaptionProjection(nn.Module):
    """A two-layer network from text features to the decoder's width, without biases."""

    def __init__(self, text_dim: int, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(text_dim, dim, bias=False)
        self.fc2 = nn.Linear(dim, dim, bias=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(..., text_dim) -> (..., dim)."""
        return self.fc2(F.gelu(self.fc1(features), approximate="tanh"))


class TextEmbedding(nn.Module):
    """One token per text token, at most `max_tokens`; the null caption is a fixed buffer.

    The reference pads captions on the left, so token j of a caption of n tokens stands at place
    max_tokens - n + j, and is dropped to the null caption's row of that place.
    """

    uncond_embedding: torch.Tensor

    def __init__(self, text_dim: int, max_tokens: int, dim: int) -> None:
        super().__init__()
        self.text_dim, self.max_tokens = text_dim, max_tokens
        self.cap_proj = CaptionProjection(text_dim, dim)
        self.register_buffer("uncond_embedding", torch.zeros(max_tokens, text_dim))

    def forward(self, text: Text, dropped: torch.Tensor) -> torch.Tensor:
        """Features (batch, T, text_dim) valid first and lengths -> (batch, T, dim)."""
        features, lengths = text
        rows = torch.arange(features.shape[1], device=features.device)
        places = self.max_tokens - lengths[:, None] + rows
        null = self.uncond_embedding[places.clamp_(0, self.max_tokens - 1)]
        features = torch.where(dropped[:, None, None], null, features.to(null.dtype))
        return self.cap_proj(features)

    def lengths(self, text: Condition) -> torch.Tensor:
        """The number of valid tokens of each prefix, (batch,) int64."""
        return text[1]

    def check(self, text: Condition) -> None:
        """Raise InputError for features or lengths that do not fit (a host sync)."""
        if not isinstance(text, tuple) or text[0].ndim != 3 or text[0].shape[-1] != self.text_dim:
            raise InputError(
                f"this model is conditioned on text: give (features (batch, T, {self.text_dim}), "
                "lengths (batch,))"
            )
        features, lengths = text
        longest = min(features.shape[1], self.max_tokens)
        if not 1 <= int(lengths.min()) <= int(lengths.max()) <= longest:
            raise InputError(f"caption lengths must be in 1 .. {longest}")


def ragged_order(lengths: torch.Tensor, num_prefix: int, num_codes: int) -> torch.Tensor:
    """How to order [prefix (num_prefix), codes] as [valid prefix, codes, padding], per sample.

    lengths (batch,) int64 -> (batch, num_prefix + num_codes) int64 indices. With the padding last,
    causal attention alone hides it: no mask is needed. (Condition tokens carry no position.)
    """
    slots = torch.arange(num_prefix + num_codes, device=lengths.device)
    ends = lengths[:, None] + num_codes
    after_prefix = torch.where(
        slots < ends, slots - lengths[:, None] + num_prefix, slots - num_codes
    )
    return torch.where(slots < lengths[:, None], slots, after_prefix)
