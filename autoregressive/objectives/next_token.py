"""The default objective: mean cross-entropy of every code, given the codes before it."""

import torch

from autoregressive.objectives.base import Batch, Objective


class NextTokenLoss(Objective):
    """Cross-entropy of the next code (LlamaGen)."""

    def training_loss(self, batch: Batch) -> torch.Tensor:
        """Mean cross-entropy per code."""
        return self.next_token_loss(batch.codes, batch.condition, batch.drop_condition)
