"""Memory that a training run needs, counted before it starts.

`--dry_run true` prints it, with the least time of a step on named cards (speed_plan.py). Weights,
gradients, optimizer moments and EMA weights are counted exactly, and a run that cannot hold them
is refused; activations are estimated, and only warn.
"""

import logging
import math
import os
from dataclasses import dataclass
from typing import Any, get_args

from torch import nn

from core.config import InputError, config_text
from core.distributed.config import ParallelConfig, Strategy
from core.distributed.hardware import memory_bytes
from core.distributed.world import World
from core.training.speed_plan import StepPlan

logger = logging.getLogger(__name__)

CLUSTERS = (8, 64, 256)  # processes for which the time of a step is shown, besides this run's


@dataclass(frozen=True)
class Plan:
    """The sizes that decide how much memory a training run needs."""

    parameters: int  # that are trained
    frozen: int  # parameters that only compute, such as those of a reference model
    ema_parameters: int  # parameters of which an EMA is kept
    largest_block: int  # parameters of the largest transformer block (or other repeated layer)
    outside_blocks: int  # parameters outside of all blocks
    activations: float  # estimated bytes for a micro-batch on one process
    steps_per_epoch: float
    num_steps: int
    scored: bool = False  # whether every process draws samples, to score them
    accumulates: bool = False  # whether a step has several micro-batches
    compute_bytes: int = 4  # of a weight during computation: 2 for bf16, 4 for fp32
    step: StepPlan | None = None  # what decides the time of a step; None if it is not planned
    processes: int | None = None  # that share the batch in `activations`; None: however many
    one_moment: int = 0  # parameters of which the optimizer keeps one moment instead of two (Muon)
    ema_shared: int = 0  # of ema_parameters, those that are the model's own unless it is sharded
    sampled: int | None = None  # parameters of the model that draws samples; None: `parameters`

    @property
    def moments(self) -> int:
        """Bytes of the optimizer's moments on all processes together, in float32."""
        return 4 * (2 * self.parameters - self.one_moment)

    def parts(self, strategy: Strategy, size: int, shared: int) -> dict[str, float]:
        """Bytes on each of `size` processes by part; under hsdp, `shared` of them hold one copy."""
        shards = 1 if strategy == "ddp" else min(size, shared) if strategy == "hsdp" else size
        own = self.parameters / shards
        name = "moments of Muon and Adam" if self.one_moment else "Adam's moments"
        parts = {"weights": 4 * own, "gradients": 4 * own, name: self.moments / shards}
        if self.ema_parameters:
            kept = self.ema_parameters - (self.ema_shared if strategy == "ddp" else 0)
            parts["EMA weights"] = 4 * kept / shards
        if self.frozen:
            parts["frozen weights"] = 4 * self.frozen / shards
        # DDP reduces gradients in place (gradient_as_bucket_view).
        if strategy != "ddp":
            # At the same time: two blocks and everything outside the blocks, with their gradients.
            gathered = self.largest_block * 2 + self.outside_blocks
            parts["gathered weights and gradients"] = gathered * 2 * self.compute_bytes
            if self.accumulates:  # whole gradients, until the last micro-batch reduces them
                parts["accumulated gradients"] = 4 * self.parameters
        # The same batch on more processes is fewer samples on each.
        share = self.processes / size if self.processes else 1.0
        return {**parts, "activations": self.activations * share}

    def bytes_per_process(self, strategy: Strategy, size: int, shared: int) -> float:
        """Bytes on each of `size` processes; under hsdp, `shared` of them hold one copy."""
        return sum(self.parts(strategy, size, shared).values())

    def host_bytes(self, strategy: Strategy, size: int, shared: int, here: int = 1) -> float:
        """Bytes of host memory that the first `here` processes need together.

        On a CPU this comes on top of the device's memory. Building the model needs none, because
        it is built on its device shard by shard. For a checkpoint, the tensors (weights, moments,
        EMA) are copied to the host by the one process that writes them: the first one under ddp.
        The first process gathers all weights of a sharded model to draw samples, and every process
        gathers them to score samples.
        """
        # No gradients, and nothing that is frozen.
        copied = 4 * self.parameters + self.moments + 4 * (self.ema_parameters - self.ema_shared)
        if strategy == "ddp":
            return copied
        shards = min(size, shared) if strategy == "hsdp" else size
        gathering = here if self.scored else 1
        sampled = self.parameters if self.sampled is None else self.sampled
        return copied / shards * min(here, shards) + 4 * sampled * gathering


