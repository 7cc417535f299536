"""One rank of a cluster whose other ranks do not exist."""

import contextlib
from collections.abc import Iterator

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
