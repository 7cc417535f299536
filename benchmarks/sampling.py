"""How fast images are sampled, beside the device's floor and a plain implementation.

python -m benchmarks.sampling --precisions '[bf16,int8]' --batches '[1,8]' --against naive

The floor is the time to read the weights once and the valid keys and values once per code, or to
multiply them where that takes longer, at the bandwidth and speed measured at the start. The last
line is JSON.

On a CPU the clock is that of the process, and two figures count: the least time of every step over
the runs, which other processes disturb least, and the median run. The plain implementation runs in
processes of its own, one a precision, and without large pages, as its users run it. Its large
intermediate tensors then cost little in some runs and most of the time in others (in bf16 at batch
8 a step takes 75 or 320 ms), as the allocator keeps memory or asks the system for it anew.
"""

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
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

import torch

from autoregressive.inference.engine import InferenceEngine, num_guided_codes
from autoregressive.inference.generate import generate_steps
from autoregressive.inference.quantized_linear import DecodePrecision
from autoregressive.inference.sampling_config import SamplingConfig
from autoregressive.models.gpt import GPT
from benchmarks import reference_sampler
from core.config import parse_config, run_command
from core.distributed.world import DeviceName, Precision, choose_device, dtype_of
from tokenizer.models.vq_model import VQModel

LAUNCH = 1.5e-6  # seconds a kernel costs inside a CUDA graph
BYTES = {"fp32": 4, "bf16": 2, "int8": 1, "w8a8": 1, "fp8": 1}


@dataclass(frozen=True)
class BenchmarkConfig:
    """What to measure.

    Args:
        sizes: Presets of the decoder, with random weights.
        grids: Rows and columns of codes.
        batches: Images at a time.
        precisions: fp32, bf16, int8, w8a8, fp8.
        sampling: Guidance and filters.
        against: naive also times the reference's algorithm, in fp32 and bf16.
        naive_codes: Of how many codes; each takes it the same time. 0 for all.
        compile: Without the compiler, with it, or both.
        intervals: Values of sampling.cfg_interval to time ours with.
        tokenizer: Also time the VQ-16 tokenizer, plainly and as sampling runs it.
        repeats: Runs of each; what is compared takes turns.
        threads: Of a CPU.
        device: auto, cpu, cuda or mps.
    """

    sizes: tuple[str, ...] = ("GPT-B",)
    grids: tuple[tuple[int, int], ...] = ((16, 16),)
    batches: tuple[int, ...] = (1, 8)
    precisions: tuple[DecodePrecision, ...] = ("bf16",)
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(top_k=2000))
    against: Literal["none", "naive"] = "none"
    naive_codes: int = 32
    compile: tuple[bool, ...] = (False,)
    intervals: tuple[int, ...] = (-1,)
    tokenizer: bool = False
    repeats: int = 5
    threads: int = 1
    device: DeviceName = "auto"

    def __post_init__(self) -> None:
        if min(self.repeats, self.threads, *self.batches) < 1 or self.naive_codes < 0:
            raise ValueError("repeats, threads and batches must be >= 1, naive_codes >= 0")


@dataclass(frozen=True)
class Device:
    """A device and what it can do: bytes read a second, operations a second by precision."""

    device: torch.device
    bandwidth: float
    speed: dict[str, float]


