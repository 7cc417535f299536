"""How long a Frechet distance of 2048-d statistics takes, beside scipy's matrix square root.

python -m benchmarks.frechet --out runs/benchmarks/frechet.json
"""

from dataclasses import dataclass
from pathlib import Path

from core.config import config_values, parse_config, parse_first, run_command


@dataclass(frozen=True)
class BenchmarkConfig:
    """What to measure.

    Args:
        out: The JSON to write.
        dim: Dimensions of the features.
        count: Features on either side; more than dim.
        repeats: The fastest of this many runs counts.
    """

    out: Path
    dim: int = 2048
    count: int = 6000
    repeats: int = 3

    def __post_init__(self) -> None:
        if self.count <= self.dim or self.repeats < 1:
            raise ValueError("count must exceed dim, and repeats be >= 1")


parse_first(BenchmarkConfig, __name__)

import time
from collections.abc import Callable

import numpy as np
import torch
from scipy.linalg import sqrtm

from core.files import write_json
from evaluations.metrics.frechet import Gaussian, frechet_distance


def by_scipy(first: Gaussian, second: Gaussian) -> float:
    """The distance as ADM's evaluator and pytorch-fid compute it."""
    root = sqrtm(first.covariance.numpy() @ second.covariance.numpy())
    traces = first.covariance.trace() + second.covariance.trace()
    difference = (first.mean - second.mean).square().sum()
    return float(difference + traces) - 2 * float(np.trace(root).real)


def measure(config: BenchmarkConfig) -> None:
    """Print a table and write JSON."""
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, config.dim + 1) ** -0.5
    rows = torch.randn(2, config.count, config.dim, generator=generator) * spectrum
    pair = [
        Gaussian.of_rows((part + shift).relu())
        for part, shift in zip(rows, (0.3, 0.35), strict=True)
    ]
    methods: dict[str, Callable[[Gaussian, Gaussian], float]] = {
        "ours": frechet_distance,
        "scipy": by_scipy,
    }
    result = {}
    for name, method in methods.items():
        times = []
        for _ in range(config.repeats):
            started = time.perf_counter()
            distance = method(*pair)
            times.append(time.perf_counter() - started)
        result[name] = {"seconds": min(times), "distance": distance}
        print(f"{name:<8}{min(times):>8.2f} s   distance {distance:.9f}")
    config.out.parent.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    write_json(config.out, {**result, "threads": threads, "settings": config_values(config)})
    print(config.out)


def main() -> None:
    """Entry point."""
    measure(parse_config(BenchmarkConfig))


if __name__ == "__main__":
    run_command(main)
