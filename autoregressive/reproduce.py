"""Reproduce a published score: download, sample or reconstruct, score, and write a report.

    python -m autoregressive.reproduce --list true
    python -m autoregressive.reproduce --name llamagen_l_384 --out reproductions/l_384
    python -m autoregressive.reproduce --name llamagen_l_384 --num_images 1000 --out tries/l_384
    python -m autoregressive.reproduce --name llamagen_vq16 --data imagenet/val --out tries/vq16
    torchrun --nproc-per-node 8 -m autoregressive.reproduce ...

Run it again to continue after a stop, whatever it was doing.
"""

import dataclasses
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from autoregressive.inference.compute import ComputeConfig
from autoregressive.inference.sampling_config import SamplingConfig
from autoregressive.sampling.run import SampleRunConfig, sample
from core.config import InputError, config_values, parse_config, run_command, save_config
from core.data.images import INTERPOLATION
from core.data.loader import check_num_workers
from core.data.shards import codes_dtype
from core.distributed.hardware import device_name
from core.distributed.provenance import now, versions
from core.distributed.world import World, distributed
from core.download import Download, check_plan, fetch_web, web_size
from core.files import file_sha256, read_record, write_json, write_text
from core.hub import cache_folder, download_size, fetch
from core.lock import writer_lock
from core.released import (
    PublishedScores,
    ReleasedModel,
    find_released,
    released_models,
    released_table,
    unpinned_text,
)
from core.weights import hub_file
from evaluations.features.inception import inception_file
from evaluations.metrics.comparison import (
    ComparedScore,
    compare,
    comparison_table,
    is_distance,
    overall,
)
from evaluations.reference_stats import reference_file
from evaluations.scorer import MetricsConfig
from tokenizer.models.config import VQConfig
from tokenizer.reconstruction import ReconstructionConfig, reconstruct


@dataclass(frozen=True, kw_only=True)
class ReproduceConfig:
    """Settings of autoregressive.reproduce.

    Args:
        name: A released model; see --list.
        out: Output folder: report.md, report.json, and the samples or reconstructions.
        list: Print the released models that have published scores, and stop.
        num_images: Images to sample with a GPT; null for the published number. With fewer, the
            report says that it is a smoke run and gives no verdict.
        image_size: Which published row, by the side of its images; null for the first.
        data: For a tokenizer: the validation images that the scores are published on.
        metrics: The feature extractor, and a reference of one's own; without one, the published
            reference is downloaded.
        compute: Device and precision.
        batch_size: Images per batch on each process; does not change any image.
        num_workers: Loader processes per rank, for `data`.
        sigmas: A score passes within this many standard errors of the difference.
    """

    name: str | None = None
    out: Path | None = None
    list: bool = False
    num_images: int | None = None
    image_size: int | None = None
    data: Path | None = None
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    batch_size: int = 32
    num_workers: int = 8
    sigmas: float = 3.0

    def __post_init__(self) -> None:
        if self.num_images is not None and self.num_images < 1:
            raise ValueError("num_images must be >= 1, or null")
        check_num_workers(self.num_workers)
        if self.batch_size < 1 or self.sigmas <= 0:
            raise ValueError("batch_size must be >= 1, sigmas > 0")


class Target(NamedTuple):
    """A released model, the published row to reproduce, and the stage's configuration."""

    model: ReleasedModel
    published: PublishedScores
    stage: SampleRunConfig | ReconstructionConfig

    @property
    def command(self) -> str:
        """The command that runs the stage alone."""
        is_gpt = isinstance(self.stage, SampleRunConfig)
        name = "autoregressive.sample" if is_gpt else "tokenizer.reconstruct"
        return f"{name} --config {self.stage.out / 'config.yaml'}"


def reproduce(config: ReproduceConfig, world: World) -> None:
    """Download, sample or reconstruct, score and report; what is done already is not repeated."""
    if config.name is None or config.out is None:
        raise InputError("give --name and --out, or --list true")
    out = config.out
    published = find_published(config)
    downloads = plan_downloads(config, *published)
    check_plan(downloads, show=world.is_main)
    world.barrier()  # no rank downloads while another still counts free space
    progress = Progress(out, world)
    started = time.monotonic()
    paths = {item.what: item.fetch() for item in downloads if item.fetch}
    progress.finish("download", time.monotonic() - started)
    target = Target(*published, stage_config(config, *published))
    if world.is_main:
        target.stage.out.mkdir(parents=True, exist_ok=True)
        save_config(config, out / "config.yaml")
        save_config(target.stage, target.stage.out / "config.yaml")
    done = world.broadcast(is_scored(target) if world.is_main else None)
    if not done:
        started = time.monotonic()
        if isinstance(target.stage, SampleRunConfig):
            sample(target.stage, world)
        else:
            reconstruct(target.stage, world)
        progress.finish("sample and score", time.monotonic() - started)
    if world.is_main:
        write_report(config, target, paths, progress, world)