def clock(device: torch.device) -> float:
    """Seconds: of the process on a CPU, of the wall on a GPU once it has nothing to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """How long one run takes."""
    started = clock(device)
    run()
    return clock(device) - started


def measure_device(device: torch.device) -> Device:
    """Read a gigabyte, and multiply square matrices; the best of a few."""
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
    """Seconds a batch must take: weights read or multiplied, then keys and values."""
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
    """Seconds of each of the first `count` steps; on a GPU their mean, as they run ahead."""
    times = [clock(device)]
    for _ in itertools.islice(steps, count):
        times.append(clock(device) if device.type != "cuda" else 0.0)
    if device.type == "cuda":
        return [(clock(device) - times[0]) / count]
    return [after - before for before, after in itertools.pairwise(times)]


@functools.lru_cache(maxsize=1)
def random_gpt(size: str, grid: tuple[int, int], precision: Precision, device: torch.device) -> GPT:
    """A decoder with random weights; its own start has a head of zeros, which makes ties."""
    gpt = GPT.from_preset(size, grid=grid).eval()
    torch.nn.init.normal_(gpt.output.weight, std=0.02)
    return gpt.to(device, dtype_of(precision))


def naive_times(
    config: BenchmarkConfig,
    size: str,
    grid: tuple[int, int],
    precision: Precision,
    batch: int,
    device: torch.device,
) -> list[float]:
    """Seconds of each step of the plain implementation, in a process of its own."""
    os.environ["THP_MEM_ALLOC_ENABLE"] = "0"
    torch.set_num_threads(config.threads)
    gpt = random_gpt(size, grid, precision, device)
    count = min(config.naive_codes or gpt.config.num_codes, gpt.config.num_codes)
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
    """Times of one model for every batch and precision, with those of the plain one."""
    gpt = random_gpt(size, grid, "fp32", device.device)
    num_codes = gpt.config.num_codes
    sampling = config.sampling.resolved("class")
    decoders = {
        (name, compiled): InferenceEngine(gpt, name, compile=compiled)
        for name in config.precisions
        for compiled in config.compile
    }
    rows = []
    for batch in config.batches:
        labels = torch.arange(batch, device=device.device) % gpt.config.num_classes
        runs: dict[tuple[str, str, bool, int], Callable[[], list[float]]] = {}
        for name, pool in plain.items():
            runs["naive", name, False, -1] = functools.partial(
                lambda pool, *asked: pool.submit(naive_times, *asked).result(),
                *(pool, config, size, grid, name, batch, device.device),
            )
        for (key, decoder), interval in itertools.product(decoders.items(), config.intervals):
            runs[("ours", *key, interval)] = functools.partial(
                lambda *asked: step_times(generate_steps(*asked), num_codes, device.device),
                decoder,
                labels,
                replace(sampling, cfg_interval=interval),
            )
        for run in runs.values():
            run()  # compiles, captures the graphs
        taken: dict[tuple, list[list[float]]] = {key: [] for key in runs}
        for _ in range(config.repeats):
            for key, run in runs.items():
                taken[key].append(run())
        least = {key: statistics.mean(map(min, zip(*t, strict=True))) for key, t in taken.items()}
        median = {key: statistics.median(map(statistics.mean, t)) for key, t in taken.items()}
        for key in taken:
            method, name, compiled, interval = key
            drawn = replace(sampling, cfg_interval=interval)
            fastest = floor(gpt, batch, name, drawn, device) / num_codes
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
                other = ("naive", against, False, -1)
                row[f"times_naive_{against}"] = least[other] / least[key]
                row[f"median_times_naive_{against}"] = median[other] / median[key]
            rows.append(row)
    return rows


def measure_tokenizer(config: BenchmarkConfig, device: Device) -> list[dict]:
    """Decoding and encoding at 256 pixels, one image, in float32 and as sampling runs it."""
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
        if config.against == "naive":
            for name in ("fp32", "bf16"):
                process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
                plain[name] = stack.enter_context(process)
        for size, grid in itertools.product(config.sizes, config.grids):
            for row in measure_size(config, size, grid, device, plain):
                results.append({"size": size, **row})
                print(" ".join(_shown(*item) for item in results[-1].items()), flush=True)
    if config.tokenizer:
        for row in measure_tokenizer(config, device):
            results.append(row)
            print(" ".join(_shown(key, value) for key, value in row.items()), flush=True)
    settings = asdict(replace(config, device=device.device.type))
    print(json.dumps({"results": results, "bandwidth": device.bandwidth, "settings": settings}))


def _shown(name: str, value: object) -> str:
    return f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"


def main() -> None:
    """Entry point."""
    measure(parse_config(BenchmarkConfig))


if __name__ == "__main__":
    run_command(main)
