"""Speed of training: steps against a plain loop, memory of the loss, reading codes, saving.

python -m benchmarks.training --out runs/benchmarks/training.json --sizes GPT-B
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from core.config import config_values, parse_config, parse_first, run_command
from core.distributed.config import DeviceName, ParallelConfig, Precision, Strategy


@dataclass(frozen=True)
class BenchmarkConfig:
    """What to measure.

    Args:
        out: The JSON to write.
        measure: Steps per size and strategy; the loss's memory; reading codes; saving meanwhile;
            verifying the saved weights.
        sizes: Presets of the decoder.
        strategies: Each is measured for every size.
        parallel: Its compile and activation_checkpointing are taken; strategies are the above.
        batch_size: Images per process and step.
        grid: Rows and columns of codes.
        precision: Of our step; the plain loop is float32, as torch does by default.
        num_steps: Timed steps; the median counts. Two more come before them.
        plain: Time a plain eager loop too and give the ratio.
        save_size: The preset that is saved while it trains.
        device: auto, cpu, cuda or mps.
    """

    out: Path
    measure: tuple[Literal["steps", "loss", "codes", "saving", "verifying"], ...] = (
        "steps",
        "loss",
        "codes",
        "saving",
        "verifying",
    )
    sizes: tuple[str, ...] = ("GPT-B",)
    strategies: tuple[Strategy, ...] = ("ddp",)
    parallel: ParallelConfig = field(default_factory=lambda: ParallelConfig(compile=True))
    batch_size: int = 4
    grid: tuple[int, int] = (16, 16)
    precision: Precision = "bf16"
    num_steps: int = 5
    plain: bool = True
    save_size: str = "GPT-L"
    device: DeviceName = "auto"

    def __post_init__(self) -> None:
        if min(self.batch_size, self.num_steps, *self.grid) < 1:
            raise ValueError("batch_size, num_steps and grid must be >= 1")


parse_first(BenchmarkConfig, __name__)


import itertools
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.nn import functional as F

from autoregressive.data.codes import CodeDataset, ReferenceCodes
from autoregressive.data.config import DataConfig
from autoregressive.models.gpt import GPT, Block
from autoregressive.objectives.next_token import NextTokenLoss
from core.checksums import FileSums, find_damage, write_checksums
from core.data.shards import ShardWriter
from core.distributed.hardware import peak_flops, peak_memory_bytes
from core.distributed.parallel import prepare
from core.distributed.world import World, distributed
from core.files import write_json
from core.training.checkpoint import Checkpointer
from core.training.config import OptimizerConfig
from core.training.ema import EMA
from core.training.linear_cross_entropy import linear_cross_entropy
from core.training.optimizer import Stepper, build_adamw
from core.weights import save_tensors

Results = dict[str, float]


def our_steps(
    gpt: GPT,
    config: BenchmarkConfig,
    strategy: Strategy,
    world: World,
    before_update: Callable[[], None] = lambda: None,
) -> tuple[Callable[[], None], Stepper]:
    """A function that does one step as autoregressive.train does, and its optimiser."""
    parallel = ParallelConfig(
        strategy,
        compile=config.parallel.compile,
        activation_checkpointing=config.parallel.activation_checkpointing,
    )
    model = prepare(NextTokenLoss(gpt, 1024), parallel, world, config.precision, Block)
    settings = OptimizerConfig()
    stepper = Stepper(build_adamw(gpt, settings), settings, world.device)
    batches = random_batches(gpt, config, world)
    count = itertools.count()

    def step() -> None:
        codes, labels = next(batches)
        with world.autocast(config.precision):
            loss = model(codes, labels)
        loss.backward()
        before_update()
        stepper.step(next(count), 10**9)

    return step, stepper


def plain_steps(gpt: GPT, config: BenchmarkConfig, world: World) -> Callable[[], None]:
    """A function that does one step of the loop that anyone would write first."""
    gpt.to(world.device)
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05)
    batches = random_batches(gpt, config, world)

    def step() -> None:
        codes, labels = next(batches)
        loss = F.cross_entropy(gpt(codes, labels).flatten(0, 1), codes.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def random_batches(
    gpt: GPT, config: BenchmarkConfig, world: World
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Codes and labels on the device, without end."""
    shape = (config.batch_size, gpt.config.num_codes)
    while True:
        codes = torch.randint(gpt.config.vocab_size, shape, device=world.device)
        yield codes, torch.randint(gpt.config.num_classes, shape[:1], device=world.device)


