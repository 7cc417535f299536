"""Everything that a card can tell in ten minutes: tests, sampling, tokenizer, training, memory.

    python -m benchmarks.gpu_report --out runs/benchmarks/gpu_report.json

Each row is written to the JSON as soon as it is measured, so that an interrupted report keeps what
it has. A row that fails says why, and the next one runs. Ends with a Markdown table and profiles of
the two sampling rows that are farthest from the lower bound. On a CPU, with
`--device cpu --quick true`, the smallest rows run and the others say "needs CUDA".
"""

import functools
import gc
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autoregressive.sampling.run import SampleRunConfig, sample
from benchmarks import sampling, training
from core.config import config_values, parse_config, run_command
from core.distributed.hardware import device_name, peak_memory_bytes
from core.distributed.parallel import ParallelConfig
from core.distributed.world import DeviceName, World, distributed
from core.files import write_json, write_text
from tokenizer.models.vq_model import VQModel

Numbers = dict[str, Any]
NEEDS_CUDA = "needs CUDA"


@dataclass(frozen=True)
class ReportConfig:
    """What to report.

    Args:
        out: The JSON to write; the Markdown table goes beside it.
        device: auto, cpu, cuda or mps.
        quick: Small grids and batches, and only the rows of the smallest models.
        minutes: Rows that would begin later than this are left out, and say so.
    """

    out: Path
    device: DeviceName = "auto"
    quick: bool = False
    minutes: float = 10.0

    def __post_init__(self) -> None:
        if self.minutes <= 0:
            raise ValueError(f"minutes is {self.minutes}, must be > 0")


@dataclass(frozen=True)
class Row:
    """A row of the report: its name, what measures it, and whether a CPU may."""

    name: str
    measure: Callable[[], Numbers]
    on_cpu: bool = False


def facts(world: World) -> Numbers:
    """Versions and the card."""
    cuda = world.device.type == "cuda"
    return {
        "card": device_name(world.device),
        "cards": torch.cuda.device_count() if cuda else 0,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "python": platform.python_version(),
    }


def run_tests() -> Numbers:
    """The tests that need a card, in a process of their own."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--durations=0"],
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = [line for line in done.stdout.splitlines() if " passed" in line or " failed" in line]
    return {"result": lines[-1].strip("= ") if lines else f"pytest exited {done.returncode}"}


def measure_sampling(
    size: str, grid: tuple[int, int], batch: int, device: sampling.Device
) -> Numbers:
    """The engine in bf16, eager blocks and CUDA graphs, beside the card's lower bound.

    Up to batch 8, the reference's loop too, in bf16.
    """
    config = sampling.BenchmarkConfig(batches=(batch,), repeats=2)
    (row,) = sampling.measure_size(config, size, grid, device, {})
    kept = ("ms_per_step", "images_per_second", "fraction_of_floor")
    numbers = {key: row[key] for key in kept}
    if batch <= 8:
        for _ in range(2):  # the first warms up
            times = sampling.reference_times(config, size, grid, "bf16", batch, device.device)
        numbers["times_reference"] = 1e3 * statistics.mean(times) / row["ms_per_step"]
    return numbers


def measure_tokenizer(side: int, batch: int, device: torch.device) -> Numbers:
    """VQ-16 in bf16 as the sampling commands run it, images per second."""
    vq = VQModel.from_preset("VQ-16").for_inference(device, torch.bfloat16)
    images = torch.rand(batch, 3, side, side, device=device) * 2 - 1
    numbers: Numbers = {}
    with torch.no_grad():
        codes = vq.encode(images)
        for name, run in (
            ("encode", functools.partial(vq.encode, images)),
            ("decode", functools.partial(vq.decode, codes)),
        ):
            fastest = min(sampling.seconds(run, device) for _ in range(3))
            numbers[f"{name}_images_per_second"] = batch / fastest
    return numbers


def measure_sample_runs(config: ReportConfig, world: World) -> Numbers:
    """Sample runs of GPT-B to npz as autoregressive.sample does them, and 50,000 images from them.

    The longer run less the shorter one gives the time of an image without that of the start.
    """
    few, many = (2, 18) if config.quick else (500, 2000)
    grid = (2, 2) if config.quick else (16, 16)
    gpt = sampling.random_gpt("GPT-B", grid, "fp32", torch.device("cpu"))
    vq = VQModel.from_preset("VQ-16")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        gpt.save_pretrained(folder / "gpt")
        vq.save_pretrained(folder / "vq")
        times = []
        for count in (few, few, many):  # the first compiles and captures graphs
            run = SampleRunConfig(
                gpt=str(folder / "gpt"),
                tokenizer=str(folder / "vq"),
                out=folder / f"{len(times)}",
                num_images=count,
                batch_size=2 if config.quick else 256,
            )
            started = time.perf_counter()
            sample(run, world)
            times.append(time.perf_counter() - started)
    each = (times[2] - times[1]) / (many - few)
    if each <= 0:
        raise RuntimeError(f"{many} images took no longer than {few}: the machine is busy")
    minutes = (times[1] + (50_000 - few) * each) / 60
    return {"images": many, "images_per_second": 1 / each, "minutes_for_50000": minutes}


def measure_training(size: str, large: bool, config: ReportConfig, world: World) -> Numbers:
    """Steps as the training command does them; large: FSDP and selective checkpointing."""
    cuda = world.device.type == "cuda"
    settings = training.BenchmarkConfig(
        out=config.out,
        parallel=ParallelConfig(
            compile=cuda, activation_checkpointing="selective" if large else "none"
        ),
        batch_size=1 if config.quick else 32,
        grid=(2, 2) if config.quick else (16, 16),
        num_steps=1 if config.quick else 5,
        plain=False,
    )
    return training.measure_steps(size, "fsdp" if large else "ddp", settings, world)


def rows_of(config: ReportConfig, world: World) -> list[Row]:
    """All rows, the most wanted first."""
    device = sampling.measure_device(world.device)
    grid = (2, 2) if config.quick else (16, 16)
    rows = [Row("tests that need a GPU", run_tests)]
    sizes = ("GPT-B", "GPT-L", "GPT-XL", "GPT-XXL", "GPT-3B")
    points = [(size, grid, batch) for size in sizes for batch in (1, 8, 64, 256)]
    points += [(size, (24, 24), 64) for size in sizes]
    rows += [
        Row(
            f"sampling {size}, {grid[0] * grid[1]} codes, batch {batch}",
            functools.partial(measure_sampling, size, grid, batch, device),
            on_cpu=size == "GPT-B" and batch <= 8 and grid != (24, 24),
        )
        for size, grid, batch in points
    ]
    side, batch = (32, 1) if config.quick else (256, 64)
    vq = functools.partial(measure_tokenizer, side, batch, world.device)
    rows.append(Row(f"VQ-16, {side} px, batch {batch}", vq, on_cpu=True))
    runs = functools.partial(measure_sample_runs, config, world)
    rows.append(Row("sample runs GPT-B, VQ-16", runs, on_cpu=True))
    for size in ("GPT-B", "GPT-L", "GPT-XL", "GPT-3B"):
        large = size == "GPT-3B"
        how = functools.partial(measure_training, size, large, config, world)
        rows.append(Row(f"training {size}", how, on_cpu=size == "GPT-B"))
    return rows


def measure_row(row: Row, world: World) -> Numbers:
    """The numbers of a row with the card's peak memory, or why there are none."""
    cuda = world.device.type == "cuda"
    if not cuda and not row.on_cpu:
        return {"status": NEEDS_CUDA}
    if cuda:
        torch.cuda.reset_peak_memory_stats(world.device)
    started = time.perf_counter()
    numbers: Numbers = {"status": "measured"}
    try:
        numbers |= row.measure()
    except (RuntimeError, subprocess.TimeoutExpired) as error:  # out of memory, no such kernel
        numbers = {"status": f"failed: {str(error).splitlines()[0]}"}
    if cuda:
        numbers["memory_gib"] = peak_memory_bytes(world.device) / 2**30
    numbers["seconds"] = time.perf_counter() - started
    sampling.random_gpt.cache_clear()
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    return numbers


