"""What an image is conditioned on: a class label, or the features of a caption.

A condition holds one entry per image. An embedding module turns it into prefix tokens
(batch, C, dim), valid tokens first, and can replace it by the null condition, which
classifier-free guidance needs (Ho and Salimans, arXiv 2207.12598).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from autoregressive.models.lora import class_table
from core.config import InputError
from core.training.prefetch import pinned


@dataclass(frozen=True)
class ClassCondition:
    """One class per image: labels (batch,) int64."""

    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: torch.Tensor) -> "ClassCondition":
        return ClassCondition(self.labels[rows])

    def to(self, device: torch.device, non_blocking: bool = False) -> "ClassCondition":
        """The same condition on `device`."""
        return ClassCondition(self.labels.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "ClassCondition":
        """The same condition in page-locked memory, for asynchronous copies to a GPU.

        Tensors that are on a GPU already stay there.
        """
        return ClassCondition(pinned(self.labels))

    def pad(self, length: int) -> "ClassCondition":
        """The same condition: a class has one length."""
        return self

    def repeat(self, count: int) -> "ClassCondition":
        """The first image's condition, `count` times."""
        return self[torch.zeros(count, dtype=torch.int64)]

    @classmethod
    def cat(cls, parts: Sequence["ClassCondition"]) -> "ClassCondition":
        """Concatenate along the batch."""
        return cls(torch.cat([part.labels for part in parts]))


@dataclass(frozen=True)
class TextCondition:
    """One caption per image: features (batch, T, text_dim), valid tokens first, and lengths.

    lengths (batch,) int64 counts the valid tokens; features behind them are ignored.
    """

    features: torch.Tensor
    lengths: torch.Tensor

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, rows: torch.Tensor) -> "TextCondition":
        return TextCondition(self.features[rows], self.lengths[rows])

    def to(self, device: torch.device, non_blocking: bool = False) -> "TextCondition":
        """The same condition on `device`."""
        return TextCondition(
            self.features.to(device, non_blocking=non_blocking),
            self.lengths.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> "TextCondition":
        """The same condition in page-locked memory; see ClassCondition.pin_memory."""
        return TextCondition(pinned(self.features), pinned(self.lengths))

    def pad(self, length: int) -> "TextCondition":
        """The same captions, with features padded with zeros to `length` tokens."""
        missing = length - self.features.shape[1]
        return TextCondition(F.pad(self.features, (0, 0, 0, missing)), self.lengths)

    def repeat(self, count: int) -> "TextCondition":
        """The first image's condition, `count` times."""
        return self[torch.zeros(count, dtype=torch.int64)]

    @classmethod
    def cat(cls, parts: Sequence["TextCondition"]) -> "TextCondition":
        """Concatenate along the batch; pads the features to the longest."""
        longest = max(part.features.shape[1] for part in parts)
        features = [F.pad(p.features, (0, 0, 0, longest - p.features.shape[1])) for p in parts]
        return cls(torch.cat(features), torch.cat([part.lengths for part in parts]))


Condition = ClassCondition | TextCondition
# What the public functions accept: a Condition, labels, or (features, lengths).
ConditionLike = Condition | torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def as_condition(value: Any) -> Condition:  # noqa: ANN401 - the public door checks any value
    """Labels become a ClassCondition, (features, lengths) a TextCondition; a Condition stays.

    Raises InputError for anything else. Only this function asks what kind of value it has.
    """
    if isinstance(value, ClassCondition | TextCondition):
        return value
    if isinstance(value, torch.Tensor):
        return ClassCondition(value)
    if isinstance(value, tuple | list) and len(value) == 2:
        return TextCondition(*value)
    raise InputError(
        "condition: expected labels (batch,) int64, or (features (batch, T, text_dim), lengths "
        f"(batch,) int64), got {type(value).__name__}"
    )


def class_labels(value: Any) -> torch.Tensor:  # noqa: ANN401 - as for as_condition
    """The labels (batch,) int64 of a condition; raises InputError for captions."""
    condition = as_condition(value)
    if not isinstance(condition, ClassCondition):
        raise InputError("condition: expected labels (batch,) int64, got captions")
    return condition.labels


class ClassEmbedding(nn.Module):
    """One prefix token per image, looked up by class; index `num_classes` is the null class.

    An unconditional model has no classes: its label 0 is the null class. new_classes: how many of
    the last classes have rows of their own beside the table of a base model (see models/lora.py).
    """

    condition_type = ClassCondition

    def __init__(self, num_classes: int, dim: int, new_classes: int = 0) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes - new_classes + 1, dim)
        self.new_classes = nn.Parameter(torch.zeros(new_classes, dim)) if new_classes else None

    def forward(self, condition: ClassCondition, drop: torch.Tensor) -> torch.Tensor:
        """Prefix tokens (batch, 1, dim); drop (batch,) bool marks rows that get the null class."""
        labels = torch.where(drop, self.num_classes, condition.labels)
        if self.new_classes is None:
            return self.embedding_table(labels).unsqueeze(1)
        table = class_table(self.embedding_table.weight, self.new_classes)
        return F.embedding(labels, table).unsqueeze(1)

    def lengths(self, condition: Any) -> None:  # noqa: ANN401 - any Condition
        """None: every prefix has the same length."""

    def examples(self, count: int) -> ClassCondition:
        """The first classes in turn, for `count` images: to compare engines with."""
        return ClassCondition(torch.arange(count) % max(1, self.num_classes))

    def check(self, condition: Any) -> None:  # noqa: ANN401 - any Condition
        """Raise InputError for labels that this model does not have (a host sync)."""
        labels = condition.labels if type(condition) is self.condition_type else None
        if labels is None or labels.ndim != 1 or labels.is_floating_point():
            raise InputError("this model is conditioned on classes: give labels (batch,) int64")
        last = max(0, self.num_classes - 1)
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) <= last:
            raise InputError(f"labels must be in 0 .. {last}")


