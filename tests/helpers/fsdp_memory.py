"""Peak memory of a training step under FSDP2, against the plan: run by test_memory_plan.

Prints a line of JSON: measured and planned, in bytes.
"""

import json
import sys
from pathlib import Path

import torch
from torch import nn

from autoregressive.models.config import GPTConfig
from autoregressive.models.gpt import GPT, Block
from autoregressive.objectives.next_token import NextTokenLoss
from core.distributed.parallel import ParallelConfig, prepare, shard
from core.distributed.world import World, distributed
from core.training.ema import EMA
from core.training.initialization import initialize
from core.training.memory_plan import Plan, plan_model, transformer_activations
from core.training.optimizer import OptimizerConfig, Stepper, build_adamw

TINY = GPTConfig(num_layers=2, num_heads=4, dim=64, vocab_size=512, grid=(8, 8))
LARGE = GPTConfig(num_layers=10, num_heads=8, dim=768, vocab_size=4096, grid=(8, 8))
PARALLEL = ParallelConfig("fsdp")


def train(config: GPTConfig, precision: str, world: World) -> Plan:
    """Two steps with EMA, as the training command does them."""
    objective, average = (objective_of(config) for _ in range(2))
    model = prepare(objective, PARALLEL, world, precision, Block)
    objective.gpt.build_rotary()
    initialize(objective.gpt, 0)
    average.requires_grad_(False)
    shard(average, PARALLEL, world, precision, Block)
    ema = EMA(objective.gpt, 0.9, average.gpt)
    stepper = Stepper(
        build_adamw(objective.gpt, OptimizerConfig()), OptimizerConfig(), world.device
    )
    for step in range(2):
        codes = torch.zeros(1, config.num_codes, dtype=torch.int64)
        with world.autocast(precision):
            loss = model(codes, torch.zeros(1, dtype=torch.int64))
        loss.backward()
        stepper.step(step, 10)
        ema.update(objective.gpt)
    return plan_of(objective, config, precision, objective.gpt)


def plan_of(
    objective: NextTokenLoss, config: GPTConfig, precision: str, ema_model: nn.Module | None
) -> Plan:
    """The plan for one row per process; ema_model: the part that has an EMA."""
    tokens = config.num_codes
    kept = transformer_activations(tokens, config.dim, config.ffn_dim, config.num_layers, "none")
    width = 2 if precision == "bf16" else 4
    return plan_model(objective, Block, ema_model, kept, 1, 1, 1, compute_bytes=width)


def objective_of(config: GPTConfig) -> NextTokenLoss:
    with torch.device("meta"):
        return NextTokenLoss(GPT(config), 256)


def resident(name: str) -> int:
    """VmRSS (now) or VmHWM (the most so far), in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) * 1024


def main() -> None:
    with distributed("cpu") as world:
        train(TINY, sys.argv[1], world)  # what libraries keep for themselves
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
        before = resident("VmRSS")
        plan = train(LARGE, sys.argv[1], world)
        measured = resident("VmHWM") - before
        planned = plan.bytes_per_process("fsdp", world.size, world.size)
        if world.is_main:
            print(json.dumps({"measured": measured, "planned": planned}))


if __name__ == "__main__":
    main()
