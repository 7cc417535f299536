"""One process or many: rank, device, and the few collectives that the project needs.

    with distributed() as world:
        ...

The same code runs as `python -m x` (world of one) and under torchrun (NCCL on GPUs, gloo on CPUs).
Only this module decides on devices and autocast dtypes.
"""

import contextlib
import datetime
import gc
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from core.config import InputError, fail, is_mistake
from core.errors import memory_problem

Precision = Literal["fp32", "bf16"]
DeviceName = Literal["auto", "cpu", "cuda", "mps"]
TORCH_VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])


@dataclass(frozen=True)
class World:
    """The processes that work together.

    rank: number of this process. size: number of processes. device: of this process.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on rank 0, which writes, prints and draws."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank has called it."""
        if self.size > 1:
            dist.barrier()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over all ranks, in place; every rank gets the sum."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:  # noqa: ANN401
        """Collect the `value` (picklable) of every rank, in the order of the ranks.

        A background thread needs its own `group`, made by new_group().
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group)
        return values

    def new_group(self) -> dist.ProcessGroup | None:
        """A second process group of all ranks, over the CPU (gloo); None in a world of one."""
        if self.size == 1:
            return None
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        return group

    def broadcast(self, value: Any) -> Any:  # noqa: ANN401 - any picklable value
        """Return the `value` of rank 0 on every rank."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def mesh(self, shard_size: int | None) -> DeviceMesh:
        """A mesh of groups of `shard_size` processes (None: a node); 1-D for one group."""
        shared = shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", str(self.size)))
        if self.size % shared:
            raise InputError(
                f"parallel.shard_size {shared} must divide the number of processes, {self.size}"
            )
        if not dist.is_initialized():  # in one process, FSDP2 (mixed precision) needs a group too
            dist.init_process_group(_backend(self.device), rank=0, world_size=1, store=HashStore())
        if shared == self.size:
            return init_device_mesh(self.device.type, (shared,), mesh_dim_names=("shard",))
        shape, names = (self.size // shared, shared), ("replicate", "shard")
        return init_device_mesh(self.device.type, shape, mesh_dim_names=names)

    def autocast(self, precision: Precision) -> contextlib.AbstractContextManager[Any]:
        """Autocast to bf16 on this device; for fp32 a context that does nothing."""
        if precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


def dtype_of(precision: Precision) -> torch.dtype:
    """The dtype of a model at inference."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def choose_device(name: DeviceName = "auto", local_rank: int = 0) -> torch.device:
    """The device for a name; "auto" takes CUDA, else Apple's MPS, else the CPU.

    Raises InputError for a device that this machine does not have.
    """
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present.get(name, True):
        raise InputError(f"device {name}: torch finds none here; use auto or cpu")
    if name == "cuda" and local_rank >= torch.cuda.device_count():
        raise InputError(
            f"device cuda: process {local_rank} of this node has no GPU of its own, torch finds "
            f"{torch.cuda.device_count()}"
        )
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        else:
            name = "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.device(name, local_rank) if name == "cuda" else torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device {name}: torch knows no such device") from error


@contextlib.contextmanager
def distributed(device: DeviceName = "auto", timeout_minutes: float = 30.0) -> Iterator[World]:
    """The world that torchrun or the Slurm script describes; a world of one without them.

    A collective that takes longer than timeout_minutes ends this process with a message.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    try:
        if size > 1:
            _join(chosen, datetime.timedelta(minutes=timeout_minutes))
        yield World(rank, size, chosen)
    except (InputError, OSError) as error:
        if size == 1 or not is_mistake(error):
            raise
        # At once, because the other ranks would take the end of the group for a crash.
        fail(str(error), code=2)
    except (RuntimeError, MemoryError) as error:
        if too_large := memory_problem(error):
            if size == 1:
                raise InputError(too_large) from error
            fail(too_large, code=2)
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        print(
            f"rank {rank} of {size}: a collective failed: another rank died, or hung for longer "
            f"than {timeout_minutes:g} minutes ({reason}); run the same command again to continue",
            file=sys.stderr,
        )
        sys.stderr.flush()
        os._exit(1)  # the group is broken: destroying it in order would wait for the other ranks
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
            # FSDP's modules refer to their groups in cycles. If they were freed at the end of the
            # interpreter, the threads of these groups would abort the process.
            gc.collect()


def _join(device: torch.device, timeout: datetime.timedelta) -> None:
    """Create the process group."""
    # NCCL's flight recorder: if a collective hangs, every rank writes what it waited for to
    # /tmp/nccl_trace_rank_*. Older releases know only the first name, newer ones warn about it.
    name = "TORCH_NCCL_TRACE_BUFFER_SIZE" if TORCH_VERSION < (2, 12) else "TORCH_FR_BUFFER_SIZE"
    os.environ.setdefault(name, "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun keeps one store over all restarts. Without a prefix per restart, the addresses of
        # dead processes would be read from it.
        store = PrefixStore(f"restart_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group(
        _backend(device), store=store, rank=rank, world_size=size, timeout=timeout
    )


def _backend(device: torch.device) -> str:
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
