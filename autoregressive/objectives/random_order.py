"""Random orders of the codes that become raster order (RAR, arXiv 2411.00776).

An image's codes are predicted in a random order with a probability that falls from 1 to 0. Each
input also gets a learned vector of the grid position to predict (GPTConfig.target_position).
"""

from typing import Any, ClassVar

import torch

from autoregressive.models.gpt import GPT
from autoregressive.objectives.base import Batch, Objective, annealed
from autoregressive.objectives.config import RandomOrderOptions


class RandomOrderLoss(Objective):
    """Cross-entropy in random orders, which become raster order (RAR)."""

    model_fields: ClassVar[dict[str, Any]] = {"target_position": True}
    raster_order = True

    def __init__(self, gpt: GPT, chunk: int, seed: int, options: RandomOrderOptions) -> None:
        super().__init__(gpt, chunk, seed)
        self.options = options

    def training_loss(self, batch: Batch) -> torch.Tensor:
        """The loss, in an order per image."""
        order = self.orders(batch)
        codes = batch.codes.gather(1, order)
        hidden = self.gpt.hidden(codes, batch.condition, batch.drop_condition, order)
        return self.cross_entropy(hidden, codes)

    def orders(self, batch: Batch) -> torch.Tensor:
        """The grid position of each code in turn, (batch, N) int64: a permutation of each row."""
        places = torch.arange(batch.codes.shape[1], device=batch.codes.device)
        permuted = self.uniform(batch, places + 1).argsort(dim=1, stable=True)
        share = annealed(self.progress, self.options.start, self.options.end)
        is_random = self.uniform(batch, torch.zeros_like(places[:1])) < share
        return torch.where(is_random, permuted, places)
