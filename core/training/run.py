"""A training run's folder: its config, metrics.jsonl, curves, sample grids, progress, trackers."""

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from core.config import InputError, config_text, save_config
from core.data.images import save_png
from core.distributed.hardware import peak_flops, peak_memory_bytes
from core.distributed.world import World
from core.files import atomic_write, fingerprint, write_text

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReportConfig:
    """How often a run reports and saves, in optimizer steps, and where to.

    Args:
        report_every: Metrics are read from the device and written; the only host sync of the loop.
        sample_every: Pictures and curves are drawn, and the validation is run; 0 for never.
        save_every: A checkpoint is written; there is always one at the end.
        keep_last: Checkpoints to keep.
        profile_every: One step in so many is profiled for the share of collectives; 0 for none.
        keep_every: Checkpoints whose step is a multiple of this are kept for good; 0 for none.
        trackers: Also send the metrics to wandb (WANDB_MODE=offline works) or tensorboard.
        project: The project's name for wandb.
    """

    report_every: int = 100
    sample_every: int = 5000
    save_every: int = 5000
    keep_last: int = 2
    keep_every: int = 0
    profile_every: int = 1000
    trackers: tuple[Literal["wandb", "tensorboard"], ...] = ()
    project: str = "llamagen"

    def __post_init__(self) -> None:
        if min(self.report_every, self.save_every, self.keep_last) < 1:
            raise ValueError("report: report_every, save_every and keep_last must be >= 1")
        if min(self.sample_every, self.keep_every, self.profile_every) < 0:
            raise ValueError("report: sample_every, keep_every and profile_every must be >= 0")

    def reports(self, step: int, num_steps: int) -> bool:
        """Whether to report after `step` steps."""
        return step % self.report_every == 0 or step == num_steps

    def samples(self, step: int, num_steps: int) -> bool:
        """Whether to draw and validate after `step` steps."""
        return self.sample_every > 0 and (step % self.sample_every == 0 or step == num_steps)

    def saves(self, step: int, num_steps: int) -> bool:
        """Whether to save after `step` steps."""
        return step % self.save_every == 0 or step == num_steps


