"""One process or many: who am I, on which device, and the few collectives the project needs.

    with distributed() as world:
        ...

The same code runs as `python -m x` (world of one) and under torchrun (NCCL on GPUs, gloo on CPUs).
This is the one place that decides a device or an autocast dtype.
"""

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist

Precision = Literal["fp32", "bf16"]
DeviceName = Literal["auto", "cpu", "cuda", "mps"]


@dataclass(frozen=True)
class World:
    """The processes that work together, and this one's place among them."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes, prints and draws."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            dist.barrier()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add up `tensor` over all ranks, in place; every rank gets the sum."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:  # noqa: ANN401 - any picklable value
        """Every rank's `value`, in the order of the ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:  # noqa: ANN401 - any picklable value
        """Rank 0's `value`, on every rank."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def autocast(self, precision: Precision) -> contextlib.AbstractContextManager[Any]:
        """bf16 autocast on this device, or nothing for fp32."""
        if precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


def dtype_of(precision: Precision) -> torch.dtype:
    """The dtype that a whole model takes at inference."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def choose_device(name: DeviceName = "auto", local_rank: int = 0) -> torch.device:
    """The device for a name; "auto" takes CUDA, else Apple's MPS, else the CPU."""
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        else:
            name = "mps" if torch.backends.mps.is_available() else "cpu"
    return torch.device(name, local_rank) if name == "cuda" else torch.device(name)


@contextlib.contextmanager
def distributed(device: DeviceName = "auto") -> Iterator[World]:
    """The world that torchrun describes in the environment, or a world of one."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if size == 1:
        yield World(rank, size, chosen)
        return
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(minutes=30))
    try:
        yield World(rank, size, chosen)
    finally:
        dist.destroy_process_group()
