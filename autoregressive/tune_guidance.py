"""Search for the guidance that gives the best score: every schedule, on the same 10,000 images.

    python -m autoregressive.tune_guidance --gpt runs/gpt_b --tokenizer weights/vq16 \
        --judge.reference VIRTUAL_imagenet256_labeled.npz --out searches/gpt_b \
        --scales [1.5,2.0,2.5] --schedules [constant,cosine] --powers [1.0,2.75]

Writes search.csv, search.json and search.png, and prints the flags of the best. What has been
scored is not scored again. Distances at 10,000 samples compare settings; papers print 50,000.
"""

import dataclasses
import itertools
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from autoregressive.conditions import ConditionConfig, open_conditions
from autoregressive.inference.sampling_config import SamplingConfig
from autoregressive.pipeline import PipelineConfig, load_pair, make_ready
from autoregressive.sample import score_samples
from core.config import InputError, parse_config, run_command, save_config
from core.distributed.world import World, distributed
from core.files import read_json, write_json
from evaluations.features.extractors import note_of
from evaluations.report import plot_trade, write_csv
from evaluations.scorer import MetricsConfig, check_size, open_scorer


@dataclass(frozen=True, kw_only=True)
class TuneConfig(PipelineConfig, ConditionConfig):
    """Which settings to try, each with each.

    Args:
        out: The folder to write to.
        num_images: Images to score a setting by.
        judge: The reference, and how to compare with it.
        sampling: What all settings share.
        scales: Values of sampling.cfg_scale.
        schedules: Values of sampling.cfg_schedule.
        powers: Values of sampling.cfg_power, for schedules that have one.
        starts: Values of sampling.cfg_start.
        intervals: Values of sampling.cfg_interval.
    """

    out: Path
    num_images: int = 10_000
    judge: MetricsConfig = field(default_factory=MetricsConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    scales: tuple[float, ...] = (1.5, 1.75, 2.0, 2.25, 2.5)
    schedules: tuple[Literal["constant", "linear", "cosine"], ...] = ("constant",)
    powers: tuple[float, ...] = (1.0,)
    starts: tuple[int, ...] = (0,)
    intervals: tuple[int, ...] = (-1,)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.candidates()

    def candidates(self) -> list[SamplingConfig]:
        """Every setting, once; raises ValueError for one that there is not."""
        axes = self.schedules, self.powers, self.starts, self.intervals, self.scales
        found = {}
        for schedule, power, start, interval, scale in itertools.product(*axes):
            candidate = dataclasses.replace(
                self.sampling,
                cfg_scale=scale,
                cfg_schedule=schedule,
                cfg_power=1.0 if schedule == "constant" else power,
                cfg_start=start,
                cfg_interval=interval,
            )
            found[candidate] = None
        if not found:
            raise ValueError("scales, schedules, powers, starts, intervals: give one or more each")
        return list(found)


def tune_guidance(config: TuneConfig, world: World) -> None:
    """Score every candidate that has not been, then write the table, the plot and the best."""
    pair = load_pair(config)
    gpt = pair.gpt.config
    shown = open_conditions(config, gpt, config.sampling.seed, world)
    judge = open_scorer(config.judge, "generation", world)
    height, width = (pair.vq.config.downsample * side for side in gpt.grid)
    check_size((height, width), Path(config.gpt), judge.reference)
    settings = {**pair.settings, **shown.settings, "images": shown.count}
    settings |= {"reference": judge.reference.sha256, "distance": judge.distance}
    path = config.out / "search.json"
    rows = world.broadcast(_resume(path, settings) if world.is_main else None)
    candidates = [
        candidate.resolved(gpt.condition, gpt.guidance_input) for candidate in config.candidates()
    ]
    todo = [c for c in candidates if not any(asdict(c).items() <= row.items() for row in rows)]
    if world.is_main:
        config.out.mkdir(parents=True, exist_ok=True)
        save_config(config, config.out / "config.yaml")
    batches = math.ceil(shown.count / judge.batch_size / world.size) * len(todo)
    decoder, vq = make_ready(config, pair, batches, world)
    for sampling in tqdm(todo, unit="setting", disable=not world.is_main):
        scores = score_samples(
            decoder,
            vq,
            lambda ids: shown.batch(torch.from_numpy(ids)),
            shown.count,
            sampling,
            judge,
            world,
        )
        name = f"{sampling.cfg_schedule} {sampling.cfg_power:g} {sampling.cfg_scale:g}"
        rows.append({"run": name, **asdict(sampling), **scores})
        if world.is_main:
            note = note_of(judge.detector)
            write_json(path, {"settings": settings, "note": note, "rows": rows})
    if not world.is_main:
        return
    write_csv(rows, config.out / "search.csv")
    wanted = ("inception_score", "recall")
    x = next((name for end in wanted for name in rows[0] if name.endswith(end)), "cfg_scale")
    plot_trade(rows, x, judge.distance, note_of(judge.detector), config.out / "search.png")
    best = min(rows, key=lambda row: row[judge.distance])
    changed = {k: v for k, v in best.items() if v != getattr(SamplingConfig(), k, v)}
    flags = " ".join(f"--sampling.{name} {value}" for name, value in changed.items())
    print(f"best {judge.distance} {best[judge.distance]:.4f} ({shown.count} images): {flags}")
    print(config.out / "search.png")


def _resume(path: Path, settings: dict) -> list[dict]:
    """What an earlier search under the same settings has scored."""
    if not path.exists():
        return []
    found = read_json(path)
    if found["settings"] != json.loads(json.dumps(settings)):
        raise InputError(f"{path}: of other models, images or reference; choose another folder")
    return found["rows"]


def main() -> None:
    """Entry point."""
    config = parse_config(TuneConfig)
    with distributed(config.device) as world:
        tune_guidance(config, world)


if __name__ == "__main__":
    run_command(main)