def find_published(config: ReproduceConfig) -> tuple[ReleasedModel, PublishedScores]:
    """The model and the published row; raises InputError if there is none."""
    model = find_released(config.name)
    if model is None:
        raise InputError(f"{config.name}: no released model of this name; see --list true")
    sizes = [score.image_size for score in model.scores]
    rows = [s for s in model.scores if config.image_size in (None, s.image_size)]
    if not rows:
        raise InputError(
            f"{model.name}: no published score"
            + (f" at {config.image_size} px, only at {sizes}" if sizes else " to reproduce")
        )
    if model.kind == "tokenizer" and (config.data is None or config.num_images is not None):
        raise InputError(
            f"{model.name}: a tokenizer is scored on all images of --data, the validation images "
            f"({rows[0].reference or 'which, the source does not state'}); num_images is for a GPT"
        )
    if model.kind == "gpt" and model.tokenizer is None:
        raise InputError(f"{model.name}: the table does not name its tokenizer")
    return model, rows[0]


def plan_downloads(
    config: ReproduceConfig, model: ReleasedModel, published: PublishedScores
) -> list[Download]:
    """Every file that is needed, with its size; nothing is downloaded yet.

    Raises InputError, naming it, for a file that is not published or cannot be reached.
    """
    models = [model, find_released(model.tokenizer)] if model.tokenizer else [model]
    plan = []
    for part in filter(None, models):
        file = hub_file(part)
        size = download_size(file)
        plan.append(Download(str(file), size, cache_folder(), partial(fetch, file)))
    needed = []
    if config.metrics.extractor == "inception" and config.metrics.inception_weights is None:
        needed.append(inception_file())
    if model.kind == "gpt" and config.metrics.reference is None:
        reference = reference_file(published.reference or "")
        if reference is None:
            raise InputError(
                f"{model.name}: its reference ({published.reference or 'which its source omits'}) "
                "cannot be downloaded; give --metrics.reference"
            )
        needed.append(reference)
    for file in needed:
        get = partial(fetch_web, file)
        plan.append(Download(file.path.name, web_size(file), file.path.parent, get))
    if config.out and model.grid:
        rows, columns = model.grid
        count = config.num_images or published.num_images
        code = codes_dtype(model.architecture.get("vocab_size", 16384)).itemsize
        size = count * rows * columns * code
        plan.append(Download("the samples' codes", size, config.out, None))
    return plan


def stage_config(
    config: ReproduceConfig, model: ReleasedModel, published: PublishedScores
) -> SampleRunConfig | ReconstructionConfig:
    """How the model is sampled (a GPT) or reconstructs (a tokenizer), as published."""
    out, size = Path(str(config.out)), published.image_size
    if model.kind == "tokenizer":
        return ReconstructionConfig(
            tokenizer=model.name,
            data=Path(str(config.data)),
            out=out / "reconstructions",
            image_size=(size, size),
            rfid=True,
            metrics=config.metrics,
            batch_size=config.batch_size,
            num_workers=config.num_workers,
            device=config.compute.device,
        )
    metrics = config.metrics
    if metrics.reference is None:
        file = reference_file(published.reference or "")
        metrics = dataclasses.replace(metrics, reference=file.path if file else None)
    return SampleRunConfig(
        gpt=model.name,
        tokenizer=str(model.tokenizer),
        out=out / "samples",
        num_images=config.num_images or published.num_images,
        compute=config.compute,
        sampling=SamplingConfig(**model.sampling),
        metrics=metrics,
        resize=None if native_size(model) == size else size,
        batch_size=config.batch_size,
        npz=False,
    )


class Progress:
    """When the command was started, and the seconds of each finished step, in progress.json."""

    def __init__(self, out: Path, world: World) -> None:
        self.path, self.world = out / "progress.json", world
        stored: dict[str, Any] = {"starts": [], "seconds": {}}
        if self.path.is_file():
            stored = read_record(self.path, {"starts": list[str], "seconds": dict})
        self.starts: list[str] = [*stored["starts"], now()]
        self.seconds: dict[str, float] = stored["seconds"]
        self._write()

    def finish(self, step: str, seconds: float) -> None:
        """Note a finished step; one that an earlier start finished keeps its time."""
        self.seconds.setdefault(step, round(seconds, 1))
        self._write()

    def _write(self) -> None:
        if self.world.is_main:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, {"starts": self.starts, "seconds": self.seconds})


def is_scored(target: Target) -> bool:
    """Whether scores.json is there and is of these settings."""
    path = target.stage.out / "scores.json"
    if not path.is_file():
        return False
    return read_record(path, {"settings": dict})["settings"] == config_values(target.stage)


