"""One rank of a cluster whose other ranks do not exist, and a few real processes on gloo."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore

from core.distributed.world import World


@contextlib.contextmanager
def one_of_many(rank: int, size: int) -> Iterator[World]:
    """One rank of a world whose other ranks do not exist: collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield World(rank, size, torch.device("cpu"))
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()  # it holds the mesh of this rank


def run_in_processes(
    function: Callable[..., None], size: int, folder: Path, *arguments: object
) -> None:
    """Call function(rank, *arguments) in `size` new processes that share a gloo group."""
    rendezvous = f"file://{folder / 'rendezvous'}"
    torch.multiprocessing.spawn(_run_rank, (function, size, rendezvous, arguments), nprocs=size)


def _run_rank(
    rank: int,
    function: Callable[..., None],
    size: int,
    rendezvous: str,
    arguments: tuple[object, ...],
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=size)
    function(rank, *arguments)
    dist.barrier()
    dist.destroy_process_group()
    # DTensor's caches keep the mesh, and with it gloo's threads, until the interpreter ends. Such a
    # thread can abort a process that has done all its work, so it ends without that.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
