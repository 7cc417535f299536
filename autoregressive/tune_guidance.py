r"""Find the guidance with the best score: every schedule is scored on the same 10,000 images.

    python -m autoregressive.tune_guidance --gpt runs/gpt_b --tokenizer weights/vq16 \
        --metrics.reference VIRTUAL_imagenet256_labeled.npz --out searches/gpt_b \
        --scales 1.5 2.0 2.5 --schedules constant cosine --powers 1.0 2.75

Writes search.csv, search.json and search.png, and prints the flags of the best setting. Run it
again with more values: settings that were scored before are not scored again. Distances at 10,000
samples are for comparing settings; published ones use 50,000.
"""

import dataclasses
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from autoregressive.inference.sampling_config import SamplingConfig
from autoregressive.sampling.config import ConditionConfig, PipelineConfig
from core.config import InputError, parse_config, parse_first, run_command, save_config
from evaluations.metrics.config import MetricsConfig

MAX_SETTINGS = 10_000  # each of which samples num_images images


@dataclass(frozen=True, kw_only=True)
class TuneConfig(PipelineConfig):
    """Settings of autoregressive.tune_guidance; all combinations of the five lists are scored.

    Args:
        out: Output folder.
        num_images: Images per setting.
        conditions: The classes or prompts, the same for every setting.
        metrics: The reference, and how to compare with it.
        sampling: What all settings have in common.
        scales: Values of sampling.cfg_scale.
        schedules: Values of sampling.cfg_schedule.
        powers: Values of sampling.cfg_power, for the schedules that have one.
        starts: Values of sampling.cfg_start.
        intervals: Values of sampling.cfg_interval; null guides all codes.
    """

    out: Path
    num_images: int = 10_000
    conditions: ConditionConfig = field(default_factory=ConditionConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    scales: tuple[float, ...] = (1.5, 1.75, 2.0, 2.25, 2.5)
    schedules: tuple[Literal["constant", "linear", "cosine"], ...] = ("constant",)
    powers: tuple[float, ...] = (1.0,)
    starts: tuple[int, ...] = (0,)
    intervals: tuple[int | None, ...] = (None,)

    def __post_init__(self) -> None:
        if self.num_images < 2:
            raise ValueError("num_images must be >= 2")
        self.candidates()

    def candidates(self) -> list[SamplingConfig]:
        """Every combination, once; raises ValueError for an invalid one."""
        axes = self.schedules, self.powers, self.starts, self.intervals, self.scales
        if math.prod(map(len, axes)) > MAX_SETTINGS:
            raise ValueError(
                f"scales, schedules, powers, starts, intervals: {math.prod(map(len, axes)):,} "
                f"combinations, at most {MAX_SETTINGS:,}"
            )
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
            raise ValueError(
                "scales, schedules, powers, starts, intervals: each needs at least one value"
            )
        return list(found)


parse_first(TuneConfig, __name__)

import json
import math
from dataclasses import asdict
from typing import Any

from tqdm import tqdm

from autoregressive.sampling.conditions import open_conditions
from autoregressive.sampling.loop import score_samples
from autoregressive.sampling.pipeline import load_pipeline, prepare_pipeline
from core.distributed.world import World, distributed
from core.files import read_record, write_json
from core.lock import writer_lock
from evaluations.features.extractors import note_of
from evaluations.report import write_comparison
from evaluations.scorer import check_size, open_scorer


def tune_guidance(config: TuneConfig, world: World) -> None:
    """Score the candidates that have no score yet, then write the table, the plot and the best."""
    pipeline = load_pipeline(config)
    gpt = pipeline.gpt.config
    for candidate in config.candidates():
        candidate.check_grid(gpt.num_codes)
    conditions = open_conditions(
        config.conditions, config.num_images, gpt, config.sampling.seed, world
    )
    scorer = open_scorer(config.metrics, "generation", world)
    check_size(pipeline.image_size, Path(config.gpt), scorer.reference)
    settings = {**pipeline.settings, **config.compute.settings, **conditions.settings}
    settings |= {"images": conditions.count, "distance": scorer.distance}
    settings |= {"reference": scorer.reference.sha256}
    path = config.out / "search.json"
    earlier = _resume(path, settings, scorer.distance) if world.is_main else None
    rows = world.broadcast(earlier)
    candidates = [
        candidate.resolved(gpt.condition, gpt.guidance_input) for candidate in config.candidates()
    ]
    done = lambda settings: any(settings.items() <= row.items() for row in rows)  # noqa: E731
    todo = [c for c in candidates if not done(c.settings(gpt.condition, gpt.guidance_input))]
    if world.is_main:
        config.out.mkdir(parents=True, exist_ok=True)
        save_config(config, config.out / "config.yaml")
    batches = math.ceil(conditions.count / scorer.batch_size / world.size) * len(todo)
    prepare_pipeline(config, pipeline, batches, world)
    note = note_of(scorer.extractor)
    for sampling in tqdm(todo, unit="setting", disable=not world.is_main):
        scores = score_samples(
            pipeline,
            conditions.__getitem__,
            conditions.count,
            sampling,
            scorer,
            world,
            conditions.negative,
        )
        name = f"{sampling.cfg_schedule} {sampling.cfg_power:g} {sampling.cfg_scale:g}"
        rows.append({"run": name, **sampling.settings(gpt.condition, gpt.guidance_input), **scores})
        if world.is_main:
            write_json(path, {"settings": settings, "note": note, "rows": rows})
    if not world.is_main:
        return
    plot = write_comparison(rows, scorer.distance, "cfg_scale", note, config.out, "search")
    print_best(rows, scorer.distance, conditions.count)
    print(plot)


def print_best(rows: list[dict[str, Any]], distance: str, count: int) -> None:
    """Print the best setting as flags of autoregressive.sample."""
    best = min(rows, key=lambda row: row[distance])
    usual = {**asdict(SamplingConfig()), "cfg_interval": -1}  # -1: as in the rows
    changed = {name: best[name] for name in usual if best.get(name, usual[name]) != usual[name]}
    flags = " ".join(f"--sampling.{name} {value}" for name, value in changed.items())
    print(f"best {distance} {best[distance]:.4f} ({count} images): {flags}")


def _resume(path: Path, settings: dict[str, Any], distance: str) -> list[dict[str, Any]]:
    """The rows of an earlier search with the same settings, each with its distance."""
    if not path.exists():
        return []
    found = read_record(path, {"settings": dict, "rows": list[dict]})
    if found["settings"] != json.loads(json.dumps(settings)):
        raise InputError(
            f"{path}: made with other models, images or reference; choose another folder"
        )
    if not all(isinstance(row.get(distance), float) for row in found["rows"]):
        raise InputError(f"{path}: a row has no {distance}; remove the file to score again")
    return found["rows"]


def main() -> None:
    """Entry point."""
    config = parse_config(TuneConfig)
    with distributed(config.compute.device) as world, writer_lock(config.out, world):
        tune_guidance(config, world)


if __name__ == "__main__":
    run_command(main)
