"""Condition contrastive alignment: fine-tunes a model to sample without guidance (CCA).

Chen et al., arXiv 2410.09347. The likelihood of an image given its own class rises, and the one
given another class falls, both against the model that the training starts from.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from autoregressive.models.conditioning import class_labels
from autoregressive.models.config import GPTConfig
from autoregressive.models.gpt import GPT
from autoregressive.objectives.base import Batch, Objective
from core.config import InputError


@dataclass(frozen=True)
class ContrastiveOptions:
    """Options of the objective contrastive.

    Args:
        beta: Factor on the differences of log-likelihoods, > 0.
        negative_weight: Weight lambda of the images with another class; published: 1000 for B, XL
            and XXL, 300 for L, 500 for 3B.
    """

    beta: float = 0.02
    negative_weight: float = 1000.0

    def __post_init__(self) -> None:
        if self.beta <= 0 or self.negative_weight <= 0:
            raise ValueError("objective.contrastive: beta and negative_weight must be > 0")


class ContrastiveLoss(Objective):
    """Fine-tuning after which no guidance is needed (CCA); needs init_from.

    An image's negative class is the class of the next one of the batch.
    """

    options_type = ContrastiveOptions
    sequences_per_image = 2

    def __init__(self, gpt: GPT, chunk: int, seed: int, options: ContrastiveOptions) -> None:
        super().__init__(gpt, chunk, seed)
        self.options = options
        self.reference = GPT(gpt.config).requires_grad_(False)

    def check(self, config: GPTConfig, images: int) -> None:
        """Refuse captions: whether two of them are the same condition is not defined."""
        if config.condition != "class":
            raise InputError(
                "objective.kind contrastive needs classes; the condition of these data is "
                f"{config.condition}"
            )

    def extra(self, rows: np.ndarray, neighbours: Callable[[], Any]) -> Any:  # noqa: ANN401
        """The negative classes (batch,) int64."""
        return (class_labels(neighbours()),)

    def training_loss(self, batch: Batch) -> torch.Tensor:
        """The loss; the reference sees the same dropout rates (its weights are frozen)."""
        assert self.reference is not None
        own, other = class_labels(batch.condition), batch.extra[0]
        drop = batch.drop_condition
        codes = batch.codes.repeat(2, 1)
        labels, drops = torch.cat([own, other]), drop.repeat(2)
        likelihood = self.log_likelihood(self.gpt, codes, labels, drops)
        with torch.no_grad():
            before = self.log_likelihood(self.reference, codes, labels, drops)
        gap, negative_gap = (likelihood - before).chunk(2)
        return contrastive_loss(gap, negative_gap, drop | (own == other), self.options)

    def log_likelihood(
        self, gpt: GPT, codes: torch.Tensor, labels: torch.Tensor, drop: torch.Tensor
    ) -> torch.Tensor:
        """log p(codes | class) of each image, (batch,) float32."""
        hidden = gpt.hidden(codes, labels, drop).flatten(0, 1)
        parts = [
            checkpoint(_log_probs, rows, gpt.output.weight, wanted, use_reentrant=False)
            for rows, wanted in zip(
                hidden.split(self.chunk), codes.flatten().split(self.chunk), strict=True
            )
        ]
        return torch.cat(parts).view_as(codes).sum(dim=1)


def _log_probs(hidden: torch.Tensor, weight: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    return -F.cross_entropy(F.linear(hidden, weight).float(), codes, reduction="none")


def contrastive_loss(
    gap: torch.Tensor,
    negative_gap: torch.Tensor,
    same: torch.Tensor,
    options: ContrastiveOptions,
) -> torch.Tensor:
    """The loss from differences of log-likelihoods (batch,) to the reference model, a scalar.

    same: (batch,) bool, where the negative class is the own one or both are the null class; such a
    pair counts as one more positive, with weight 1.
    """
    sign = torch.where(same, 1.0, -1.0)
    weight = torch.where(same, 1.0, options.negative_weight)
    positive = F.logsigmoid(options.beta * gap).mean()
    negative = (weight * F.logsigmoid(sign * options.beta * negative_gap)).mean()
    return -(positive + negative) / max(options.negative_weight, 1.0)