def differences(target: Target, scores: dict[str, Any]) -> list[str]:
    """Why the scores may not be compared with the published row; empty if they may."""
    published, found = target.published, []
    if scores["n"] != published.num_images:
        found.append(
            f"smoke run: {scores['n']} images, published with {published.num_images}"
            if scores["n"] < published.num_images
            else f"{scores['n']} images, published with {published.num_images}"
        )
    distance = next((name for name in published.metrics if is_distance(name)), None)
    if distance and distance not in scores:
        ours = next((name for name in scores if is_distance(name)), "no distance")
        found.append(f"{ours} was measured, {distance} is published")
    resized = interpolation(target)
    if resized and published.interpolation != resized:
        there = published.interpolation or "an interpolation that the source does not state"
        found.append(
            f"images resized by {resized}, published with {there}{MOVES[target.model.kind]}"
        )
    if isinstance(target.stage, SampleRunConfig):
        ours = scores.get("reference")
        if published.reference not in (None, ours):
            found.append(f"compared with {ours}, published with {published.reference}")
    elif target.stage.metrics.reference:
        found.append("compared with a reference file, published with the originals")
    return found


# What is known about the effect of the interpolation alone.
MOVES = {"tokenizer": ": this alone moves rFID by about 0.2", "gpt": ""}


def interpolation(target: Target) -> str | None:
    """How the compared images are resized, as the table says it; None where they are not."""
    if not isinstance(target.stage, SampleRunConfig):
        return INTERPOLATION
    if target.stage.resize is None:
        return None
    return f"{native_size(target.model)} to {target.stage.resize} bicubic, no antialiasing"


def native_size(model: ReleasedModel) -> int:
    """Side in pixels of what a GPT samples; 0 if the table does not tell."""
    tokenizer = find_released(model.tokenizer)
    if tokenizer is None or model.grid is None:
        return 0
    return VQConfig(**tokenizer.architecture).downsample * model.grid[0]


def write_report(
    config: ReproduceConfig,
    target: Target,
    paths: dict[str, Path],
    progress: Progress,
    world: World,
) -> None:
    """Write report.json and report.md, and print the table."""
    out, scores = Path(str(config.out)), read_record(target.stage.out / "scores.json", {"n": int})
    models = target.model, find_released(target.model.tokenizer)
    numbers = {name: value for name, value in scores.items() if isinstance(value, float)}
    reasons = differences(target, scores)
    rows = compare(numbers, target.published.metrics, config.sigmas, not reasons)
    launcher = "python" if world.size == 1 else f"torchrun --nproc-per-node {world.size}"
    again = f"autoregressive.reproduce --config {out / 'config.yaml'}"
    report = {
        "name": target.model.name,
        "verdict": overall(rows),
        "not_compared_because": reasons,
        "scores": [row._asdict() for row in rows],
        "published": dataclasses.asdict(target.published),
        "sampling": dict(target.model.sampling),
        "interpolation": interpolation(target),
        "precision": config_values(config.compute),
        "starts": progress.starts,
        "seconds": progress.seconds,
        "hardware": f"{world.size} x {device_name(world.device)}",
        "versions": {**versions(), "commit": scores.get("commit", "")},
        "files": {what: file_sha256(path) for what, path in paths.items()},
        "not_pinned": unpinned_text(filter(None, models)),
        "commands": [f"{launcher} -m {again}", f"{launcher} -m {target.command}"],
    }
    write_json(out / "report.json", report)
    write_text(out / "report.md", report_text(report, rows, config.sigmas))
    print(f"{comparison_table(rows)}\n{out / 'report.md'}\n{out / 'report.json'}")


def report_text(report: dict[str, Any], rows: list[ComparedScore], sigmas: float) -> str:
    """report.md."""
    published = report["published"]
    verdict = report["verdict"] or "no verdict: no score has an error bar"
    if report["not_compared_because"]:
        verdict = f"not compared: {'; '.join(report['not_compared_because'])}"
    named = ("image_size", "num_images", "reference", "interpolation", "source", "note")
    facts = {f"published {key}": published[key] for key in named if published[key]}
    facts |= {key: report[key] for key in ("sampling", "interpolation", "precision")}
    facts |= {key: report[key] for key in ("hardware", "versions", "starts", "seconds", "files")}
    lines = [f"- {key}: {value}" for key, value in facts.items() if value]
    commands = "\n".join(report["commands"])
    return f"""# Reproduction of {report["name"]}

**{verdict}**

{comparison_table(rows)}

± is the standard error of ours. A distance passes within {sigmas:g} standard errors of the
difference of two independent samples. Seconds are those of the start that finished a step.
{report["not_pinned"]}

{chr(10).join(lines)}

```sh
{commands}
```
"""


def print_list() -> None:
    """Print the released models that can be reproduced."""
    listed = [m for m in released_models().values() if m.scores and m.repository and m.file]
    print(released_table(listed), unpinned_text(listed), sep="\n\n")


def main() -> None:
    """Entry point."""
    config = parse_config(ReproduceConfig)
    if config.list:
        print_list()
        return
    folder, needed = config.out or Path(), config.out is not None
    with distributed(config.compute.device) as world, writer_lock(folder, world, needed):
        reproduce(config, world)


if __name__ == "__main__":
    run_command(main)
