"""Serving speed: the reference's loop, our engine and vLLM, offline and under concurrent clients.

    python -m benchmarks.serving --out runs/benchmarks/serving.json

Whole images, codes and pixels, of a class model with random weights. Offline, all images are asked
for at once. Over HTTP, each client asks for one image, waits for it, and pauses for a random time
(exponential, so that arrivals are a Poisson process) before it asks again. A row ends when the time
of --seconds is over and every request has its answer. Each row is written to the JSON as soon as it
is measured; the same command continues. A Markdown table goes beside it.

vLLM runs in the environment of `make serve-test`, or in the one of --vllm_python. The paper reports
326 to 414 % of its own loop's speed for vLLM (arXiv 2406.06525, table 7).
"""

import asyncio
import itertools
import json
import os
import platform
import random
import socket
import subprocess
import sys
import tempfile
import time
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from autoregressive.models.config import GPTConfig
from autoregressive.models.gpt import GPT
from benchmarks.serving_offline import numbers
from core.config import InputError, config_values, parse_config, run_command, save_config
from core.distributed.world import DeviceName, choose_device
from core.files import read_json, write_json, write_text
from core.weights import save_tensors
from tokenizer.models.config import VQConfig
from tokenizer.models.vq_model import VQModel

ROOT = Path(__file__).resolve().parents[1]
EngineName = Literal["reference", "native", "native_compiled", "vllm_eager", "vllm_compiled"]
PAPER = "The paper's vLLM reaches 326 to 414 % of its own loop (arXiv 2406.06525, table 7)."
SMALL_GPT = GPTConfig(num_layers=6, num_heads=6, dim=384, vocab_size=4096, num_classes=100)
SMALL_VQ: dict[str, Any] = {
    "base_channels": 32,
    "channel_multipliers": (1, 1, 2),
    "num_res_blocks": 1,
}
READY_SECONDS = 300  # for a server to load its model; vLLM takes most of a minute


@dataclass(frozen=True)
class ServingConfig:
    """What to measure.

    Args:
        out: The JSON to write; the Markdown table goes beside it.
        size: Model preset, with random weights and the VQ-16 tokenizer.
        quick: A model of 6 layers, width 384 and 256 codes instead, with a small tokenizer.
        engines: reference (the published loop, offline only), native, native_compiled, vllm_eager,
            vllm_compiled.
        clients: Numbers of concurrent clients.
        images: Number of images of an offline row. The reference samples them in one batch.
        seconds: Time in which the clients of an HTTP row begin requests.
        batch_size: Images that the native engine samples together.
        pause: Mean seconds between an answer and a client's next request.
        precision: fp32 or bf16, of all engines.
        threads: CPU threads of each process; null: one per core.
        device: auto, cpu or cuda.
        vllm_python: Interpreter with vLLM and this package; null for that of `make serve-test`.
        vllm_options: Further arguments of vLLM's AsyncEngineArgs, as JSON.
    """

    out: Path
    size: str = "GPT-B"
    quick: bool = False
    engines: tuple[EngineName, ...] = typing.get_args(EngineName)
    clients: tuple[int, ...] = (1, 8, 32)
    images: int = 16
    seconds: float = 20.0
    batch_size: int = 8
    pause: float = 0.5
    precision: Literal["fp32", "bf16"] = "bf16"
    threads: int | None = None
    device: DeviceName = "auto"
    vllm_python: Path | None = None
    vllm_options: str = "{}"

    def __post_init__(self) -> None:
        if min(self.images, self.batch_size, self.threads or 1, *self.clients) < 1:
            raise ValueError("images, batch_size, threads and clients must be >= 1")
        if min(self.seconds, self.pause) <= 0:
            raise ValueError("seconds and pause must be positive")


