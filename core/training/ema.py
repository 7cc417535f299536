"""The exponential moving average of a model's weights."""

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

from core.distributed.parallel import local

Model = TypeVar("Model", bound=nn.Module)


class EMA(Generic[Model]):
    """A copy of `model` whose weights follow it: w <- decay * w + (1 - decay) * new."""

    def __init__(self, model: Model, decay: float) -> None:
        self.decay = decay
        self.model: Model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Follow `model` by one step; buffers are copied."""
        # Both are sharded alike, so that each process averages its own part.
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
            [local(own) for own in self.model.parameters()],
            [local(new) for new in model.parameters()],
            1 - self.decay,
        )
        for own, new in zip(self.model.buffers(), model.buffers(), strict=True):
            own.copy_(new)
