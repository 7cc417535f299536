"""How training scales: measured on a few gloo processes here, forecast for clusters.

    python -m benchmarks.scaling --out runs/benchmarks/scaling.json

The measured part starts 1, 2 and 4 processes on this machine's cores and compares the time of a
step with a model: the arithmetic of one process, plus the bytes of the collectives at the measured
speed of the network. The forecast is a roofline of named cards (core/training/speed_plan.py); it
has not been measured. Writes JSON, a Markdown table and a plot.
"""

from dataclasses import dataclass, field
from pathlib import Path

from autoregressive.models.config import PRESETS, TransformerConfig
from core.config import config_values, parse_config, parse_first, run_command
from core.distributed.cards import CARDS
from core.distributed.config import Strategy


@dataclass(frozen=True)
class ScalingConfig:
    """What to measure and what to forecast.

    Args:
        out: The JSON to write; the Markdown table and the plot go beside it.
        processes: Numbers of processes to start here; empty to measure nothing.
        strategies: How the measured processes share the model.
        model: Shape of the measured transformer.
        grid: Rows and columns of codes of the measured transformer.
        batch_size: Images per process and step, measured.
        num_steps: Timed steps; the median counts.
        sizes: Presets of the forecast.
        gpus: Numbers of GPUs of the forecast.
        card: The card of the forecast.
        gpu_batch_size: Images per GPU and step of the forecast.
    """

    out: Path
    processes: tuple[int, ...] = (1, 2, 4)
    strategies: tuple[Strategy, ...] = ("ddp", "fsdp", "hsdp")
    model: TransformerConfig = field(
        default_factory=lambda: TransformerConfig(num_layers=4, num_heads=8, dim=512)
    )
    grid: tuple[int, int] = (8, 8)
    batch_size: int = 4
    num_steps: int = 9
    sizes: tuple[str, ...] = ("GPT-B", "GPT-XL", "GPT-3B")
    gpus: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512, 1024)
    card: str = "H100"
    gpu_batch_size: int = 32

    def __post_init__(self) -> None:
        counts = (*self.processes, *self.gpus, *self.grid, self.batch_size, self.num_steps)
        if min(*counts, self.gpu_batch_size) < 1:
            raise ValueError("every count must be >= 1")
        if unknown := [size for size in self.sizes if size not in PRESETS]:
            raise ValueError(f"sizes: no preset {unknown[0]}; there are {', '.join(PRESETS)}")
        if self.card not in CARDS:
            raise ValueError(f"card: no {self.card}; there are {', '.join(CARDS)}")


parse_first(ScalingConfig, __name__)

import multiprocessing
import os
import socket
import statistics
import time
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from autoregressive.data.config import DataConfig
from autoregressive.models.config import GPTConfig
from autoregressive.models.gpt import GPT
from autoregressive.training.config import TrainConfig
from autoregressive.training.plan import plan_training
from benchmarks import training
from core.data.plots import save_plot, subplots
from core.distributed.config import ParallelConfig
from core.distributed.world import World, distributed
from core.files import write_json, write_text
from core.training.config import TrainingConfig

Row = dict[str, Any]
CPU = torch.device("cpu")
Answers = multiprocessing.SimpleQueue
NODE = 2  # measured processes that hold one copy of the model under hsdp
NETWORK_BYTES = 2**26  # of the all-reduce that measures the network


def measured_config(config: ScalingConfig) -> GPTConfig:
    """The transformer that is measured."""
    return GPTConfig(**asdict(config.model), grid=config.grid)


def plan_of(gpt: GPTConfig, per_process: int, size: int, precision: Any) -> Any:  # noqa: ANN401
    """The plan of a run of `size` processes, `per_process` images each."""
    run = TrainConfig(
        Path("run"),
        DataConfig((Path("codes"),)),
        training=TrainingConfig(1, per_process * size, precision=precision, ema_decay=None),
        model=gpt,
    )
    return plan_training(run, gpt, per_process * size, World(0, size, CPU))


