"""Codes per CPU second of one step: our engine beside vLLM, by batch size and position.

    python -m benchmarks.serving_steps --out runs/benchmarks/serving_steps.json

A class model with random weights, greedy, without tokenizer and HTTP. Each engine has a process of
its own, samples whole images and reports the CPU time of each step; the engines take turns. A
figure is the mean over the steps near a position of each step's least time, because other
processes only add time. The same command runs the processes, with --worker.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import typing
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from autoregressive.inference.engine import InferenceEngine
from autoregressive.inference.generate import generate_steps, generation_request
from autoregressive.inference.sampling_config import SamplingConfig
from autoregressive.models.gpt import GPT
from autoregressive.serving.export import export_vllm
from autoregressive.serving.vllm_requests import class_prompt, sampling_arguments
from benchmarks.sampling import step_times
from benchmarks.serving import ROOT, environment, python_of, write_models
from core.config import parse_config, run_command
from core.files import write_json, write_text

StepEngine = Literal["native", "native_compiled", "vllm_eager", "vllm_compiled"]
Steps = Callable[[int], list[float]]  # batch -> seconds of each step of whole images
SCALE = 2.0
ANSWER = "STEPS "


@dataclass(frozen=True)
class StepsConfig:
    """What to measure.

    Args:
        out: The JSON to write; the Markdown table goes beside it.
        size: Model preset, with random weights.
        quick: A model of 6 layers and width 384 instead.
        engines: native, native_compiled, vllm_eager, vllm_compiled.
        batches: Batch sizes.
        positions: Codes at which to report, of those of an image.
        window: Number of steps around a position that are averaged.
        repeats: Number of runs of each engine at each batch size; compilation and warming up cost
            the first one, so that a second is needed.
        threads: CPU threads of each engine.
        vllm_python: Interpreter with vLLM and this package; null for that of `make serve-test`.
        worker: Engine of this process, which the command itself sets; null to measure.
        models: Folder of the models, which the command itself sets.
    """

    out: Path = Path("runs/benchmarks/serving_steps.json")
    size: str = "GPT-B"
    quick: bool = False
    engines: tuple[StepEngine, ...] = typing.get_args(StepEngine)
    batches: tuple[int, ...] = (1, 8, 16, 32)
    positions: tuple[int, ...] = (16, 128, 240)
    window: int = 9
    repeats: int = 3
    threads: int = 1
    vllm_python: Path | None = None
    worker: StepEngine | None = None
    models: Path | None = None

    def __post_init__(self) -> None:
        if self.repeats < 2:
            raise ValueError("repeats must be >= 2")
        if min(self.window, self.threads, *self.batches, *self.positions) < 1:
            raise ValueError("window, threads, batches and positions must be >= 1")


def measure(config: StepsConfig) -> dict[str, Any]:
    """Measure, print and write a table; returns what is written."""
    for name in config.engines:
        python_of(name, config.vllm_python)
    rates: dict[str, dict[str, list[float]]] = {name: {} for name in config.engines}
    values: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        write_models(config.size, config.quick, folder)
        export_vllm(GPT.from_pretrained(folder / "gpt"), folder / "vllm")
        workers = {e: stack.enter_context(worker(config, e, folder)) for e in config.engines}
        for batch in config.batches:
            runs: dict[str, list[list[float]]] = {engine: [] for engine in workers}
            for _ in range(config.repeats):
                for engine, steps in workers.items():
                    runs[engine].append(steps(batch))
            for engine, times in runs.items():
                rates[engine][str(batch)] = [
                    batch / least_time(times, position, config.window)
                    for position in config.positions
                ]
                shown = ", ".join(f"{rate:.0f}" for rate in rates[engine][str(batch)])
                print(f"batch {batch:>3} {engine:<16} {shown} codes per CPU second", flush=True)
            values = write(config, rates)
    print(table(config.positions, rates) + values["verdict"])
    print(f"wrote {config.out} and {config.out.with_suffix('.md')}")
    return values


def write(config: StepsConfig, rates: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Write what is measured so far as JSON and as a Markdown table; returns what is written."""
    settings = {"positions": config.positions, "threads": config.threads, "size": config.size}
    values = {"settings": settings, "codes_per_cpu_second": rates, "verdict": verdict(rates)}
    config.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(config.out, values)
    write_text(
        config.out.with_suffix(".md"), f"{table(config.positions, rates)}\n{verdict(rates)}\n"
    )
    return values


