"""The reports of a training run in its folder.

config.yaml, run.json (what ran where), metrics.jsonl, curves.png, sample grids; and trackers.
"""

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from core.config import InputError, config_text, save_config
from core.data.images import save_png
from core.data.plots import save_plot, subplots
from core.distributed.hardware import peak_flops, peak_memory_bytes
from core.distributed.provenance import describe_start, now
from core.distributed.world import World
from core.errors import shorten
from core.files import read_json, write_json, write_text
from core.training.config import ReportConfig
from core.training.trackers import Tracker, open_tracker

logger = logging.getLogger(__name__)


STARTS = "run.json"  # one entry per start: commit, versions, command, host, devices, times

# Metrics that are written, but not shown on the progress bar, which has little room.
_NOT_ON_PROGRESS_BAR = ("lr", "data_wait_share", "memory_gib", "communication_share")


class Run:
    """Receives what a training loop reports. Only rank 0 writes; other ranks' calls do nothing."""

    def __init__(self, folder: Path, config: Any, report: ReportConfig, world: World) -> None:  # noqa: ANN401
        self.folder, self.config, self.report, self.world = Path(folder), config, report, world
        self.trackers: list[Tracker] = []

    def start(self, first_step: int, num_steps: int, unit: str, flops: float | None = None) -> None:
        """Begin at step 0, or continue at `first_step`.

        unit: What `progress` counts, e.g. "token".
        flops: Floating-point operations of training on one unit. If given, the model FLOPs
            utilization (MFU) is reported on devices whose peak is known.
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
            opened = open_tracker(tracker, self.folder, self.config, self.report.project)
            self.trackers.append(opened)
        self._record_start()
        if first_step:
            logger.warning("%s: continuing at step %d of %d", self.folder, first_step, num_steps)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Context in which the loop waits for data; the share of this time is reported."""
        started = time.monotonic()
        yield
        self.waited += time.monotonic() - started

    def begin_step(self, step: int) -> None:
        """Note that step `step` begins, and start the profiler if this step is to be profiled."""
        every = self.report.profile_every
        if self.world.size > 1 and every and step % every == min(10, every - 1):
            self.profile = CollectiveShare(self.world)

    def progress(self, units: int) -> None:
        """Count one optimizer step over `units` tokens or images on all ranks together."""
        self.units_since += units
        self.bar.update()
        if self.profile:
            self.measured["communication_share"] = self.profile.finish()
            self.profile = None

    def log(self, step: int, metrics: Mapping[str, float | torch.Tensor]) -> None:
        """Write metrics after `step` steps, with the throughput since the last report.

        Tensors are read from the device, which waits for it (a host sync).
        """
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
        self.bar.set_postfix(
            {k: f"{v:.4g}" for k, v in numbers.items() if k not in _NOT_ON_PROGRESS_BAR}
        )
        # JSON has no NaN; null keeps the file readable by every parser.
        line = {k: v if np.isfinite(v) else None for k, v in numbers.items()}
        try:
            with self._metrics.open("a") as file:
                file.write(json.dumps({"step": step, **line}) + "\n")
        except OSError as error:  # e.g. a full disk: do not stop the training for it
            logger.warning("the metrics of step %d could not be written: %s", step, error)
        for tracker in self.trackers:
            tracker.log(step, numbers)

    def draw(self, step: int, pixels: np.ndarray) -> None:
        """Save a grid (height, width, 3) uint8 as `samples/step_0001000.png`, and the curves."""
        if not self.world.is_main:
            return
        for tracker in self.trackers:
            tracker.draw(step, pixels)
        folder = self.folder / "samples"
        try:
            folder.mkdir(exist_ok=True)
            save_png(pixels, folder / f"step_{step:07d}.png")
            draw_curves(self._metrics, self.folder / "curves.png")
        except OSError as error:
            logger.warning("the samples of step %d could not be written: %s", step, error)

    def end(self) -> None:
        """Record when this start ended: the run is finished, or was asked to stop."""
        self.bar.close()
        if self.world.is_main:
            self._starts[-1]["ended"] = now()
            write_json(self.folder / STARTS, self._starts)

    def finish(self) -> None:
        """Record the end, and print where the results are."""
        self.end()
        if self.world.is_main:
            draw_curves(self._metrics, self.folder / "curves.png")
            names = ("checkpoints", "metrics.jsonl", "curves.png", "samples")
            print(f"{self.folder}: {', '.join(n for n in names if (self.folder / n).exists())}")

    def say(self, line: str) -> None:
        """Print one line above the progress bar, for the log."""
        if self.world.is_main:
            tqdm.write(f"{self.folder}: {line}")

    def _record_start(self) -> None:
        """Add this start to run.json; one that was killed has no time of its end."""
        path = self.folder / STARTS
        earlier: Any = []
        try:
            earlier = read_json(path) if path.exists() else []
        except InputError as error:
            logger.warning("%s; it begins again", error)
        if not isinstance(earlier, list):
            logger.warning("%s: not a list of starts; it begins again", path)
            earlier = []
        self._starts: list[dict[str, Any]] = [*earlier, describe_start(self.world)]
        write_json(path, self._starts)

    @property
    def _metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    def _save_config(self, resuming: bool) -> None:
        path = self.folder / "config.yaml"
        if resuming and path.exists():
            text, now = path.read_text(errors="replace"), config_text(self.config)
            changed = [line.strip() for line in now.splitlines() if line not in text.splitlines()]
            if changed:
                text = shorten("; ".join(changed))
                logger.warning("%s: resuming with other settings: %s", path, text)
            elif text != now:
                logger.warning("%s: damaged, or written by another version; written again", path)
        save_config(self.config, path)

    def _drop_metrics_after(self, step: int) -> None:
        """Drop the reports of steps that will be computed again, because the run was killed."""
        if not self._metrics.exists():
            return
        records, damaged = read_metrics(self._metrics)
        if damaged:
            logger.warning(
                "%s: %d lines are damaged and were removed; the others are kept",
                self._metrics,
                damaged,
            )
        # A run that restarts at step 0 repeats the evaluation before its first step.
        kept = [json.dumps(record) + "\n" for record in records if step and record["step"] <= step]
        write_text(self._metrics, "".join(kept))


