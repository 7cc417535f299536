"""Sampling speed, next to the device's lower bound and to a plain implementation.

python -m benchmarks.sampling --precisions bf16 int8 --batches 1 8 --against reference

The lower bound ("floor") is, per code, the time to read the weights and the stored keys and values
once, or to multiply by them if that takes longer, at the bandwidth and speed measured at the start.
The last line of the output is JSON.

On a CPU, times are CPU time of the process. Two figures are printed: the mean over the steps of
each step's least time over all runs, which other processes disturb least, and the median run. The
plain implementation runs in one separate process per precision, without large pages, as its users
run it. There, its large intermediate tensors cost little in some runs and most of the time in
others (in bf16 at batch 8 a step takes 75 or 320 ms), depending on whether the allocator keeps the
memory or returns it to the system.
"""

from dataclasses import dataclass, field
from typing import Literal

from autoregressive.inference.sampling_config import DecodePrecision, SamplingConfig
from core.config import parse_config, parse_first, run_command
from core.distributed.config import DeviceName


@dataclass(frozen=True)
class BenchmarkConfig:
    """What to measure.

    Args:
        sizes: Model presets, with random weights.
        grids: Rows and columns of codes.
        batches: Batch sizes.
        precisions: Precisions of the engine: fp32, bf16, int8, w8a8, fp8.
        sampling: Guidance and filters.
        against: reference: also time the reference's algorithm, in fp32 and bf16.
        reference_codes: Number of codes to time it for (each takes the same time); null: all.
        compile: Time the engine without torch.compile, with it, or both.
        intervals: Values of sampling.cfg_interval to time the engine with.
        tokenizer: Also time the VQ-16 tokenizer, plainly and as the sampling commands run it.
        repeats: Number of runs of each; everything that is compared takes turns.
        threads: CPU threads.
        device: auto, cpu, cuda or mps.
    """

    sizes: tuple[str, ...] = ("GPT-B",)
    grids: tuple[tuple[int, int], ...] = ((16, 16),)
    batches: tuple[int, ...] = (1, 8)
    precisions: tuple[DecodePrecision, ...] = ("bf16",)
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(top_k=2000))
    against: Literal["none", "reference"] = "none"
    reference_codes: int | None = 32
    compile: tuple[bool, ...] = (False,)
    intervals: tuple[int | None, ...] = (None,)
    tokenizer: bool = False
    repeats: int = 5
    threads: int = 1
    device: DeviceName = "auto"

    def __post_init__(self) -> None:
        if min(self.repeats, self.threads, self.reference_codes or 1, *self.batches) < 1:
            raise ValueError("repeats, threads, batches and reference_codes must be >= 1")


parse_first(BenchmarkConfig, __name__)

import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import asdict, replace

import torch

from autoregressive.inference.engine import InferenceEngine, num_guided_codes
from autoregressive.inference.generate import generate_steps, generation_request
from autoregressive.models.gpt import GPT
from benchmarks.support import reference_sampler
from core.distributed.config import Precision
from core.distributed.world import choose_device, dtype_of
from tokenizer.models.vq_model import VQModel

LAUNCH = 1.5e-6  # seconds per kernel inside a CUDA graph
BYTES = {"fp32": 4, "bf16": 2, "int8": 1, "w8a8": 1, "fp8": 1}


@dataclass(frozen=True)
class Device:
    """A device, its bandwidth in bytes per second, and operations per second by precision."""

    device: torch.device
    bandwidth: float
    speed: dict[str, float]


def clock(device: torch.device) -> float:
    """Seconds: CPU time of the process; on a GPU wall time, after waiting for the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Seconds that one run takes."""
    started = clock(device)
    run()
    return clock(device) - started


def measure_device(device: torch.device) -> Device:
    """Read a gigabyte and multiply square matrices; the best of five each."""
    data = torch.ones(2**28, device=device)
    size = 8192 if device.type == "cuda" else 1024
    speed = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        square = torch.ones(size, size, dtype=dtype, device=device)
        fastest = min(seconds(lambda m=square: m @ m, device) for _ in range(5))
        speed[name] = 2 * size**3 / fastest
    fastest = min(seconds(data.sum, device) for _ in range(5))
    return Device(device, data.nbytes / fastest, speed)