def plan_model(
    model: nn.Module,
    block: type[nn.Module],
    ema_model: nn.Module | None,
    activations: float,
    samples: int,
    batch_size: int,
    num_steps: int,
    scored: bool = False,
    accumulates: bool = False,
    compute_bytes: int = 4,
    step: StepPlan | None = None,
    processes: int | None = None,
    one_moment: int = 0,
    ema_shared: int = 0,
    sampled: int | None = None,
) -> Plan:
    """Plan the memory of a model, which may be on the meta device.

    model: Everything on the device, frozen parts too. ema_model: the part that has an EMA, if any.
    """
    sizes = [count_parameters(part) for part in model.modules() if isinstance(part, block)]
    everything = count_parameters(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Plan(
        trained,
        everything - trained,
        count_parameters(ema_model) if ema_model else 0,
        max(sizes, default=0),
        everything - sum(sizes),
        activations,
        samples / batch_size,
        num_steps,
        scored,
        accumulates,
        compute_bytes,
        step,
        processes,
        one_moment,
        ema_shared,
        sampled,
    )


def count_parameters(module: nn.Module) -> int:
    """Number of parameters of a module."""
    return sum(p.numel() for p in module.parameters())


def check_fits(plan: Plan, config: ParallelConfig, world: World) -> None:
    """Raise InputError if this device cannot hold the run; the message names what would fit."""
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

    Raises InputError if the device cannot hold the run.
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
    frozen = f", and {plan.frozen:,} frozen" if plan.frozen else ""
    print(f"parameters            {plan.parameters:,}{frozen}")
    print(f"steps per epoch       {plan.steps_per_epoch:,.1f}")
    print(f"epochs                {plan.num_steps / max(plan.steps_per_epoch, 1e-9):,.2f}")
    print(f"memory of the device  {memory_bytes(world.device) / 2**30:,.1f} GiB")
    sizes, node = sorted({1, *CLUSTERS, world.size}), _node_size()
    columns = {n: plan.parts(parallel.strategy, n, _shared(parallel, world, n)) for n in sizes}
    title = f"GiB per process, {parallel.strategy} on"
    print(f"{title:<34}" + "".join(f"{size:>9}" for size in sizes))
    for part in dict.fromkeys(name for parts in columns.values() for name in parts):
        note = " (estimate)" if part == "activations" else ""
        counts = (parts.get(part, 0) / 2**30 for parts in columns.values())
        print(f"  {part:<32}" + "".join(f"{count:>9.2f}" for count in counts) + note)
    for title, count in (
        ("GiB per process on", plan.bytes_per_process),
        ("host GiB, process 0", plan.host_bytes),
        ("host GiB per node", lambda *of: plan.host_bytes(*of, here=min(of[1], node))),
    ):
        print(f"{title:<34}" + "".join(f"{size:>9}" for size in sizes))
        for strategy in get_args(Strategy):
            needed = (count(strategy, size, _shared(parallel, world, size)) for size in sizes)
            mark = "<- chosen" if strategy == parallel.strategy else ""
            print(f"  {strategy:<32}" + "".join(f"{n / 2**30:>9.1f}" for n in needed), mark)
    print(
        f"Host memory is for checkpoints and samples, with {node} processes per node; the start "
        "needs none, because the model is built on its device shard by shard."
    )
    for size in sorted({*CLUSTERS, world.size}) if plan.step else ():
        assert plan.step is not None
        shared = _shared(parallel, world, size)
        print("\n".join(plan.step.table(parallel.strategy, size, shared, plan.num_steps)))


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
    """Number of processes that hold one copy of the model under hsdp: shard_size, or a node."""
    return math.gcd(config.shard_size or _node_size(), size or world.size)


def _node_size() -> int:
    """Number of processes per node; 8 if the launcher does not say."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "8"))