def network_speed(world: World) -> float:
    """Bytes that a process receives per second in an all-reduce (ring: 2 (n - 1) / n)."""
    tensor, times = torch.zeros(NETWORK_BYTES // 4), []
    for _ in range(4):
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(tensor)
        times.append(time.perf_counter() - started)
    return 2 * NETWORK_BYTES * (world.size - 1) / world.size / min(times)


def measure_process(
    rank: int, size: int, port: int, strategy: Strategy, config: ScalingConfig, answers: Answers
) -> None:
    """One of `size` processes: time steps, and let rank 0 report them."""
    node = NODE if strategy == "hsdp" else size
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": node}
    os.environ.update({name: str(value) for name, value in where.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    torch.set_num_threads(1)
    with distributed("cpu") as world:
        speed = network_speed(world) if size > 1 else 0.0
        settings = training.BenchmarkConfig(
            out=config.out,
            parallel=ParallelConfig(),
            batch_size=config.batch_size,
            grid=config.grid,
            precision="fp32",
        )
        step, _ = training.our_steps(GPT(measured_config(config)), settings, strategy, world)
        times = []
        for i in range(config.num_steps + 2):
            started = time.perf_counter()
            step()
            if i >= 2:  # the first ones allocate
                times.append(time.perf_counter() - started)
        if rank == 0:
            answers.put((statistics.median(times), speed))


def measure(config: ScalingConfig) -> list[Row]:
    """A row per strategy and number of processes: measured seconds beside those of the model."""
    gpt, rows, single = measured_config(config), [], 0.0
    cores = len(os.sched_getaffinity(0))
    for size in config.processes:
        for strategy in config.strategies if size > 1 else ("ddp",):
            if strategy == "hsdp" and size < 2 * NODE:
                continue  # it would be fsdp
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            answers = multiprocessing.get_context("spawn").SimpleQueue()
            spawn(measure_process, (size, port, strategy, config, answers), size)
            seconds, speed = answers.get()
            single = single or seconds
            sent = plan_of(gpt, config.batch_size, size, "fp32").step.collectives(
                strategy, size, NODE
            )
            # More processes than cores take turns.
            computing = single * max(1.0, size / cores)
            communicating = sum(sent.values()) / speed if speed else 0.0
            rows.append(
                {
                    "processes": size,
                    "strategy": strategy,
                    "seconds": seconds,
                    "modelled_seconds": computing + communicating,
                    "communication": max(0.0, 1 - computing / seconds),
                    "modelled_communication": communicating / (computing + communicating),
                    "received_mib": sum(sent.values()) / 2**20,
                    "network_mib_per_second": speed / 2**20,
                }
            )
            print(rows[-1], flush=True)
    return rows


def forecast(config: ScalingConfig) -> list[Row]:
    """A row per preset, strategy and number of GPUs: the least time of a step, and what bounds it.

    The bounds of MFU are for perfect overlap of arithmetic, memory and network, and for none.
    Every GPU keeps its batch (weak scaling), in bf16.
    """
    card, rows = CARDS[config.card], []
    for name in config.sizes:
        with torch.device("meta"):
            gpt = GPT.from_preset(name).config
        for size in config.gpus:
            plan = plan_of(gpt, config.gpu_batch_size, size, "bf16")
            for strategy in ("ddp", "fsdp", "hsdp"):
                least = plan.step.seconds(card, strategy, size, 8)
                bound, seconds = max(least.items(), key=lambda item: item[1])
                ideal = plan.step.flops / size / card.flops
                memory = plan.bytes_per_process(strategy, size, 8)
                rows.append(
                    {
                        "size": name,
                        "strategy": strategy,
                        "gpus": size,
                        "seconds": seconds,
                        "bound": bound,
                        "mfu": ideal / seconds,
                        "mfu_without_overlap": ideal / sum(least.values()),
                        "images_per_second": config.gpu_batch_size * size / seconds,
                        "memory_gib": memory / 2**30,
                        "fits": memory <= card.memory,
                    }
                )
    return rows


def markdown(measured: list[Row], forecasts: list[Row], config: ScalingConfig) -> str:
    """Both tables."""
    lines = []
    if measured:
        lines += [
            "| processes | strategy | s per step | modelled | communication | modelled |",
            "|--:|---|--:|--:|--:|--:|",
        ]
    for row in measured:
        lines.append(
            f"| {row['processes']} | {row['strategy']} | {row['seconds']:.3f} "
            f"| {row['modelled_seconds']:.3f} | {row['communication']:.0%} "
            f"| {row['modelled_communication']:.0%} |"
        )
    lines += [
        "",
        f"Bounds of MFU (roofline, {config.card}, {config.gpu_batch_size} images per GPU, bf16): "
        "without any overlap of arithmetic, memory and network, to all of it; in brackets where "
        "the memory does not fit:",
        "",
        "| model | strategy | " + " | ".join(f"{size} GPUs" for size in config.gpus) + " |",
        "|---|---|" + "--:|" * len(config.gpus),
    ]
    numbers: dict[tuple[str, str], list[str]] = {}
    for row in forecasts:
        text = f"{row['mfu_without_overlap']:.2f} to {row['mfu']:.2f}"
        text = text if row["fits"] else f"({text})"
        numbers.setdefault((row["size"], row["strategy"]), []).append(text)
    lines += [f"| {name} | {how} | {' | '.join(row)} |" for (name, how), row in numbers.items()]
    return "\n".join(lines) + "\n"


def draw(forecasts: list[Row], config: ScalingConfig, path: Path) -> None:
    """The bounds of MFU against the number of GPUs, a panel per model."""
    figure, axes = subplots(
        1, len(config.sizes), figsize=(4 * len(config.sizes), 3.2), sharey=True, squeeze=False
    )
    for axis, name in zip(axes.flat, config.sizes, strict=True):
        for strategy, style in (("ddp", "-"), ("fsdp", "--"), ("hsdp", ":")):
            rows = [r for r in forecasts if (r["size"], r["strategy"]) == (name, strategy)]
            lowest = [r["mfu_without_overlap"] for r in rows]
            (line,) = axis.plot(config.gpus, lowest, style, label=strategy)
            highest = [r["mfu"] for r in rows]
            axis.fill_between(config.gpus, lowest, highest, color=line.get_color(), alpha=0.08)
        axis.set(title=f"{name}, {config.card}", xlabel="GPUs", xscale="log", ylim=(0, 1.05))
        axis.grid(alpha=0.3)
    axes.flat[0].set_ylabel("MFU (roofline), no overlap to all")
    axes.flat[0].legend()
    save_plot(figure, path, dpi=80)


def main() -> None:
    """Entry point."""
    config = parse_config(ScalingConfig)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    measured, forecasts = measure(config), forecast(config)
    facts = {"cores": len(os.sched_getaffinity(0)), "torch": torch.__version__}
    results = {**facts, "settings": config_values(config)}
    write_json(config.out, {**results, "measured": measured, "forecast": forecasts})
    table, plot = config.out.with_suffix(".md"), config.out.with_suffix(".png")
    write_text(table, markdown(measured, forecasts, config))
    draw(forecasts, config, plot)
    print(markdown(measured, forecasts, config))
    print(config.out, table, plot, sep=os.linesep)


if __name__ == "__main__":
    run_command(main)
