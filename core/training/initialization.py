"""Initial weights from (seed, name of the tensor), whatever the strategy and number of processes.

A model for training is built on the meta device, sharded, and given memory shard by shard, so that
no process ever holds the whole of a sharded model. The value of each element depends only on the
seed, the tensor's name in the state dict and the element's position in the tensor, so each process
computes exactly the rows that it holds.
"""

import hashlib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from core.distributed.parallel import first_row, local
from core.rng import random_bits, random_uniform
from core.weights import check_finite, check_shapes

# Elements computed at once: their 64-bit counters stay in the processor's cache.
_CHUNK = 1 << 17


@dataclass(frozen=True)
class Constant:
    """Every element has this value."""

    value: float


@dataclass(frozen=True)
class Normal:
    """A normal distribution of mean 0. The first `gain_rows` rows are multiplied by `gain`."""

    std: float
    gain_rows: int = 0
    gain: float = 1.0


@torch.no_grad()
def initialize(model: nn.Module, seed: int) -> None:
    """Set every tensor of the state dict of `model` to its initial value; `model` may be sharded.

    `model.initial_distribution(name)` is the Constant or Normal of a tensor, by its name in the
    state dict. The model has memory: it is not on the meta device.
    """
    for name, tensor in model.state_dict().items():
        own = local(tensor)
        distribution = model.initial_distribution(name)  # pyright: ignore[reportCallIssue]
        if isinstance(distribution, Constant):
            own.fill_(distribution.value)
        elif own.numel():
            first = first_row(tensor)
            start = first * math.prod(tensor.shape[1:])
            _fill_normal(own, distribution.std, _name_seed(seed, name), start)
            own[: max(0, distribution.gain_rows - first)] *= distribution.gain


@torch.no_grad()
def copy_weights(
    model: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    source: object,
    kept: Collection[str] = (),
) -> None:
    """Copy whole tensors, by name in the state dict, into a model that may be sharded.

    Each process reads only the rows that it holds, so `tensors` are best mapped from a file.
    kept: Names that keep their values.
    Raises InputError, naming `source`, where names or shapes do not fit.
    """
    own_state = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    shapes |= {name: tuple(own_state[name].shape) for name in kept}
    check_shapes(model, shapes, source)
    for name, tensor in own_state.items():
        if name in kept:
            continue
        own, start = local(tensor), first_row(tensor)
        own.copy_(tensors[name][start : start + len(own)] if own.ndim else tensors[name])
        check_finite({name: own}, source)


def _name_seed(seed: int, name: str) -> int:
    """One 64-bit seed for each tensor."""
    digest = hashlib.sha256(name.encode()).digest()
    return int(random_bits(seed, torch.tensor(int.from_bytes(digest[:8], "big", signed=True))))


def _fill_normal(own: torch.Tensor, std: float, seed: int, start: int) -> None:
    """Fill `own`, the elements from `start` on of a tensor in row-major order.

    The inverse error function of a counter-based uniform number, and not `Tensor.normal_`: with it
    every process would have to draw whole tensors and cut out its rows, and CUDA's values differ
    between GPU models. Per element this takes twice as long on a CPU (8 against 4 ns), but a
    process computes only its share.
    """
    assert own.is_contiguous()
    flat = own.view(-1)
    limit = 1 - 2.0**-23  # erfinv stays finite: values within 5.3 standard deviations
    for first in range(0, len(flat), _CHUNK):
        part = flat[first : first + _CHUNK]
        places = torch.arange(start + first, start + first + len(part), device=own.device)
        uniform = random_uniform(seed, places)
        normal = uniform.mul_(2).sub_(1).clamp_(-limit, limit).erfinv_()
        part.copy_(normal.mul_(std * math.sqrt(2)))
