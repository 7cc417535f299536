"""Memory that a training run needs, counted before it starts.

`--dry_run true` prints it. Weights, gradients, optimizer moments and EMA weights are counted
exactly, and a run that cannot hold them is refused; activations are estimated, and only warn.
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
    """The sizes that decide how much memory a training run needs."""

    parameters: int
    largest_block: int  # parameters of the largest transformer block (or other repeated layer)
    outside_blocks: int  # parameters outside of all blocks
    ema: bool  # whether an EMA of the weights is kept
    activations: float  # estimated bytes for a micro-batch on one process
    steps_per_epoch: float
    num_steps: int
    scored: bool = False  # whether every process draws samples, to score them

    def bytes_per_process(self, strategy: Strategy, size: int, shared: int) -> float:
        """Bytes on each of `size` processes; under hsdp, `shared` of them hold one copy."""
        per_parameter = STATE_BYTES + 4 * self.ema
        if strategy == "ddp":
            # DDP reduces gradients in place (gradient_as_bucket_view).
            return self.parameters * per_parameter + self.activations
        shards = min(size, shared) if strategy == "hsdp" else size
        # Gathered at the same time: two blocks and all outside the blocks, with their gradients.
        gathered = (2 * self.largest_block + self.outside_blocks) * (4 + 4)
        return self.parameters * per_parameter / shards + gathered + self.activations

    def host_bytes(self, strategy: Strategy, size: int, shared: int, here: int = 1) -> float:
        """Bytes of host memory that the first `here` processes need together.

        On a CPU this comes on top of the device's memory. Building the model needs none, because
        it is built on its device shard by shard. For a checkpoint, the tensors (weights, moments,
        EMA) are copied to the host by the one process that writes them: the first one under ddp.
        The first process gathers all weights of a sharded model to draw samples, and every process
        gathers them to score samples.
        """
        copied = STATE_BYTES - 4 + 4 * self.ema  # no gradients
        if strategy == "ddp":
            return self.parameters * copied
        shards = min(size, shared) if strategy == "hsdp" else size
        gathering = here if self.scored else 1
        return self.parameters * (copied / shards * min(here, shards) + 4 * gathering)


def plan_model(
    model: nn.Module,
    block: type[nn.Module],
    ema: bool,
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
        ema,
        activations,
        samples / batch_size,
        num_steps,
        scored,
    )


def check_fits(plan: Plan, config: ParallelConfig, world: World) -> None:
    """Raise InputError where this device cannot hold the run; the message names what would."""
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


def approve(
    plan: Plan,
    config: Any,  # noqa: ANN401 - any config dataclass
    parallel: ParallelConfig,
    world: World,
    dry_run: bool,
) -> bool:
    """Check that the run fits; print the plan of a dry run. Returns whether to start training.

    Raises InputError where the device cannot hold the run.
    """
    if dry_run:
        print_plan(plan, config, parallel, world)
    check_fits(plan, parallel, world)
    return not dry_run


def print_plan(plan: Plan, config: Any, parallel: ParallelConfig, world: World) -> None:  # noqa: ANN401
    """Print, on rank 0, the resolved configuration and a table of memory per process."""
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
            columns = []
            for size in sizes:
                needed = count(strategy, size, _shared(parallel, world, size))
                columns.append(f"{needed / 2**30:>9.1f}")
            mark = "<- chosen" if strategy == parallel.strategy else ""
            print(f"  {strategy:<19}" + "".join(columns), mark)
    print(
        f"Host memory is for checkpoints and samples, with {node} processes per node; the start "
        "needs none, because the model is built on its device shard by shard."
    )


def transformer_activations(
    tokens: int, dim: int, ffn_dim: int, num_layers: int, checkpointing: str
) -> float:
    """Estimated bytes of activations kept for the backward pass of `tokens` tokens, in 16 bits.

    A block keeps 9 tensors of width dim (two inputs, two norms, q, k, v, the attention output and
    its projection) and 4 of width ffn_dim. `selective` keeps about half of them; `full` keeps only
    the input of each block, and all of the one block that is being recomputed.
    """
    block = 2 * tokens * (9 * dim + 4 * ffn_dim)
    if checkpointing == "full":
        return num_layers * 2 * tokens * dim + block
    if checkpointing == "selective":
        return num_layers * block / 2 + block
    return num_layers * block


def _shared(config: ParallelConfig, world: World, size: int = 0) -> int:
    """Processes that hold one copy of the model under hsdp: shard_size, or those of a node."""
    return math.gcd(config.shard_size or _node_size(), size or world.size)


def _node_size() -> int:
    """Processes per node; 8 where the launcher does not say."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "8"))
