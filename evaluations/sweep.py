"""Score several sample runs against one reference: guidance, top-k, top-p, temperature.

Sample the runs with autoregressive.sample (scripts/evaluations/sweep.sh does both), then

python -m evaluations.sweep --runs '[samples/cfg_1.5,samples/cfg_2.0]' \
    --reference VIRTUAL_imagenet256_labeled.npz --out scores/sweep
"""

from dataclasses import dataclass
from pathlib import Path

from core.config import config_values, parse_config, run_command
from core.data.shards import read_index
from core.distributed.world import World, distributed
from core.files import write_json
from evaluations.features.extractors import note_of
from evaluations.report import write_comparison
from evaluations.score import ScoreConfig, ScoringConfig, evaluate
from evaluations.scorer import open_scorer


@dataclass(frozen=True, kw_only=True)
class SweepConfig(ScoringConfig):
    """Which runs, in the order of the swept setting.

    Args:
        runs: Folders of autoregressive.sample; their settings are read from index.json.
    """

    runs: tuple[Path, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if len({run.name for run in self.runs}) != len(self.runs) or not self.runs:
            raise ValueError("runs: give one or more folders with different names")


def sweep(config: SweepConfig, world: World) -> None:
    """Score every run; write sweep.csv, sweep.json and sweep.png (distance against variety)."""
    judge = open_scorer(config, config.kind, world)
    shared = {k: v for k, v in vars(config).items() if k not in ("runs", "out")}
    settings = [read_index(run).get("sampling", {}) for run in config.runs]
    rows = []
    for run, sampling in zip(config.runs, settings, strict=True):
        one = ScoreConfig(samples=run, out=config.out / run.name, **shared)
        rows.append({"run": run.name, **sampling, **evaluate(judge, one, world)})
    if not world.is_main:
        return
    note = note_of(judge.detector)
    write_json(
        config.out / "sweep.json", {"note": note, "rows": rows, "settings": config_values(config)}
    )
    print(write_comparison(rows, judge.distance, judge.distance, note, config.out, "sweep"))


def main() -> None:
    """Entry point."""
    config = parse_config(SweepConfig)
    with distributed(config.device) as world:
        sweep(config, world)


if __name__ == "__main__":
    run_command(main)
