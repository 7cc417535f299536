"""Short training runs: flags of a tiny GPT, what a run wrote, and a network of a few weights."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from core.distributed.world import World
from core.training.checkpoint import Checkpointer
from core.training.config import OptimizerConfig
from core.training.optimizer import Stepper, build_adamw
from tokenizer import VQConfig

CPU = torch.device("cpu")
STEPS = 12
MODEL = ("--model.num_layers", 2, "--model.num_heads", 2, "--model.dim", 32)


def flags(codes: Path, out: Path, *more: object) -> list[object]:
    """Flags of autoregressive.train for a tiny model and 12 steps, reported and saved often."""
    common = (
        "--data.codes",
        f"[{codes}]",
        "--out",
        out,
        "--training.device",
        "cpu",
        "--training.precision",
        "fp32",
    )
    run = ("--training.num_steps", STEPS, "--training.batch_size", 8, "--report.report_every", 1)
    return [*common, *run, "--report.save_every", 2, "--optimizer.lr", 1e-3, *MODEL, *more]


def weights(out: Path, step: int = STEPS, part: str = "model") -> dict[str, torch.Tensor]:
    """The weights in a run's checkpoint; part: "model" or "ema"."""
    return load_file(out / "checkpoints" / f"step_{step:07d}" / f"{part}.safetensors")


def losses(out: Path) -> list[float]:
    """Every training loss that a run reported, in the order of the file."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def network() -> nn.Sequential:
    """A network of three layers, always with the same weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1))


def train(net: nn.Module, stepper: Stepper, steps: range, poison: int = -1) -> None:
    """Train `network` on noise that depends on the step; step `poison` has a loss of nan."""
    for step in steps:
        torch.manual_seed(step)
        loss = net(torch.randn(5, 3)).square().mean()
        (loss * (float("nan") if step == poison else 1)).backward()
        stepper.step(step, 100)


def checkpointer(
    folder: Path, world: World, net: nn.Module, keep_last: int = 2
) -> tuple[Checkpointer, Stepper]:
    """A checkpointer of a network and its AdamW, and the stepper that trains it."""
    config = OptimizerConfig()
    optimizer = build_adamw(net, config)
    parts = {"model": net, "optimizer": optimizer, "ema": None}
    keeper = Checkpointer(folder, VQConfig(), world, keep_last, **parts)
    return keeper, Stepper(optimizer, config, CPU)
