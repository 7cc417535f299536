"""Captions per second of a T5 encoder, batched by length against one at a time.

python -m benchmarks.text_encoding --t5 google/flan-t5-xl --out runs/benchmarks/text_encoding.json
"""

from dataclasses import dataclass
from pathlib import Path

from core.config import config_values, parse_config, parse_first, run_command
from core.distributed.config import DeviceName, Precision


@dataclass(frozen=True)
class BenchmarkConfig:
    """What to measure.

    Args:
        t5: The text encoder: a folder or a Hub id.
        out: The JSON to write.
        count: Captions, of 4 to 29 words.
        precision: bf16 or fp32.
        device: auto, cpu, cuda or mps.
    """

    t5: str
    out: Path
    count: int = 1000
    precision: Precision = "bf16"
    device: DeviceName = "auto"

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count is {self.count}, must be >= 1")


parse_first(BenchmarkConfig, __name__)

import time

import numpy as np
import torch

from core.distributed.world import distributed, dtype_of
from core.files import write_json
from language.t5 import load_t5

NOUNS = ["cat", "dog", "tree", "house", "beach", "street", "table", "window", "boat", "horse"]
LINKS = ["on a", "under the", "beside a red", "of the old", "with a small", "in the"]


def measure(config: BenchmarkConfig) -> None:
    """Print a table and write JSON."""
    random = np.random.default_rng(0)
    captions = []
    for parts in random.integers(1, 8, config.count):
        links, nouns = random.choice(LINKS, parts), random.choice(NOUNS, parts)
        captions.append("a " + " ".join(f"{n} {k}" for n, k in zip(nouns, links, strict=True)))
    with distributed(config.device) as world:
        t5 = load_t5(config.t5, world.device, dtype_of(config.precision))
        t5.encode(captions[:8])  # warm up
        times = {}
        started = time.perf_counter()
        together = [part.cpu() for part in t5.encode(captions)]
        times["batched"] = time.perf_counter() - started
        started = time.perf_counter()
        alone = [t5.encode([caption])[0].cpu() for caption in captions]
        times["one at a time"] = time.perf_counter() - started
    pairs = zip(together, alone, strict=True)
    difference = max(float((a - b).abs().max()) for a, b in pairs)
    for name, seconds in times.items():
        print(f"{name:<14}{config.count / seconds:>10.1f} captions/s")
    ratio = times["one at a time"] / times["batched"]
    print(f"ratio {ratio:.2f}, greatest difference {difference:.1e}")
    config.out.parent.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    facts = {"ratio": ratio, "difference": difference, "threads": threads}
    write_json(config.out, {**times, **facts, "settings": config_values(config)})
    print(config.out)


def main() -> None:
    """Entry point."""
    measure(parse_config(BenchmarkConfig))


if __name__ == "__main__":
    run_command(main)