class CollectiveShare:
    """Profiles one step to measure its time in collectives, overlapped with compute or not."""

    def __init__(self, world: World) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if world.device.type == "cuda":
            activities = [torch.profiler.ProfilerActivity.CUDA]
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences the profiler's own messages
        self.profiler = torch.profiler.profile(activities=activities)
        self.profiler.start()
        self.started = time.monotonic()

    def finish(self) -> float:
        """Time in collectives over the time of the step; at most 1 unless collectives overlap."""
        self.profiler.stop()  # waits for the device
        elapsed = time.monotonic() - self.started
        events = self.profiler.events() or []
        spent = sum(
            e.time_range.elapsed_us() for e in events if e.name.startswith(("nccl", "gloo"))
        )
        return spent / 1e6 / elapsed


def make_run_folder(folder: Path, world: World) -> None:
    """Make the run's folder. Raises InputError where a file has this name."""
    if world.is_main:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder}: is a file, expected the run's folder")
        folder.mkdir(parents=True, exist_ok=True)
    world.barrier()


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The reports in a metrics.jsonl, and the number of lines that are damaged.

    Half a line at the end is what a kill while writing leaves, and does not count.
    """
    records, damaged = [], 0
    lines = path.read_bytes().split(b"\n")
    for i, line in enumerate(lines):
        try:
            record = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            record = {}
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
        elif record is not None:
            damaged += i + 1 < len(lines)
    return records, damaged


def draw_curves(metrics: Path, path: Path) -> None:
    """Plot every metric of a metrics.jsonl against the step, one panel each, if there is any."""
    if not metrics.exists():
        return
    series: dict[str, list[tuple[int, float]]] = {}
    for record in read_metrics(metrics)[0]:
        step = record.pop("step")
        for name, value in record.items():
            if isinstance(value, int | float):
                series.setdefault(name, []).append((step, value))
    if not series:
        return
    columns = min(3, len(series))
    rows = -(-len(series) // columns)
    figure, axes = subplots(rows, columns, figsize=(5 * columns, 3 * rows), squeeze=False)
    for axis in axes.flat[len(series) :]:
        axis.remove()
    for axis, (name, points) in zip(axes.flat, series.items(), strict=False):
        axis.plot(*zip(*points, strict=True), linewidth=1.2)
        axis.set(title=name, xlabel="step")
        axis.grid(alpha=0.3)
    save_plot(figure, path)