def seconds_per_step(step: Callable[[], None], config: BenchmarkConfig, world: World) -> float:
    """The median over num_steps; on a CPU of this process's CPU time, which others do not slow."""
    clock = time.perf_counter if world.device.type == "cuda" else time.process_time
    times = []
    for i in range(config.num_steps + 2):
        started = clock()
        step()
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        if i >= 2:  # the first ones compile and allocate
            times.append(clock() - started)
    return statistics.median(times)


def measure_steps(size: str, strategy: Strategy, config: BenchmarkConfig, world: World) -> Results:
    """Tokens per second and process, MFU, peak memory, and how much faster than a plain loop."""
    gpt = GPT.from_preset(size, grid=config.grid)
    tokens = config.batch_size * gpt.config.num_codes
    flops = gpt.config.training_flops
    rate = tokens / seconds_per_step(our_steps(gpt, config, strategy, world)[0], config, world)
    result = {"tokens_per_second": rate, "memory_gib": peak_memory_bytes(world.device) / 2**30}
    if peak := peak_flops(world.device):
        result["mfu"] = rate * flops / peak
    if config.plain:
        del gpt
        plain = plain_steps(GPT.from_preset(size, grid=config.grid), config, world)
        result["plain_tokens_per_second"] = tokens / seconds_per_step(plain, config, world)
        result["times_plain"] = rate / result["plain_tokens_per_second"]
    return result


def _measure_loss(method: str, precision: Precision, answer: multiprocessing.Queue) -> None:
    """In a process of its own: growth of its peak memory in GiB by a loss, and its CPU time.

    method: full, the loss of all logits; torch, F.linear_cross_entropy; chunked, ours.
    """
    torch.set_num_threads(1)
    hidden = torch.randn(32 * 256, 768, requires_grad=True)
    weight = torch.randn(16384, 768, requires_grad=True)
    targets = torch.randint(16384, (32 * 256,))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        if method == "chunked":
            loss = linear_cross_entropy(hidden, weight, targets, 1024)
        elif method == "torch":
            options = torch.nn.LinearCrossEntropyOptions()
            loss = F.linear_cross_entropy(hidden, weight, targets, options=options)
        else:
            loss = F.cross_entropy(F.linear(hidden, weight).float(), targets)
    loss.backward()
    seconds = time.process_time() - started
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answer.put({"gib": (after - before) / 2**20, "seconds": seconds})


def measure_loss(precision: Precision) -> Results:
    """Peak memory and time, forward and backward, of the loss of 32 images of 256 codes on a CPU.

    Whole logits, ours in chunks, and PyTorch's F.linear_cross_entropy where it has it (2.14).
    """
    context = multiprocessing.get_context("spawn")
    result = {}
    for method in ("full", "chunked", *(("torch",) if hasattr(F, "linear_cross_entropy") else ())):
        answer = context.Queue()
        process = context.Process(target=_measure_loss, args=(method, precision, answer))
        process.start()
        result.update({f"{method}_{key}": value for key, value in answer.get().items()})
        process.join()
    result["times_smaller"] = result["full_gib"] / result["chunked_gib"]
    return result


def measure_codes(folder: Path) -> Results:
    """Microseconds per sample: 576 codes of ten crops, from shards and from a file per image."""
    count, crops, tokens = 2000, 10, 576
    random = np.random.default_rng(0)
    codes = random.integers(0, 16384, (count, crops, tokens)).astype(np.uint16)
    labels = np.arange(count) % 1000
    writer = ShardWriter(folder / "shards", count, 1000, {}, World(0, 1, torch.device("cpu")))
    for shard in writer.begin():
        items = list(writer.items(shard))
        writer.write(shard, {"codes": codes[items], "labels": labels[items]})
    index = {"vocab_size": 16384, "grid": [24, 24], "tokenizer_sha256": ""}
    writer.finish({**index, "classes": [str(i) for i in range(1000)]})
    for name, array in (("codes", codes), ("labels", labels)):
        (folder / name).mkdir()
        for i in range(count):
            np.save(folder / name / f"{i}.npy", array[i][None].astype(np.int64))
    data = CodeDataset(DataConfig((folder / "shards",)))
    files = [ReferenceCodes(folder / "codes"), ReferenceCodes(folder / "labels")]
    source = data.sources[0]
    batches = [random.permutation(count)[:256] for _ in range(20)]

    def seconds(read: Callable[[np.ndarray], object]) -> float:
        for rows in batches[:2]:
            read(rows)
        started = time.process_time()
        for rows in batches:
            read(rows)
        return (time.process_time() - started) / (len(batches) * 256)

    crop = random.integers(0, crops, 256)
    ours = seconds(lambda rows: (source.pick(rows, crop), data.labels[rows]))
    theirs = seconds(lambda rows: (files[0].pick(rows, crop), files[1][rows]))
    return {
        "shards_microseconds": ours * 1e6,
        "file_per_image_microseconds": theirs * 1e6,
        "times_faster": theirs / ours,
    }