def floor(gpt: GPT, batch: int, precision: str, sampling: SamplingConfig, device: Device) -> float:
    """Least seconds for a batch: reading or multiplying weights, then keys and values."""
    config = gpt.config
    kv_dim = config.kv_heads * config.head_dim
    matrices = config.dim * (2 * config.dim + 2 * kv_dim + 3 * config.ffn_dim)
    head = config.vocab_size * config.dim
    weights = config.num_layers * matrices + head
    speed = device.speed["fp32" if precision == "fp32" else "bf16"]
    width = 4 if precision == "fp32" else 2
    guided = num_guided_codes(sampling.cfg_scales(config.num_codes))
    total = 0.0
    for position in range(config.num_codes):
        rows = 2 * batch if position < guided else batch
        operations = 2 * (config.num_layers * matrices * rows + head * batch)
        read = weights * BYTES[precision] / device.bandwidth
        slots = config.num_layers * rows * (position + 1)
        attention = max(
            2 * kv_dim * width * slots / device.bandwidth, 4 * config.dim * slots / speed
        )
        total += max(read, operations / speed) + attention
    return total


def step_times(steps: Iterator[object], count: int, device: torch.device) -> list[float]:
    """Seconds of each of the first `count` steps; on a GPU, where steps run ahead, their mean."""
    times = [clock(device)]
    for _ in itertools.islice(steps, count):
        times.append(clock(device) if device.type != "cuda" else 0.0)
    if device.type == "cuda":
        return [(clock(device) - times[0]) / count]
    return [after - before for before, after in itertools.pairwise(times)]


@functools.lru_cache(maxsize=1)
def random_gpt(size: str, grid: tuple[int, int], precision: Precision, device: torch.device) -> GPT:
    """A GPT with random weights; its initial head of zeros would make all codes tie."""
    gpt = GPT.from_preset(size, grid=grid).eval()
    torch.nn.init.normal_(gpt.output.weight, std=0.02)
    return gpt.to(device, dtype_of(precision))


def reference_times(
    config: BenchmarkConfig,
    size: str,
    grid: tuple[int, int],
    precision: Precision,
    batch: int,
    device: torch.device,
) -> list[float]:
    """Seconds of each step of the plain implementation; called in a separate process."""
    os.environ["THP_MEM_ALLOC_ENABLE"] = "0"
    torch.set_num_threads(config.threads)
    gpt = random_gpt(size, grid, precision, device)
    count = min(config.reference_codes or gpt.config.num_codes, gpt.config.num_codes)
    labels = torch.arange(batch, device=device) % gpt.config.num_classes
    return step_times(
        reference_sampler.steps(gpt, labels, config.sampling.resolved("class")), count, device
    )