def write_models(size: str, quick: bool, folder: Path) -> tuple[Path, Path]:
    """A GPT and a tokenizer with random weights, as folders -> their paths."""
    torch.manual_seed(0)
    if quick:
        gpt = GPT(SMALL_GPT)
        vq = VQModel(VQConfig(**SMALL_VQ, vocab_size=gpt.config.vocab_size))
    else:
        gpt, vq = GPT.from_preset(size), VQModel.from_preset("VQ-16")
    torch.nn.init.normal_(gpt.output.weight, std=0.02)  # zero in a new model
    for name, model in (("gpt", gpt), ("tokenizer", vq)):
        (folder / name).mkdir()
        save_config(model.config, folder / name / "config.yaml")
        save_tensors(model.state_dict(), folder / name / "model.safetensors")
    return folder / "gpt", folder / "tokenizer"


def python_of(engine: str, vllm_python: Path | None) -> Path:
    """The interpreter that an engine runs in; raises InputError where vLLM's is missing."""
    if not engine.startswith("vllm"):
        return Path(sys.executable)
    python = vllm_python or ROOT / ".venv-vllm" / "bin" / "python"
    if not python.exists():
        raise InputError(f"vLLM: {python} is missing; run `make serve-test` or give vllm_python")
    return python.absolute()


def environment(threads: int) -> dict[str, str]:
    """For a process of an engine: this checkout, its threads, a small cache of vLLM on CPUs."""
    return {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        # vLLM samples in a process of its own: threads that wait must not keep the others' cores.
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(threads),
    }


def serve_flags(
    config: ServingConfig, engine: EngineName, models: tuple[Path, Path], prefix: str = ""
) -> list[str]:
    """The flags of autoregressive.serve for an engine."""
    values: dict[str, object] = {
        "gpt": models[0],
        "tokenizer": models[1],
        "engine": "vllm" if engine.startswith("vllm") else "native",
        "batch_size": config.batch_size,
        "compute.device": choose_device(config.device).type,
        "compute.precision": config.precision,
        "compute.compile": str(engine == "native_compiled").lower(),
    }
    if engine.startswith("vllm"):
        options = {"enforce_eager": engine == "vllm_eager", **json.loads(config.vllm_options)}
        values["vllm_options"] = json.dumps(options)
    return [text for key, value in values.items() for text in (f"--{prefix}{key}", str(value))]


def offline(config: ServingConfig, engine: EngineName, models: tuple[Path, Path]) -> dict[str, Any]:
    """Images that are asked for at once, in a process of their own."""
    python = python_of(engine, config.vllm_python)
    command = [str(python), "-m", "benchmarks.serving_offline", "--images", str(config.images)]
    command += serve_flags(config, engine, models, "serve.")
    command += ["--reference", str(engine == "reference").lower()]
    env = environment(threads_of(config))
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{engine}, offline: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def server(
    config: ServingConfig, engine: EngineName, models: tuple[Path, Path], log: Path
) -> Iterator[str]:
    """The address of autoregressive.serve with an engine, in a process of its own."""
    import httpx

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    python = python_of(engine, config.vllm_python)
    command = [str(python), "-m", "autoregressive.serve", "--port", str(port), "--page", "false"]
    command += serve_flags(config, engine, models)
    address, end = f"http://127.0.0.1:{port}", time.monotonic() + READY_SECONDS
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(threads_of(config)), stdout=out, stderr=out
        )
    try:
        while True:
            try:
                if httpx.get(f"{address}/health").status_code == 200:
                    break
            except httpx.TransportError:
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"{engine}: {log.read_text()[-2000:]}") from None
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(120)


