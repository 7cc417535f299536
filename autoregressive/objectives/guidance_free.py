"""Guidance-free training: the strength of guidance is an input (GFT, arXiv 2501.15420).

The model samples with one row per image instead of two. Its logits, mixed with its own
unconditional ones in the proportion beta : 1 - beta, predict the codes.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from autoregressive.models.config import GPTConfig
from autoregressive.models.gpt import GPT
from autoregressive.objectives.base import Batch, Objective
from core.config import InputError
from core.training.linear_cross_entropy import linear_cross_entropy


@dataclass(frozen=True)
class GuidanceFreeOptions:
    """Options of the objective guidance_free.

    Args:
        least: Smallest guidance strength beta that is trained, in [0, 1); the largest is 1.
    """

    least: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.least < 1:
            raise ValueError("objective.guidance_free.least must be in [0, 1)")


class GuidanceFreeLoss(Objective):
    """Guidance becomes an input, and sampling takes half the rows (GFT).

    The logits are beta * conditional + (1 - beta) * unconditional ones.
    """

    options_type = GuidanceFreeOptions
    model_fields: ClassVar[dict[str, Any]] = {"guidance_input": True}

    def __init__(self, gpt: GPT, chunk: int, seed: int, options: GuidanceFreeOptions) -> None:
        super().__init__(gpt, chunk, seed)
        self.options = options

    def check(self, config: GPTConfig, images: int) -> None:
        """Refuse an unconditional model: there is nothing to guide."""
        if config.condition == "none":
            raise InputError("objective.kind guidance_free needs classes or captions")

    def training_loss(self, batch: Batch) -> torch.Tensor:
        """The loss, with a strength per image."""
        least = self.options.least
        return self.loss(batch, least + (1 - least) * self.uniform(batch))

    def loss(self, batch: Batch, beta: torch.Tensor) -> torch.Tensor:
        """The loss for strengths beta (batch,) float32 in (0, 1]."""
        gpt, ones = self.gpt, torch.ones_like(beta)
        training = gpt.training
        gpt.eval()
        with torch.no_grad():
            null = torch.ones_like(batch.drop_condition)
            away = gpt.hidden(batch.codes, batch.condition, null, guidance=ones)
        gpt.train(training)
        # A row that drops its condition is unconditional: strength 1 is its input.
        given = torch.where(batch.drop_condition, 1.0, beta)
        hidden = gpt.hidden(batch.codes, batch.condition, batch.drop_condition, guidance=given)
        beta = beta[:, None, None]
        # The head is linear: the mixture of logits is that of hidden states.
        mixed = (beta * hidden).to(hidden.dtype).flatten(0, 1)
        constant = ((1 - beta) * away).flatten(0, 1)
        weight = gpt.output.weight
        return linear_cross_entropy(mixed, weight, batch.codes.flatten(), self.chunk, constant)