def measure_size(
    config: BenchmarkConfig,
    size: str,
    grid: tuple[int, int],
    device: Device,
    plain: dict[Precision, Executor],
) -> list[dict]:
    """Times of one model for every batch size and precision, next to the plain ones."""
    gpt = random_gpt(size, grid, "fp32", device.device)
    num_codes = gpt.config.num_codes
    sampling = config.sampling.resolved("class")
    engines = {
        (name, compiled): InferenceEngine(gpt, name, compile=compiled)
        for name in config.precisions
        for compiled in config.compile
    }
    rows = []
    for batch in config.batches:
        labels = torch.arange(batch, device=device.device) % gpt.config.num_classes
        runs: dict[tuple[str, str, bool, int | None], Callable[[], list[float]]] = {}
        for name, pool in plain.items():
            runs["reference", name, False, None] = functools.partial(
                lambda pool, *arguments: pool.submit(reference_times, *arguments).result(),
                *(pool, config, size, grid, name, batch, device.device),
            )
        for (key, engine), interval in itertools.product(engines.items(), config.intervals):
            runs[("ours", *key, interval)] = functools.partial(
                lambda engine, *arguments: step_times(
                    generate_steps(engine, generation_request(engine, *arguments)),
                    num_codes,
                    device.device,
                ),
                engine,
                labels,
                replace(sampling, cfg_interval=interval),
            )
        for run in runs.values():
            run()  # compiles, captures the graphs
        times: dict[tuple, list[list[float]]] = {key: [] for key in runs}
        for _ in range(config.repeats):
            for key, run in runs.items():
                times[key].append(run())
        least = {key: statistics.mean(map(min, zip(*t, strict=True))) for key, t in times.items()}
        median = {key: statistics.median(map(statistics.mean, t)) for key, t in times.items()}
        for key in times:
            method, name, compiled, interval = key
            guided = replace(sampling, cfg_interval=interval)
            fastest = floor(gpt, batch, name, guided, device) / num_codes
            row = {
                "method": method,
                "precision": name,
                "compiled": compiled,
                "batch": batch,
                "cfg_interval": interval,
                "grid": gpt.config.grid,
                "ms_per_step": least[key] * 1e3,
                "median_ms_per_step": median[key] * 1e3,
                "images_per_second": batch / least[key] / num_codes,
                "tokens_per_second": batch / least[key],
                "fraction_of_floor": fastest / least[key],
            }
            if device.device.type == "cuda":
                launches = LAUNCH * (7 * gpt.config.num_layers + 6)
                row["fraction_of_launch_aware_floor"] = (fastest + launches) / least[key]
            for against in plain if method == "ours" else ():
                other = ("reference", against, False, None)
                row[f"times_reference_{against}"] = least[other] / least[key]
                row[f"median_times_reference_{against}"] = median[other] / median[key]
            rows.append(row)
    return rows


def measure_tokenizer(config: BenchmarkConfig, device: Device) -> list[dict]:
    """Decode and encode one image of 256 pixels, in float32 and as sampling commands do."""
    plain, fast = VQModel.from_preset("VQ-16").eval(), VQModel.from_preset("VQ-16").eval()
    plain, fast = plain.to(device.device), fast.for_inference(device.device, torch.bfloat16)
    images = torch.rand(1, 3, 256, 256, device=device.device) * 2 - 1
    codes = torch.randint(16384, (1, 16, 16), device=device.device)
    runs = {
        (name, kind): functools.partial(method, x)
        for kind, vq in (("plain", plain), ("fast", fast))
        for name, method, x in (("decode", vq.decode, codes), ("encode", vq.encode, images))
    }
    best = dict.fromkeys(runs, float("inf"))
    with torch.no_grad():
        for _ in range(config.repeats + 1):  # the first warms up
            for key, run in runs.items():
                best[key] = min(best[key], seconds(run, device.device))
    return [
        {
            "tokenizer": name,
            "seconds": best[name, "fast"],
            "times_plain": best[name, "plain"] / best[name, "fast"],
        }
        for name in ("decode", "encode")
    ]


def measure(config: BenchmarkConfig) -> None:
    """Print a table, then everything as JSON on the last line."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    device = measure_device(choose_device(config.device))
    print(f"bandwidth {device.bandwidth / 1e9:.1f} GB/s, threads {config.threads}")
    results = []
    with contextlib.ExitStack() as stack:
        plain: dict[Precision, Executor] = {}
        if config.against == "reference":
            for name in ("fp32", "bf16"):
                process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
                plain[name] = stack.enter_context(process)
        for size, grid in itertools.product(config.sizes, config.grids):
            for row in measure_size(config, size, grid, device, plain):
                results.append({"size": size, **row})
                print(" ".join(_format(*item) for item in results[-1].items()), flush=True)
    if config.tokenizer:
        for row in measure_tokenizer(config, device):
            results.append(row)
            print(" ".join(_format(key, value) for key, value in row.items()), flush=True)
    settings = asdict(replace(config, device=device.device.type))
    print(json.dumps({"results": results, "bandwidth": device.bandwidth, "settings": settings}))


def _format(name: str, value: object) -> str:
    return f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"


def main() -> None:
    """Entry point."""
    measure(parse_config(BenchmarkConfig))


if __name__ == "__main__":
    run_command(main)
