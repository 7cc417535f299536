"""Dead-code revival on several ranks equals that of one process with all vectors."""

import threading
from types import SimpleNamespace

import torch

from tokenizer.quantizers import dead_codes
from tokenizer.quantizers.dead_codes import revive_dead_codes


def ranks_as_threads(world_size: int) -> SimpleNamespace:
    """What dead_codes uses of torch.distributed, between threads named by their rank."""
    barrier, shared = threading.Barrier(world_size, timeout=20), {}
    reductions = {"sum": lambda x: x.sum(0), "min": lambda x: x.amin(0)}

    def rank() -> int:
        return int(threading.current_thread().name)

    def all_reduce(tensor, kind="sum"):
        shared[rank()] = tensor.clone()
        barrier.wait()
        tensor.copy_(reductions[kind](torch.stack([shared[i] for i in range(world_size)])))
        barrier.wait()

    return SimpleNamespace(
        is_initialized=lambda: True,
        all_reduce=all_reduce,
        ReduceOp=SimpleNamespace(MIN="min"),
        get_rank=rank,
        get_world_size=lambda: world_size,
    )


def test_two_ranks_give_the_entries_of_one_process(monkeypatch):
    torch.manual_seed(0)
    entries, vectors = torch.randn(24, 4), torch.randn(30, 4)
    vectors[20] = vectors[3]  # a tie between ranks
    codes, frequency = torch.randint(0, 8, (30,)), torch.zeros(24)
    one = revive_dead_codes(entries, frequency, codes, vectors, normalize=True)
    monkeypatch.setattr(dead_codes, "dist", ranks_as_threads(2))
    found = {}

    def run(rank: int) -> None:
        part = slice(15 * rank, 15 * rank + 15)
        found[rank] = revive_dead_codes(entries, frequency, codes[part], vectors[part], True)

    threads = [threading.Thread(target=run, args=(i,), name=str(i)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in range(2):
        torch.testing.assert_close(found[rank].entries, one.entries)
        torch.testing.assert_close(found[rank].frequency, one.frequency)
    assert not torch.allclose(one.entries, entries)