def measure_saving(config: BenchmarkConfig, world: World, folder: Path) -> Results:
    """Mean seconds of a step without and during an asynchronous save of everything."""
    gpt = GPT.from_preset(config.save_size, grid=config.grid)
    ema = EMA(gpt, 0.9999)
    checkpoints: Checkpointer | None = None

    def before_update() -> None:
        if checkpoints:
            checkpoints.wait_for_copy()

    step, stepper = our_steps(gpt, config, "ddp", world, before_update)
    parts = {"model": gpt, "ema": ema.model, "optimizer": stepper.optimizer}
    checkpoints = Checkpointer(folder, gpt.config, world, keep_last=1, **parts)

    def timed() -> tuple[float, float]:
        started, computing = time.perf_counter(), time.thread_time()
        step()
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started, time.thread_time() - computing

    def save(number: int) -> list[tuple[float, float]]:
        times = []
        checkpoints.save(number)
        while checkpoints.saving:
            times.append(timed())  # the first one waits for the copy to the CPU
        checkpoints.finish()
        return times

    timed()
    save(0)  # allocates the buffers
    quiet, busy = [], []
    for number in range(1, 3):  # turn about: a change of the machine's load hits both alike
        busy += save(number)
        quiet += [timed() for _ in range(config.num_steps)]
    still, saving = (np.array(times).mean(0) for times in (quiet, busy))
    parameters = sum(parameter.numel() for parameter in gpt.parameters())
    return {
        "parameters": parameters,
        "quiet_step_seconds": float(still[0]),
        "saving_step_seconds": float(saving[0]),
        "rise": float(saving[0] / still[0]) - 1,
        # Of the training thread's own CPU time: without what other processes take.
        "rise_of_cpu_time": float(saving[1] / still[1]) - 1,
        "longest_step_seconds": max(busy)[0],
        "steps_while_saving": len(busy),
    }


def measure_verifying(config: BenchmarkConfig, folder: Path) -> Results:
    """Seconds to compare float32 weights with their checksums, by XXH3 and by sha256 as before."""
    with torch.device("meta"):
        gpt = GPT.from_preset(config.save_size, grid=config.grid)
    state = {name: torch.rand(value.shape) for name, value in gpt.state_dict().items()}
    path = folder / "model.safetensors"
    save_tensors(state, path)
    both = FileSums.of(path)
    times: dict[str, list[float]] = {"xxh3": [], "sha256": []}
    for _ in range(3):  # turn about: a change of the machine's load hits both alike
        for name, sums in (("xxh3", both), ("sha256", FileSums(both.sha256))):
            write_checksums(folder, {path.name: sums})
            started = time.perf_counter()
            assert find_damage(folder) == ""
            times[name].append(time.perf_counter() - started)
    ours, before = min(times["xxh3"]), min(times["sha256"])
    size = path.stat().st_size
    path.unlink()
    return {
        "bytes": size,
        "seconds": ours,
        "sha256_seconds": before,
        "times_faster": before / ours,
    }


def measure(config: BenchmarkConfig, world: World) -> None:
    """Print a table and write JSON."""
    results: dict[str, Results] = {}
    if "steps" in config.measure:
        for size, strategy in itertools.product(config.sizes, config.strategies):
            results[f"{size} {strategy}"] = measure_steps(size, strategy, config, world)
    with tempfile.TemporaryDirectory() as folder:
        if "loss" in config.measure:
            for precision in ("fp32", "bf16"):
                results[f"loss {precision}"] = measure_loss(precision)
        if "codes" in config.measure:
            results["codes"] = measure_codes(Path(folder))
        if "saving" in config.measure:
            results["saving"] = measure_saving(config, world, Path(folder, "checkpoints"))
        if "verifying" in config.measure and world.is_main:
            results["verifying"] = measure_verifying(config, Path(folder))
    if not world.is_main:
        return
    for name, numbers in results.items():
        print(f"{name:<16}" + "   ".join(f"{key} {value:.4g}" for key, value in numbers.items()))
    config.out.parent.mkdir(parents=True, exist_ok=True)
    facts = {"threads": torch.get_num_threads(), "processes": world.size}
    write_json(config.out, {**results, **facts, "settings": config_values(config)})
    print(config.out)


def main() -> None:
    """Entry point."""
    config = parse_config(BenchmarkConfig)
    with distributed(config.device, config.parallel.timeout_minutes) as world:
        measure(config, world)


if __name__ == "__main__":
    run_command(main)
