"""Next-patch prediction: first patches of codes, then single codes (NPP, arXiv 2412.15321).

A patch's input is the mean of its codes' embeddings, and its one softmax predicts all of its codes.
A stage with patches of 2 x 2 is four times shorter. The weights stay those of the plain model.
"""

import torch

from autoregressive.models.config import GPTConfig
from autoregressive.models.gpt import GPT
from autoregressive.objectives.base import Batch, Objective
from autoregressive.objectives.config import NextPatchOptions
from core.config import InputError
from core.training.linear_cross_entropy import linear_cross_entropy


class NextPatchLoss(Objective):
    """Cross-entropy, first of patches of codes, which are shorter sequences (NPP)."""

    raster_order = True

    def __init__(self, gpt: GPT, chunk: int, seed: int, options: NextPatchOptions) -> None:
        super().__init__(gpt, chunk, seed)
        self.options = options

    def check(self, config: GPTConfig, images: int) -> None:
        """Refuse a grid that has no whole number of patches."""
        if any(size % self.options.side for size in config.grid):
            raise InputError(
                f"objective.next_patch.side {self.options.side} must divide the grid {config.grid}"
            )

    def training_loss(self, batch: Batch) -> torch.Tensor:
        """The loss of the current stage."""
        if self.progress >= self.options.until:
            return self.next_token_loss(batch.codes, batch.condition, batch.drop_condition)
        rows, columns = self.gpt.config.grid
        side = self.options.side
        codes = batch.codes.view(-1, rows // side, side, columns // side, side)
        patches = codes.transpose(2, 3).flatten(3).flatten(1, 2)  # (batch, patches, side^2)
        inputs = self.gpt.tok_embeddings(patches[:, :-1]).mean(dim=2)
        # Rotary angles are those of a grid of patches: 0, 1, 2, ..., not stretched.
        device = codes.device
        positions = torch.arange(rows // side, device=device)[:, None] * columns
        positions = (positions + torch.arange(columns // side, device=device)).view(1, -1)
        hidden = self.gpt.hidden_of(inputs, batch.condition, batch.drop_condition, positions)
        weight = self.gpt.output.weight
        return linear_cross_entropy(hidden.flatten(0, 1), weight, patches.flatten(0, 1), self.chunk)
