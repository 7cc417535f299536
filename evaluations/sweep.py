r"""Score several sample runs against one reference: guidance, top-k, top-p, temperature.

Sample the runs with autoregressive.sample (scripts/evaluations/sweep.sh does both), then

python -m evaluations.sweep --runs samples/cfg_1.5 samples/cfg_2.0 \
    --metrics.reference VIRTUAL_imagenet256_labeled.npz --out scores/sweep
"""

from dataclasses import dataclass
from pathlib import Path

from core.config import config_values, parse_config, parse_first, run_command
from evaluations.metrics.config import ScoringConfig


@dataclass(frozen=True, kw_only=True)
class SweepConfig(ScoringConfig):
    """Which runs to score, and how.

    Args:
        runs: Folders of autoregressive.sample, in the order of the swept setting. Their settings
            are read from index.json.
        out: The folder for sweep.csv, sweep.json, sweep.png and a folder of scores per run.
    """

    runs: tuple[Path, ...]
    out: Path

    def __post_init__(self) -> None:
        super().__post_init__()
        if len({run.name for run in self.runs}) != len(self.runs) or not self.runs:
            raise ValueError("runs: give one or more folders with different names")


parse_first(SweepConfig, __name__)

from core.data.shards import read_index
from core.distributed.world import World, distributed
from core.files import write_json
from core.lock import writer_lock
from evaluations.features.extractors import note_of
from evaluations.image_source import open_image_source
from evaluations.report import score_source, write_comparison
from evaluations.scorer import open_scorer


def sweep(config: SweepConfig, world: World) -> None:
    """Score every run; write a table and a plot of distance against Inception Score or recall."""
    scorer = open_scorer(config.metrics, config.kind, world)
    settings = config_values(config)
    sampling = [read_index(run, {"sampling": dict})["sampling"] for run in config.runs]
    rows = []
    for run, swept in zip(config.runs, sampling, strict=True):
        images, out = open_image_source(run, config.image_size), config.out / run.name
        own = {**settings, "samples": str(run)}
        scores = score_source(scorer, images, out, own, config.num_workers, world)
        rows.append({"run": run.name, **swept, **scores})
    if not world.is_main:
        return
    note = note_of(scorer.extractor)
    write_json(config.out / "sweep.json", {"note": note, "rows": rows, "settings": settings})
    print(write_comparison(rows, scorer.distance, scorer.distance, note, config.out, "sweep"))


def main() -> None:
    """Entry point."""
    config = parse_config(SweepConfig)
    with distributed(config.device) as world, writer_lock(config.out, world):
        sweep(config, world)


if __name__ == "__main__":
    run_command(main)
