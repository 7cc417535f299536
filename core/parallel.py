"""Parallelism from outside the model, in one order: activation checkpointing -> compile -> DDP."""

import contextlib
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.nn.parallel import DistributedDataParallel

from core.distributed import World


@dataclass(frozen=True)
class ParallelConfig:
    """How a model is run for training.

    Args:
        compile: torch.compile the model; the first steps are slow.
        activation_checkpointing: none; full recomputes every block in the backward pass.
    """

    compile: bool = False
    activation_checkpointing: Literal["none", "full"] = "none"


def no_sync(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Leave the gradients of a micro-batch unreduced, where `model` is parallel."""
    if isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()


def prepare(
    model: nn.Module, config: ParallelConfig, world: World, block: type[nn.Module]
) -> nn.Module:
    """Wrap `model` (already on world.device) for training; `block` is its repeated layer.

    State dicts, EMA and sampling keep using `model` itself: the wrappers share its parameters.
    """
    if config.activation_checkpointing == "full":
        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, block))
    if config.compile:
        model.compile()
    if world.size > 1:
        ids = [world.device.index] if world.device.type == "cuda" else None
        return DistributedDataParallel(
            model,
            device_ids=ids,
            gradient_as_bucket_view=True,
            broadcast_buffers=False,  # no buffer here changes what training computes
        )
    return model
