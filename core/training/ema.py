"""The exponential moving average of a model's weights."""

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

from core.distributed.parallel import local

Model = TypeVar("Model", bound=nn.Module)


class EMA(Generic[Model]):
    """A copy of `model` whose weights follow it: w <- decay * w + (1 - decay) * new.

    average: the module that holds the averages, of the same architecture and sharded like `model`;
        None for a deep copy of `model`. Its values are overwritten by those of `model`.
    """

    def __init__(self, model: Model, decay: float, average: Model | None = None) -> None:
        self.decay = decay
        self.model: Model = copy.deepcopy(model) if average is None else average
        self.model.eval().requires_grad_(False)
        if average is not None:
            with torch.no_grad():
                for own, new in zip(_tensors(average), _tensors(model), strict=True):
                    own.copy_(new)

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


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [local(tensor) for tensor in (*model.parameters(), *model.buffers())]
