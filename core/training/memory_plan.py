"""What a training will need, before it starts: `--dry_run true`, and a refusal of what cannot fit.

Weights, gradients, moments and averaged weights are counted exactly, and refused where they do not
fit; activations are an estimate, which only warns.
"""

import logging
import math
import os
from dataclasses import dataclass
from typing import Any, get_args

from torch import nn

from core.config import InputError, config_text
from core.distributed.hardware import memory_bytes
from core.distributed.parallel import ParallelConfig, Strategy
from core.distributed.world import World

logger = logging.getLogger(__name__)

STATE_BYTES = 4 + 4 + 8  # per parameter, in float32: the weight, its gradient, Adam's two moments


@dataclass(frozen=True)
class Plan:
    """A model and its training, in numbers."""

    parameters: int
    largest_block: int  # the parameters of its largest repeated layer
    outside_blocks: int  # and of all that is in no repeated layer
    averaged: bool  # whether averaged weights are kept
    activations: float  # estimated bytes of a micro-batch on one process
    steps_per_epoch: float
    num_steps: int
    scored: bool = False  # whether every process samples, to score the samples

    def bytes_per_process(self, strategy: Strategy, size: int, shared: int) -> float:
        """Memory on each of `size` processes, `shared` of them to a copy of the model."""
        per_parameter = STATE_BYTES + 4 * self.averaged
        if strategy == "ddp":
            # DDP reduces gradients in place (gradient_as_bucket_view).
            return self.parameters * per_parameter + self.activations
        shards = min(size, shared) if strategy == "hsdp" else size
        # Two blocks at a time are gathered, with their gradients, and what is outside the blocks.
        gathered = (2 * self.largest_block + self.outside_blocks) * (4 + 4)
        return self.parameters * per_parameter / shards + gathered + self.activations

    def host_bytes(self, strategy: Strategy, size: int, shared: int, here: int = 1) -> float:
        """Host memory for the first `here` processes; on a CPU it comes on top of the device's.

        The model is built on its device, shard by shard, so the start needs none. Each process
        copies its weights, moments and averages for a checkpoint. The first process gathers all
        weights of a sharded model to draw samples, and every process does so to score them.
        """
        copied = STATE_BYTES - 4 + 4 * self.averaged  # no gradients
        if strategy == "ddp":
            return self.parameters * copied * here
        shards = min(size, shared) if strategy == "hsdp" else size
        gathering = here if self.scored else 1
        return self.parameters * (copied / shards * here + 4 * gathering)


def plan_model(
    model: nn.Module,
    block: type[nn.Module],
    averaged: bool,
    activations: float,
    samples: int,
    batch_size: int,
    num_steps: int,
    scored: bool = False,
) -> Plan:
    """The plan for a model, which may be on the meta device."""
    sizes = [
        sum(p.numel() for p in module.parameters())
        for module in model.modules()
        if isinstance(module, block)
    ]
    parameters = sum(p.numel() for p in model.parameters())
    return Plan(
        parameters,
        max(sizes, default=0),
        parameters - sum(sizes),
        averaged,
        activations,
        samples / batch_size,
        num_steps,
        scored,
    )


def check_fits(plan: Plan, config: ParallelConfig, world: World) -> None:
    """Raise InputError where this device cannot hold the training, with what would."""
    available = memory_bytes(world.device)
    likely = plan.bytes_per_process(config.strategy, world.size, _shared(config, world))
    needed = likely - plan.activations
    if needed <= available:
        if likely > available and world.is_main:
            logger.warning(
                "with its activations this may need %.1f GiB per process, the device has %.1f: "
                "if it runs out, raise gradient_accumulation or use activation_checkpointing",
                likely / 2**30,
                available / 2**30,
            )
        return
    fewest = next(
        (n for n in (2**i for i in range(14)) if plan.bytes_per_process("fsdp", n, n) <= available),
        None,
    )
    advice = (
        f"parallel.strategy fsdp fits on {fewest} such processes, activations counted"
        if fewest
        else "no number of such processes holds it"
    )
    raise InputError(
        f"{plan.parameters:,} parameters need about {needed / 2**30:.1f} GiB per process under "
        f"{config.strategy} on {world.size}, this device has {available / 2**30:.1f}: {advice}"
    )


def print_plan(plan: Plan, config: Any, parallel: ParallelConfig, world: World) -> None:  # noqa: ANN401
    """The resolved configuration, then a table of memory per process; on rank 0 alone."""
    if not world.is_main:
        return
    print(config_text(config))
    print(f"parameters            {plan.parameters:,}")
    print(f"steps per epoch       {plan.steps_per_epoch:,.1f}")
    print(f"epochs                {plan.num_steps / max(plan.steps_per_epoch, 1e-9):,.2f}")
    print(f"memory of the device  {memory_bytes(world.device) / 2**30:,.1f} GiB")
    print(f"activations (estimate) {plan.activations / 2**30:,.2f} GiB, included below")
    sizes = sorted({1, 8, 32, 128, world.size})
    node = _node_size()
    for title, count in (
        ("GiB per process on", plan.bytes_per_process),
        ("host GiB, process 0", plan.host_bytes),
        ("host GiB per node", lambda *of: plan.host_bytes(*of, here=min(of[1], node))),
    ):
        print(f"{title:<21}" + "".join(f"{size:>9}" for size in sizes))
        for strategy in get_args(Strategy):
            cells = []
            for size in sizes:
                needed = count(strategy, size, _shared(parallel, world, size))
                cells.append(f"{needed / 2**30:>9.1f}")
            mark = "<- chosen" if strategy == parallel.strategy else ""
            print(f"  {strategy:<19}" + "".join(cells), mark)
    print(
        f"Host memory is for checkpoints and samples, with {node} processes per node; the start "
        "needs none, because the model is built on its device shard by shard."
    )


def transformer_activations(
    tokens: int, dim: int, ffn_dim: int, num_layers: int, checkpointing: str
) -> float:
    """Estimated bytes that the backward pass of `tokens` tokens keeps, in 16-bit floats.

    A block keeps its two inputs, two norms, q, k, v, the attention's output and its projection
    (9 dim) and three hidden layers of the FFN (counting the product): what `selective` keeps is
    about half of it, `full` keeps the input alone and one block in full.
    """
    block = 2 * tokens * (9 * dim + 4 * ffn_dim)
    if checkpointing == "full":
        return num_layers * 2 * tokens * dim + block
    if checkpointing == "selective":
        return num_layers * block / 2 + block
    return num_layers * block


def _shared(config: ParallelConfig, world: World, size: int = 0) -> int:
    """Processes to one copy of the model under hsdp: as asked, or those of a node (else 8)."""
    return math.gcd(config.shard_size or _node_size(), size or world.size)


def _node_size() -> int:
    """Processes of a node, 8 where the launcher does not say."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "8"))
