"""The least time of a training step, and what its collectives send."""

import pytest
import torch
from helpers.clusters import one_of_many
from torch.utils._python_dispatch import TorchDispatchMode

from autoregressive.models.config import GPTConfig
from autoregressive.models.gpt import GPT, Block
from autoregressive.objectives.next_token import NextTokenLoss
from core.distributed.cards import CARDS
from core.distributed.config import ParallelConfig
from core.distributed.parallel import local, no_sync, prepare
from core.training.initialization import initialize
from core.training.speed_plan import StepPlan

SMALL = GPTConfig(num_layers=3, num_heads=4, dim=64, vocab_size=64, num_classes=63, grid=(4, 4))


class Received(TorchDispatchMode):
    """Adds up what the collectives of a step would receive, by ring algorithms."""

    def __init__(self, copies: int) -> None:
        super().__init__()
        self.copies = copies  # of the model: the processes of an all-reduce
        self.bytes = {"all-gather": 0.0, "reduce-scatter": 0.0, "all-reduce": 0.0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if name in ("c10d::_allgather_base_", "c10d::_reduce_scatter_base_"):
            output, given = args[:2]
            kind = "all-gather" if "allgather" in name else "reduce-scatter"
            self.bytes[kind] += abs(local(output).nbytes - local(given).nbytes)
        elif name == "c10d::allreduce_":
            share = (self.copies - 1) / self.copies
            self.bytes["all-reduce"] += sum(2 * t.nbytes * share for t in args[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize(("strategy", "size", "shared"), [("fsdp", 4, 4), ("hsdp", 8, 4)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_sends_what_the_plan_says(strategy, size, shared, precision, micro_batches):
    codes, labels = torch.zeros(2, 16, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    parallel = ParallelConfig(strategy, shared if strategy == "hsdp" else None)
    with one_of_many(0, size) as world:
        with torch.device("meta"):
            objective = NextTokenLoss(GPT(SMALL), 64)
        model = prepare(objective, parallel, world, precision, Block)
        objective.gpt.build_rotary()
        initialize(objective.gpt, 0)
        with Received(size // shared) as received:
            for last in [False] * (micro_batches - 1) + [True]:
                if last:
                    model(codes, labels).backward()
                else:
                    with no_sync(model):
                        model(codes, labels).backward()
    blocks = sum(p.numel() for block in objective.gpt.blocks for p in block.parameters())
    total = sum(p.numel() for p in objective.gpt.parameters())
    width = 2 if precision == "bf16" else 4
    plan = StepPlan(total, total - blocks, 0.0, 0.0, width, micro_batches)
    expected = plan.collectives(strategy, size, shared)
    assert {k: v for k, v in received.bytes.items() if v} == pytest.approx(expected, rel=0.01)


def test_one_process_sends_nothing_and_ddp_only_gradients():
    plan = StepPlan(1000, 100, 1e15, 1e9, 2)
    assert plan.collectives("fsdp", 1, 1) == {}
    assert plan.collectives("ddp", 4, 4) == {"all-reduce": 2 * 4000 * 3 / 4}


def test_a_step_takes_as_long_as_its_slowest_part_and_recomputation_lowers_the_mfu():
    card = CARDS["H100"]
    fast = StepPlan(1000, 100, 64 * card.flops, 0.0, 2)
    assert fast.seconds(card, "fsdp", 64, 64)["arithmetic"] == pytest.approx(1.0)
    assert " 1.00 " in fast.table("fsdp", 64, 64, 3600)[3]
    assert "64" in fast.table("fsdp", 64, 64, 3600)[3].split()[-1]
    full = StepPlan(1000, 100, 64 * card.flops, 0.0, 2, checkpointing="full")
    assert " 0.75 " in full.table("fsdp", 64, 64, 3600)[3]
    # 3e9 parameters at little work per process: the network decides.
    assert "network" in StepPlan(3 * 10**9, 10**8, 1e15, 0.0, 2).table("fsdp", 256, 256, 1)[3]
    # A node's eight ports share what its processes gather, and not what each reduces for itself.
    plan, network = StepPlan(8000, 0, 1e15, 0.0, 2), CARDS["H100"].network
    fsdp, hsdp = (plan.seconds(CARDS["H100"], s, 16, 8)["network"] for s in ("fsdp", "hsdp"))
    assert fsdp == pytest.approx(15 / 16 * (2 * 8000 * 2 + 8000 * 4) / (8 * network))
    assert hsdp == pytest.approx(2 * 4000 / 2 / network)
