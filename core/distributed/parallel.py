"""Parallel training, applied to a model from outside, in this order:

1. Activation checkpointing wraps the blocks. It comes first because it decides what is recomputed.
2. Each block is compiled, including its recomputation. Equal blocks share one graph, and the
   collectives between blocks stay outside of it.
3. Weights are distributed over the processes: DDP replicates them, FSDP2 shards them block by
   block, HSDP shards them within groups of processes and replicates them between groups (a 2-D
   mesh).
"""

import contextlib
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from core.distributed.config import ParallelConfig, Precision
from core.distributed.world import World


def prepare(
    model: nn.Module,
    config: ParallelConfig,
    world: World,
    precision: Precision,
    block: type[nn.Module],
) -> nn.Module:
    """Prepare `model` for training -> the module to call in the training loop.

    block: the class of its repeated layer. A model on the meta device gets memory but no values;
    initialize it afterwards. Build the optimizer afterwards too, because under FSDP2 the parameters
    become DTensors. The keys of state dicts do not change.
    """
    _checkpoint_activations(model, config, block)
    if config.compiles(world.device.type):
        compile_blocks([module for module in model.modules() if isinstance(module, block)])
    model = shard(model, config, world, precision, block)
    if config.strategy == "ddp" and world.size > 1:
        # The new name of the argument exists since torch 2.14; older releases must work too.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
        ids = [world.device.index] if world.device.type == "cuda" else None
        return DistributedDataParallel(
            model,
            device_ids=ids,
            gradient_as_bucket_view=True,
            broadcast_buffers=False,  # the buffers that training reads are computed from all ranks
        )
    return model


def shard(
    model: nn.Module,
    config: ParallelConfig,
    world: World,
    precision: Precision,
    block: type[nn.Module],
) -> nn.Module:
    """Shard `model` as the strategy says and move it to world.device; also used for EMA weights.

    A model on the meta device is sharded before it gets memory (but no values), so that no process
    allocates more than its shard. Master weights, reduced gradients and optimizer moments are
    float32; with precision bf16, gathered weights and computation are bfloat16.
    """
    if config.strategy != "ddp":
        _shard_blocks(model, config, world, precision, block)
    if any(parameter.is_meta for parameter in model.parameters()):
        return model.to_empty(device=world.device)
    return model.to(world.device) if config.strategy == "ddp" else model


def compile_blocks(blocks: list[nn.Module]) -> None:
    """Compile each block in place; equal blocks share the compiled code."""
    for block in blocks:
        block.compile()
    # Blocks that differ in a constant (stochastic depth) are compiled separately.
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, len(blocks) + 8)


@contextlib.contextmanager
def no_sync(model: nn.Module) -> Iterator[None]:
    """Accumulate gradients without communication, for all micro-batches but the last."""
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)
    else:
        yield


def full_state(model: nn.Module, world: World, everywhere: bool = False) -> dict[str, torch.Tensor]:
    """The unsharded state dict, on the CPU of rank 0 or of every rank; all ranks must call it.

    Ranks that do not get it receive an empty dict.
    """
    state = {}
    for key, value in model.state_dict().items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if world.is_main or everywhere:
            state[key] = whole.cpu()
    return state


def written_here(tensor: torch.Tensor, world: World) -> bool:
    """Whether this process writes its part of `tensor` to a checkpoint.

    Rank 0 writes unsharded tensors. The first process that holds a shard writes that shard.
    """
    if not isinstance(tensor, DTensor):
        return world.is_main
    place, placements = tensor.device_mesh.get_coordinate(), tensor.placements
    assert place is not None
    return all(i == 0 for i, p in zip(place, placements, strict=True) if p.is_replicate())


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a DTensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def first_row(tensor: torch.Tensor) -> int:
    """The row of the whole tensor at which this process's part of a DTensor begins; else 0."""
    if not isinstance(tensor, DTensor):
        return 0
    shape, mesh, placements = tensor.shape, tensor.device_mesh, tensor.placements
    _, offsets = compute_local_shape_and_global_offset(shape, mesh, placements)
    assert not any(offsets[1:]), "FSDP2 shards by rows"
    return offsets[0] if offsets else 0


def _shard_blocks(
    model: nn.Module,
    config: ParallelConfig,
    world: World,
    precision: Precision,
    block: type[nn.Module],
) -> None:
    shared = config.shard_size if config.strategy == "hsdp" else world.size
    mesh = world.mesh(shared)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    # One unit per block: its weights are gathered while the previous block computes. What is
    # left (embeddings, the last norm, the head) forms the root's unit.
    for module in list(model.modules()):
        if isinstance(module, block):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    # The root's weights stay gathered until its backward pass; EMA weights have none.
    frozen = not any(parameter.requires_grad for parameter in model.parameters())
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True if frozen else None)


def _checkpoint_activations(
    model: nn.Module, config: ParallelConfig, block: type[nn.Module]
) -> None:
    if config.activation_checkpointing == "none":
        return
    options = {}
    if config.activation_checkpointing == "selective":
        options["context_fn"] = _selective_contexts
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=partial(checkpoint_wrapper, **options),
        check_fn=lambda module: isinstance(module, block),
    )


def _selective_contexts() -> Any:  # noqa: ANN401 - a pair of context managers
    """Keep attention and every second matrix product, which are costly; recompute the rest."""
    products = {"forward": 0, "recompute": 0}

    def policy(context: Any, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:  # noqa: ANN401
        name = operation.name() if hasattr(operation, "name") else str(operation)
        if "scaled_dot_product" in name:
            return CheckpointPolicy.MUST_SAVE
        if name in ("aten::mm", "aten::addmm"):
            phase = "recompute" if context.is_recompute else "forward"
            products[phase] += 1
            if products[phase] % 2:
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
