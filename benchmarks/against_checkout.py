r"""Runs a benchmark in this checkout and in another one by turns, and compares the numbers.

python -m benchmarks.against_checkout --checkout ../before --module benchmarks.sampling \
    --arguments '[--precisions, "[bf16]", --batches, "[1,8]", --repeats, "1"]' --pairs 7

Each run is a process of its own, started in the checkout. Its last line is JSON, or the path of a
JSON file. Ratios are this checkout's number over the other's: of the least numbers (for times), of
the greatest ones (for rates), and the median over the pairs.
"""

from dataclasses import dataclass
from pathlib import Path

from core.config import InputError, parse_config, parse_first, run_command


@dataclass(frozen=True)
class CompareConfig:
    """What to compare.

    Args:
        checkout: Folder of the other checkout.
        module: The benchmark; both checkouts have it.
        arguments: Its arguments; both checkouts accept them.
        pairs: Number of runs in each checkout.
        numbers: Names of the numbers to compare.
    """

    checkout: Path
    module: str = "benchmarks.sampling"
    arguments: tuple[str, ...] = ()
    pairs: int = 7
    numbers: tuple[str, ...] = ("ms_per_step", "tokens_per_second")

    def __post_init__(self) -> None:
        if self.pairs < 1:
            raise ValueError("pairs must be >= 1")


parse_first(CompareConfig, __name__)

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator


def leaves(tree: object, path: str = "") -> Iterator[tuple[str, float]]:
    """Numbers in nested dicts and lists, with their paths: ("results.0.ms_per_step", 12.5)."""
    items = enumerate(tree) if isinstance(tree, list) else ()
    for key, value in tree.items() if isinstance(tree, dict) else items:
        name = f"{path}.{key}" if path else str(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield name, float(value)
        yield from leaves(value, name)


def run_once(folder: Path, config: CompareConfig) -> dict[str, float]:
    """Run the benchmark in a checkout; the numbers that are compared."""
    # Large pages for both: a checkout may ask for them at another place.
    environment = {"THP_MEM_ALLOC_ENABLE": "1", **os.environ}
    command = [sys.executable, "-m", config.module, *config.arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        error = done.stderr.strip().splitlines() or ["nothing was printed"]
        raise InputError(f"{config.module} in {folder} failed: {error[-1]}")
    last = lines[-1]
    try:
        tree = json.loads(last if last.startswith("{") else Path(folder, last).read_text())
    except (OSError, ValueError):
        raise InputError(
            f"{config.module} in {folder}: last line is no JSON: {last[:80]}"
        ) from None
    wanted = config.numbers
    return {name: value for name, value in leaves(tree) if name.rsplit(".", 1)[-1] in wanted}


def compare(config: CompareConfig) -> dict[str, dict[str, float]]:
    """For each number: the medians of both checkouts, and the three ratios."""
    folders = Path.cwd(), config.checkout
    runs: tuple[list[dict[str, float]], ...] = ([], [])
    for pair in range(config.pairs):
        for which in (0, 1) if pair % 2 else (1, 0):
            runs[which].append(run_once(folders[which], config))
        print(f"pair {pair + 1} of {config.pairs}", flush=True)
    table = {}
    for name in runs[0][0]:
        if name not in runs[1][0]:
            continue
        ours, theirs = ([run[name] for run in which] for which in runs)
        table[name] = {
            "this": statistics.median(ours),
            "other": statistics.median(theirs),
            "least_ratio": min(ours) / min(theirs),
            "greatest_ratio": max(ours) / max(theirs),
            "median_ratio": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
        }
    return table


def main() -> None:
    """Entry point."""
    table = compare(parse_config(CompareConfig))
    for name, numbers in table.items():
        print(f"{name:<36}" + "   ".join(f"{key} {value:.4g}" for key, value in numbers.items()))
    print(json.dumps(table))


if __name__ == "__main__":
    run_command(main)