class CaptionProjection(nn.Module):
    """A two-layer network without biases, from text features to the transformer's width."""

    def __init__(self, text_dim: int, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(text_dim, dim, bias=False)
        self.fc2 = nn.Linear(dim, dim, bias=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(..., text_dim) -> (..., dim)."""
        return self.fc2(F.gelu(self.fc1(features), approximate="tanh"))


class TextEmbedding(nn.Module):
    """One prefix token per caption token, at most `max_tokens`; the null caption is a buffer.

    The reference pads captions on the left, so token j of a caption of n tokens has index
    max_tokens - n + j. A dropped caption takes the null caption's rows at those indices.
    """

    condition_type = TextCondition
    uncond_embedding: torch.Tensor

    def __init__(self, text_dim: int, max_tokens: int, dim: int) -> None:
        super().__init__()
        self.text_dim, self.max_tokens = text_dim, max_tokens
        self.cap_proj = CaptionProjection(text_dim, dim)
        self.register_buffer("uncond_embedding", torch.zeros(max_tokens, text_dim))

    def forward(self, condition: TextCondition, drop: torch.Tensor) -> torch.Tensor:
        """Prefix tokens (batch, T, dim); drop (batch,) bool marks rows of the null caption."""
        features, lengths = condition.features, condition.lengths
        tokens = torch.arange(features.shape[1], device=features.device)
        indices = self.max_tokens - lengths[:, None] + tokens
        null = self.uncond_embedding[indices.clamp_(0, self.max_tokens - 1)]
        features = torch.where(drop[:, None, None], null, features.to(null.dtype))
        return self.cap_proj(features)

    def lengths(self, condition: Any) -> torch.Tensor:  # noqa: ANN401 - any Condition
        """Number of valid tokens of each prefix, (batch,) int64."""
        return condition.lengths

    def examples(self, count: int) -> TextCondition:
        """The null caption's last token, for `count` images: to compare engines with."""
        features = self.uncond_embedding[-1:].expand(count, 1, -1)
        return TextCondition(features, torch.ones(count, dtype=torch.int64))

    def check(self, condition: Any) -> None:  # noqa: ANN401 - any Condition
        """Raise InputError for features or lengths that do not fit the model (a host sync)."""
        features = condition.features if type(condition) is self.condition_type else None
        if features is None or features.ndim != 3 or features.shape[-1] != self.text_dim:
            raise InputError(
                f"this model is conditioned on text: give (features (batch, T, {self.text_dim}), "
                "lengths (batch,))"
            )
        lengths = condition.lengths
        if lengths.shape != features.shape[:1]:
            raise InputError("caption lengths must be (batch,), one per caption")
        longest = min(features.shape[1], self.max_tokens)
        if len(lengths) and not 1 <= int(lengths.min()) <= int(lengths.max()) <= longest:
            raise InputError(f"caption lengths must be in 1 .. {longest}")


class GuidanceEmbedding(nn.Module):
    """The guidance strength as an input of the model (GFT): a vector for the condition tokens.

    Sinusoids of 1000 times the strength, then two linear layers; the second starts at zero, so that
    a fine-tuned model starts as the original one.
    """

    SINUSOIDS, SCALE, BASE = 256, 1000.0, 10000.0

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.SINUSOIDS, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, guidance: torch.Tensor) -> torch.Tensor:
        """Strengths (batch,) float32 in (0, 1], 1 for none -> (batch, 1, dim)."""
        return self.mlp(self.sinusoids(guidance).to(self.get_parameter("mlp.0.weight").dtype))[
            :, None
        ]

    def sinusoids(self, guidance: torch.Tensor) -> torch.Tensor:
        """(batch,) -> (batch, 256), cosines first, in float32: bf16 cannot tell close strengths."""
        half = self.SINUSOIDS // 2
        steps = torch.arange(half, dtype=torch.float32, device=guidance.device)
        angles = (
            self.SCALE * guidance.float()[:, None] * torch.exp(-math.log(self.BASE) * steps / half)
        )
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


def ragged_order(lengths: torch.Tensor, num_prefix: int, num_codes: int) -> torch.Tensor:
    """Indices that reorder [prefix, codes] into [valid prefix, codes, padding], per sample.

    lengths (batch,) int64 -> (batch, num_prefix + num_codes) int64. Padding comes last, where
    causal attention already hides it, so no attention mask is needed.
    """
    slots = torch.arange(num_prefix + num_codes, device=lengths.device)
    ends = lengths[:, None] + num_codes
    after_prefix = torch.where(
        slots < ends, slots - lengths[:, None] + num_prefix, slots - num_codes
    )
    return torch.where(slots < lengths[:, None], slots, after_prefix)