async def load(config: ServingConfig, address: str, clients: int, classes: int) -> dict[str, Any]:
    """Many clients at once; their latencies, and the images per second of all."""
    import httpx

    latencies: list[float] = []
    arrivals, numbering = random.Random(clients), itertools.count(1)

    async def ask(http: httpx.AsyncClient, seed: int) -> None:
        body = {"class_index": seed % classes, "seed": seed}
        answer = await http.post("/v1/images/generations", json=body)
        answer.raise_for_status()

    async def client(end: float) -> None:
        async with httpx.AsyncClient(base_url=address, timeout=1200) as http:
            while True:
                await asyncio.sleep(arrivals.expovariate(1 / config.pause))
                asked = time.perf_counter()
                if asked > end:
                    return
                await ask(http, next(numbering))
                latencies.append(time.perf_counter() - asked)

    async with httpx.AsyncClient(base_url=address, timeout=1200) as http:
        await ask(http, 0)  # warms up
    begin = time.perf_counter()
    running = [asyncio.create_task(client(begin + config.seconds)) for _ in range(clients)]
    left = set(running)
    while left:
        _, left = await asyncio.wait(left, timeout=10)
        seconds = time.perf_counter() - begin
        print(f"  {clients} clients: {len(latencies)} images in {seconds:.0f} s", flush=True)
    await asyncio.gather(*running)
    if not latencies:
        raise InputError(f"{clients} clients: no request in {config.seconds} s; give more seconds")
    return numbers(time.perf_counter() - begin, latencies)


def threads_of(config: ServingConfig) -> int:
    """CPU threads of a process."""
    return config.threads or os.cpu_count() or 1


def settings_of(config: ServingConfig) -> dict[str, Any]:
    """What the rows of one file have in common."""
    left_out = ("out", "engines", "clients", "vllm_python")
    values = {key: value for key, value in config_values(config).items() if key not in left_out}
    cuda = choose_device(config.device).type == "cuda"
    machine = torch.cuda.get_device_name() if cuda else f"CPU, {os.cpu_count()} cores"
    shared = {"threads": threads_of(config), "machine": machine, "platform": platform.platform()}
    return {**values, **shared}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| engine | clients | images | images/s | p50 (s) | p99 (s) | of the reference |"]
    lines.append("|---|---|---|---|---|---|---|")
    base = rows.get("reference offline", {}).get("images_per_second")
    for name, row in rows.items():
        engine, way = name.split(" ", 1)
        rate = row["images_per_second"]
        ratio = f"{100 * rate / base:.0f} %" if base else "not measured"
        columns = [engine, way, str(row["images"]), f"{rate:.3f}"]
        columns += [f"{row['p50']:.2f}", f"{row['p99']:.2f}", ratio]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join([*lines, "", PAPER]) + "\n"


def measure(config: ServingConfig) -> None:
    """Measure what the file does not have yet."""
    settings = settings_of(config)
    kept = read_json(config.out) if config.out.exists() else {"settings": settings, "rows": {}}
    if kept["settings"] != settings:
        raise InputError(f"{config.out}: measured with other settings; choose another --out")
    rows = kept["rows"]

    def keep(name: str, row: dict[str, Any]) -> None:
        rows[name] = row
        write_json(config.out, {"settings": settings, "rows": rows})
        write_text(config.out.with_suffix(".md"), table(rows))
        print(f"{name:<32} {row['images_per_second']:8.3f} images/s", flush=True)

    for engine in config.engines:
        python_of(engine, config.vllm_python)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = write_models(config.size, config.quick, folder)
        classes = SMALL_GPT.num_classes if config.quick else GPTConfig.num_classes
        for engine in config.engines:
            if f"{engine} offline" not in rows:
                print(f"{engine}, offline ...", flush=True)
                keep(f"{engine} offline", offline(config, engine, models))
            left = [n for n in config.clients if f"{engine} {n} over HTTP" not in rows]
            if engine == "reference" or not left:
                continue
            print(f"{engine}, over HTTP ...", flush=True)
            with server(config, engine, models, folder / f"{engine}.log") as address:
                for clients in left:
                    row = asyncio.run(load(config, address, clients, classes))
                    keep(f"{engine} {clients} over HTTP", row)
    print(table(rows))
    print(f"wrote {config.out} and {config.out.with_suffix('.md')}")


def main() -> None:
    """Entry point."""
    measure(parse_config(ServingConfig))


if __name__ == "__main__":
    run_command(main)