class Run:
    """What a training loop reports to. Only rank 0 writes; the other ranks' calls do nothing."""

    def __init__(self, folder: Path, config: Any, report: ReportConfig, world: World) -> None:  # noqa: ANN401
        self.folder, self.config, self.report, self.world = Path(folder), config, report, world
        self.trackers: list[Any] = []

    def start(self, first_step: int, num_steps: int, unit: str, flops: float = 0.0) -> None:
        """Begin or continue at `first_step`; `unit` is what `progress` counts, e.g. "token".

        flops: of training on one unit; with it, the model FLOPs utilisation (MFU) is reported on
        devices whose peak is known.
        """
        self.unit, self.flops = unit, flops
        self.units_since, self.waited, self.last_time = 0, 0.0, time.monotonic()
        self.profile: CollectiveShare | None = None
        self.measured: dict[str, float] = {}
        self.bar = tqdm(
            total=num_steps,
            initial=first_step,
            desc=self.folder.name,
            unit="step",
            mininterval=1.0,
            disable=not self.world.is_main,
        )
        if not self.world.is_main:
            return
        self._save_config(resuming=first_step > 0)
        self._drop_metrics_after(first_step)
        for tracker in self.report.trackers:
            self.trackers.append(_open_tracker(tracker, self.folder, self.config, self.report))
        if first_step:
            logger.warning("%s: continuing at step %d of %d", self.folder, first_step, num_steps)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what waits for data; its share of the time is reported."""
        started = time.monotonic()
        yield
        self.waited += time.monotonic() - started

    def begin_step(self, step: int) -> None:
        """Step number `step` begins; now and then it is profiled."""
        every = self.report.profile_every
        if self.world.size > 1 and every and step % every == min(10, every - 1):
            self.profile = CollectiveShare(self.world)

    def progress(self, units: int) -> None:
        """One more optimizer step, over `units` tokens or images on all ranks together."""
        self.units_since += units
        self.bar.update()
        if self.profile:
            self.measured["communication_share"] = self.profile.finish()
            self.profile = None

    def log(self, step: int, metrics: Mapping[str, float | torch.Tensor]) -> None:
        """Write metrics after `step` steps, with the rate since the last report (a host sync)."""
        numbers = {name: float(value) for name, value in metrics.items()}
        if self.units_since:
            elapsed = time.monotonic() - self.last_time
            rate = self.units_since / elapsed
            numbers[f"{self.unit}s_per_second"] = round(rate, 2)
            if self.flops and (peak := peak_flops(self.world.device)):
                numbers["mfu"] = rate * self.flops / (peak * self.world.size)
            numbers["data_wait_share"] = self.waited / elapsed
            numbers["memory_gib"] = peak_memory_bytes(self.world.device) / 2**30
            numbers |= self.measured
            self.units_since, self.waited, self.last_time = 0, 0.0, time.monotonic()
        if not self.world.is_main:
            return
        hidden = ("lr", "data_wait_share", "memory_gib", "communication_share")
        shown = {k: f"{v:.4g}" for k, v in numbers.items() if k not in hidden}
        self.bar.set_postfix(shown)
        # JSON has no NaN: null keeps the file readable everywhere.
        line = {k: v if np.isfinite(v) else None for k, v in numbers.items()}
        try:
            with self._metrics.open("a") as file:
                file.write(json.dumps({"step": step, **line}) + "\n")
        except OSError as error:  # a full disk; the training is worth more than its report
            logger.warning("step %d is not reported: %s", step, error)
        for tracker in self.trackers:
            tracker(step, numbers)

    def draw(self, step: int, pixels: np.ndarray) -> None:
        """Save a grid (height, width, 3) uint8 as `samples/step_0001000.png`, and the curves."""
        if not self.world.is_main:
            return
        folder = self.folder / "samples"
        try:
            folder.mkdir(exist_ok=True)
            save_png(pixels, folder / f"step_{step:07d}.png")
            draw_curves(self._metrics, self.folder / "curves.png")
        except OSError as error:
            logger.warning("the samples of step %d are not drawn: %s", step, error)

    def finish(self) -> None:
        """Close the bar and say where everything is."""
        self.bar.close()
        if self.world.is_main:
            if self._metrics.exists():
                draw_curves(self._metrics, self.folder / "curves.png")
            print(f"{self.folder}: checkpoints/, metrics.jsonl, curves.png, samples/")

    @property
    def _metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    def _save_config(self, resuming: bool) -> None:
        path = self.folder / "config.yaml"
        if resuming and path.exists() and path.read_text() != config_text(self.config):
            before, now = path.read_text().splitlines(), config_text(self.config).splitlines()
            changed = [line.strip() for line in now if line not in before]
            logger.warning("%s: resuming with other settings: %s", path, "; ".join(changed))
        save_config(self.config, path)

    def _drop_metrics_after(self, step: int) -> None:
        """A killed run may have reported steps that are computed again."""
        if not self._metrics.exists():
            return
        kept = []
        for line in self._metrics.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (json.JSONDecodeError, KeyError):
                continue  # half a line, from a kill while writing
        write_text(self._metrics, "".join(kept))


class CollectiveShare:
    """Profiles one step: how much of its time collectives take, whether hidden or waited for."""

    def __init__(self, world: World) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if world.device.type == "cuda":
            activities = [torch.profiler.ProfilerActivity.CUDA]
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its notes are not for our users
        self.profiler = torch.profiler.profile(activities=activities)
        self.profiler.start()
        self.started = time.monotonic()

    def finish(self) -> float:
        """The share, in 0 .. 1 where collectives run one at a time."""
        self.profiler.stop()  # waits for the device
        elapsed = time.monotonic() - self.started
        events = self.profiler.events() or []
        spent = sum(
            e.time_range.elapsed_us() for e in events if e.name.startswith(("nccl", "gloo"))
        )
        return spent / 1e6 / elapsed


def begin_run(folder: Path, world: World) -> None:
    """Make the run's folder; one line instead of a traceback where that cannot be."""
    if world.is_main:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder}: is a file, expected the run's folder")
        folder.mkdir(parents=True, exist_ok=True)
    world.barrier()


def draw_curves(metrics: Path, path: Path) -> None:
    """Plot every metric of a metrics.jsonl against the step, one panel each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    series: dict[str, list[tuple[int, float]]] = {}
    for line in metrics.read_text().splitlines():
        record = json.loads(line)
        step = record.pop("step")
        for name, value in record.items():
            if value is not None:
                series.setdefault(name, []).append((step, value))
    if not series:
        return
    columns = min(3, len(series))
    rows = -(-len(series) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(5 * columns, 3 * rows), squeeze=False)
    for axis in axes.flat[len(series) :]:
        axis.remove()
    for axis, (name, points) in zip(axes.flat, series.items(), strict=False):
        axis.plot(*zip(*points, strict=True), linewidth=1.2)
        axis.set(title=name, xlabel="step")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=100)
    pyplot.close(figure)


def _open_tracker(name: str, folder: Path, config: Any, report: ReportConfig) -> Any:  # noqa: ANN401
    """A function (step, numbers) that forwards metrics."""
    if name == "wandb":
        import wandb

        run = wandb.init(
            project=report.project,
            name=folder.name,
            dir=folder,
            id=fingerprint(str(folder.resolve())),  # the same folder continues the same run
            resume="allow",
            config={"yaml": config_text(config)},
        )
        return lambda step, numbers: run.log(numbers, step=step)
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def send(step: int, numbers: dict[str, float]) -> None:
        for key, value in numbers.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return send
