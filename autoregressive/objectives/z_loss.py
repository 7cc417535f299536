"""Cross-entropy that keeps the logits' normaliser near one (Chameleon, arXiv 2405.09818, 2.3).

The normaliser Z is the sum of exp(logits) at a code. Cross-entropy does not see a shift of all
logits, so that Z can drift until bf16 cannot hold it; the loss adds weight * (log Z)^2.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from autoregressive.models.gpt import GPT
from autoregressive.objectives.base import Batch, Objective


@dataclass(frozen=True)
class ZLossOptions:
    """Options of the objective z_loss.

    Args:
        weight: Factor of the squared logarithm of the normaliser; 1e-5 in the paper.
    """

    weight: float = 1e-5

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise ValueError(f"objective.z_loss.weight is {self.weight}, must be > 0")


class ZLoss(Objective):
    """Cross-entropy that keeps the logits' normaliser near one (Chameleon)."""

    options_type = ZLossOptions

    def __init__(self, gpt: GPT, chunk: int, seed: int, options: ZLossOptions) -> None:
        super().__init__(gpt, chunk, seed)
        self.options = options

    def training_loss(self, batch: Batch) -> torch.Tensor:
        """Mean over all codes of both terms. The head runs once more than for the plain loss."""
        hidden = self.gpt.hidden(batch.codes, batch.condition, batch.drop_condition)
        squares = [
            checkpoint(_squared_log_normaliser, part, self.gpt.output.weight, use_reentrant=False)
            for part in hidden.flatten(0, 1).split(self.chunk)
        ]
        mean = torch.stack(squares).sum() / batch.codes.numel()
        return self.cross_entropy(hidden, batch.codes) + self.options.weight * mean


def _squared_log_normaliser(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The sum of (log Z)^2 over rows of hidden (n, dim), recomputed in the backward pass."""
    return F.linear(hidden, weight).float().logsumexp(dim=-1).square().sum()