def least_time(runs: list[list[float]], position: int, window: int) -> float:
    """Mean over the steps around a position of the least time that any run took for it."""
    count = min(map(len, runs))
    first = max(0, min(position - window // 2, count - window))
    steps = range(first, min(first + window, count))
    return sum(min(run[step] for run in runs) for step in steps) / len(steps)


def table(positions: tuple[int, ...], rates: dict[str, dict[str, list[float]]]) -> str:
    """Codes per CPU second as Markdown, one row for each batch size and position."""
    engines = list(rates)
    lines = [f"| batch | code | {' | '.join(engines)} |", "|---" * (len(engines) + 2) + "|"]
    for batch in rates[engines[0]]:
        for i, position in enumerate(positions):
            found = " | ".join(f"{rates[engine][batch][i]:.0f}" for engine in engines)
            lines.append(f"| {batch} | {position} | {found} |")
    return "\n".join(lines) + "\n"


def verdict(rates: dict[str, dict[str, list[float]]]) -> str:
    """Whether our engine is at least as fast as eager vLLM everywhere, in one line."""
    ours, theirs = rates.get("native"), rates.get("vllm_eager")
    if ours is None or theirs is None:
        return "native and vllm_eager were not measured together"
    ratios = [a / b for batch in ours for a, b in zip(ours[batch], theirs[batch], strict=True)]
    slower = sum(ratio < 1 for ratio in ratios)
    return (
        f"native is at least as fast as vllm_eager at {len(ratios) - slower} of {len(ratios)} "
        f"points; ratios {min(ratios):.2f} to {max(ratios):.2f}"
    )


@contextmanager
def worker(config: StepsConfig, engine: StepEngine, folder: Path) -> Iterator[Steps]:
    """A process of an engine, as a function of the batch size."""
    command = [str(python_of(engine, config.vllm_python)), "-m", "benchmarks.serving_steps"]
    command += ["--worker", engine, "--models", str(folder), "--threads", str(config.threads)]
    command += ["--batches", json.dumps(config.batches)]
    log = folder / f"{engine}.log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**environment(config.threads), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    asked, answers = process.stdin, process.stdout
    assert asked is not None
    assert answers is not None

    def steps(batch: int) -> list[float]:
        asked.write(f"{batch}\n")
        asked.flush()
        for line in answers:
            if line.startswith(ANSWER):
                return json.loads(line.removeprefix(ANSWER))
        raise RuntimeError(f"{engine}: {log.read_text()[-2000:]}")

    try:
        yield steps
    finally:
        asked.close()
        process.terminate()
        process.wait(60)


def work(config: StepsConfig) -> None:
    """Sample one batch for each line of standard input, which is its size."""
    assert config.worker is not None
    assert config.models is not None
    torch.set_num_threads(config.threads)
    compiled = config.worker.endswith("compiled")
    if config.worker.startswith("native"):
        steps = native_steps(config.models / "gpt", compiled)
    else:
        steps = vllm_steps(config.models, compiled, max(config.batches))
    for line in sys.stdin:
        print(ANSWER + json.dumps(steps(int(line))), flush=True)


def native_steps(folder: Path, compiled: bool) -> Steps:
    """Our engine."""
    engine = InferenceEngine(GPT.from_pretrained(folder), "bf16", compile=compiled)
    sampling = SamplingConfig(cfg_scale=SCALE, greedy=True)

    def steps(batch: int) -> list[float]:
        request = generation_request(engine, torch.arange(batch), sampling)
        return step_times(generate_steps(engine, request), engine.config.num_codes, engine.device)

    return steps


def vllm_steps(models: Path, compiled: bool, most: int) -> Steps:
    """vLLM's engine in this process, which takes one step per call."""
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]
    from vllm.sampling_params import RequestOutputKind  # pyright: ignore[reportMissingImports]

    gpt = GPT.from_pretrained(models / "gpt").config
    llm = LLM(
        str(models / "vllm"),
        dtype="bfloat16",
        enforce_eager=not compiled,
        skip_tokenizer_init=True,
        logits_processors=["autoregressive.serving.vllm_guidance:Guidance"],
        distributed_executor_backend="uni",
        max_num_seqs=most,
    )
    arguments = sampling_arguments(gpt, temperature=0.0, cfg_scale=SCALE)
    arguments["output_kind"] = RequestOutputKind.FINAL_ONLY

    def steps(batch: int) -> list[float]:
        engine = llm.llm_engine
        for label in range(batch):
            prompt = class_prompt(gpt, label % gpt.num_classes)
            engine.add_request(
                f"{label}-{os.urandom(4).hex()}", prompt, SamplingParams(**arguments)
            )
        times = []
        while engine.has_unfinished_requests():
            begin = time.process_time()
            engine.step()
            times.append(time.process_time() - begin)
        return times

    return steps


def main() -> None:
    """Entry point."""
    config = parse_config(StepsConfig)
    if config.worker:
        work(config)
    else:
        measure(config)


if __name__ == "__main__":
    run_command(main)
