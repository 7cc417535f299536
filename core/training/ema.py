"""The exponential moving average of a model's weights."""

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

from core.distributed.parallel import local

Model = TypeVar("Model", bound=nn.Module)


class EMA(Generic[Model]):
    """Keeps the exponential moving average of the weights: w <- decay * w + (1 - decay) * new.

    ema_model: Module of the same architecture, sharded like `model`, that holds the averages. Its
        values are overwritten by those of `model`. None makes a deep copy of `model`.
    """

    def __init__(self, model: Model, decay: float, ema_model: Model | None = None) -> None:
        self.decay = decay
        self.model: Model = copy.deepcopy(model) if ema_model is None else ema_model
        self.model.eval().requires_grad_(False)
        if ema_model is not None:
            with torch.no_grad():
                for own, new in zip(_tensors(ema_model), _tensors(model), strict=True):
                    own.copy_(new)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Average in the weights of `model` after an optimizer step; buffers are copied."""
        # Both models are sharded alike, so each process averages its own shard. Frozen weights of
        # the two are equal and stay so.
        pairs = zip(self.model.parameters(), model.parameters(), strict=True)
        trained = [(local(own), local(new)) for own, new in pairs if new.requires_grad]
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
            [own for own, _ in trained], [new for _, new in trained], 1 - self.decay
        )
        for own, new in zip(self.model.buffers(), model.buffers(), strict=True):
            own.copy_(new)


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [local(tensor) for tensor in (*model.parameters(), *model.buffers())]