def profile_rows(rows: list[Row], results: Numbers, config: ReportConfig) -> list[Path]:
    """Profile the two sampling rows that are farthest from the lower bound; a table each."""
    measured = {
        row.name: row for row in rows if "fraction_of_floor" in results["rows"].get(row.name, {})
    }
    worst = sorted(measured, key=lambda name: results["rows"][name]["fraction_of_floor"])[:2]
    tables = []
    for i, name in enumerate(worst):
        with torch.profiler.profile() as profile:
            measured[name].measure()
        sort = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        tables.append(config.out.with_suffix(f".profile_{i}.txt"))
        table = profile.key_averages().table(sort_by=sort, row_limit=20)
        write_text(tables[-1], f"{name}\n{table}\n")
    return tables


def markdown(results: Numbers) -> str:
    """The report as a table."""
    card = ", ".join(f"{name} {value}" for name, value in results["facts"].items() if value)
    lines = [card, "", "| what | measured |", "|---|---|"]
    for name, numbers in results["rows"].items():
        entries = [numbers["status"]] if numbers["status"] != "measured" else []
        for key, value in numbers.items():
            if key not in ("status", "seconds"):
                entries.append(
                    f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                )
        lines.append(f"| {name} | {', '.join(entries)} |")
    return "\n".join(lines) + "\n"


def report(config: ReportConfig, world: World) -> Numbers:
    """Measure every row; JSON after each, Markdown at the end."""
    started, table = time.perf_counter(), config.out.with_suffix(".md")
    config.out.parent.mkdir(parents=True, exist_ok=True)
    results: Numbers = {
        "facts": facts(world),
        "settings": config_values(config),
        "rows": {},
    }
    rows = rows_of(config, world)
    for row in rows:
        if time.perf_counter() - started > 60 * config.minutes:
            numbers = {"status": f"not run: {config.minutes:g} minutes were over"}
        else:
            numbers = measure_row(row, world)
        results["rows"][row.name] = numbers
        print(f"{row.name}: {numbers}", flush=True)
        write_json(config.out, results)
    write_text(table, markdown(results))
    print(markdown(results))
    late = time.perf_counter() - started > 60 * config.minutes
    profiles = [] if late else profile_rows(rows, results, config)
    print(config.out, table, *profiles, sep=os.linesep)
    return results


def main() -> None:
    """Entry point."""
    config = parse_config(ReportConfig)
    with distributed(config.device) as world:
        report(config, world)


if __name__ == "__main__":
    run_command(main)
