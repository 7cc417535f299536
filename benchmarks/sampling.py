"""How fast images are sampled, beside the device's floor and a plain implementation.

python -m benchmarks.sampling --precisions '[bf16,int8]' --batches '[1,8]' --against naive

The floor is the time to read the weights once and the valid keys and values once per code, or to
multiply them where that takes longer, at the bandwidth and speed measured at the start. The last
line is JSON. On a CPU the clock is that of the process: what other processes do counts little.
"""

import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

import torch

from autoregressive.decoding import Decoder, guided_codes
from autoregressive.linears import DecodePrecision
from autoregressive.model import GPT
from autoregressive.sampling import SamplingConfig, generate_steps
from benchmarks import naive
from core.config import parse_config, run_command
from core.distributed import DeviceName, choose_device
from tokenizer.model import VQModel

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
        repeats: Runs of each; what is compared takes turns. On a CPU the fastest time of every
            step counts, as other processes disturb some; on a GPU the fastest run.
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
    guided = guided_codes(sampling.guidance(config.num_codes))
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


def measure_size(config: BenchmarkConfig, gpt: GPT, device: Device) -> list[dict]:
    """Times of one model for every batch and precision, with those of the plain one."""
    num_codes = gpt.config.num_codes
    naive_codes = min(config.naive_codes or num_codes, num_codes)
    sampling = config.sampling.resolved("class")
    decoders = {
        (name, compiled): Decoder(gpt, name, compile=compiled)
        for name in config.precisions
        for compiled in config.compile
    }
    plain = {}
    if config.against == "naive":
        plain = {"fp32": gpt, "bf16": _copy(gpt).to(torch.bfloat16)}
    rows = []
    for batch in config.batches:
        labels = torch.arange(batch, device=device.device) % gpt.config.num_classes
        runs: dict[tuple[str, str, bool, int], Callable[[], list[float]]] = {}
        for name, model in plain.items():
            runs["naive", name, False, -1] = functools.partial(
                lambda m, x: step_times(naive.steps(m, x, sampling), naive_codes, device.device),
                model,
                labels,
            )
        for (key, decoder), interval in itertools.product(decoders.items(), config.intervals):
            runs[("ours", *key, interval)] = functools.partial(
                lambda *asked: step_times(generate_steps(*asked), num_codes, device.device),
                decoder,
                labels,
                replace(sampling, cfg_interval=interval),
            )
            runs[("ours", *key, interval)]()  # compiles, captures the graphs
        taken = {key: [run()] for key, run in runs.items()}
        for _ in range(config.repeats - 1):
            for key, run in runs.items():
                taken[key].append(run())
        best = {
            key: sum(map(min, zip(*times, strict=True))) / len(times[0])
            for key, times in taken.items()
        }
        for (method, name, compiled, interval), step in best.items():
            drawn = replace(sampling, cfg_interval=interval)
            least = floor(gpt, batch, name, drawn, device) / num_codes
            row = {
                "method": method,
                "precision": name,
                "compiled": compiled,
                "batch": batch,
                "cfg_interval": interval,
                "grid": gpt.config.grid,
                "ms_per_step": step * 1e3,
                "images_per_second": batch / step / num_codes,
                "tokens_per_second": batch / step,
                "fraction_of_floor": least / step,
            }
            if device.device.type == "cuda":
                launches = LAUNCH * (7 * gpt.config.num_layers + 6)
                row["fraction_of_launch_aware_floor"] = (least + launches) / step
            for against in plain if method == "ours" else ():
                row[f"times_naive_{against}"] = best["naive", against, False, -1] / step
            rows.append(row)
    return rows


def _copy(gpt: GPT) -> GPT:
    other = GPT(gpt.config)
    other.load_state_dict(gpt.state_dict())
    return other.to(gpt.tok_embeddings.weight.device)


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
    for size, grid in itertools.product(config.sizes, config.grids):
        gpt = GPT.from_preset(size, grid=grid).eval().to(device.device)
        torch.nn.init.normal_(gpt.output.weight, std=0.02)
        for row in measure_size(config, gpt, device):
            results.append({"size": size, **row})
            print(" ".join(_shown(key, value) for key, value in results[-1].items()), flush=True)
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
