"""One training run: its folder, checkpoints, progress, reports, and requests to stop.

session = Session(config, model_config, world, {"model": vq, "optimizer": optimizer}, unit="image")
for step in session.steps():
    with session.waiting_for_data(): ...
    session.wait_for_copy()
    ...                                    # the optimizer step
    session.advance(images)
    if session.report_due: session.log({"loss": loss})
    session.save_if_due(check=stepper.check)
session.finish()
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from core.distributed.preemption import Preemption
from core.distributed.world import World
from core.training.checkpoint import Checkpointer
from core.training.config import ReportConfig, TrainingConfig
from core.training.run import Run, make_run_folder


class SessionConfig(Protocol):
    """The fields that a training command's configuration needs."""

    @property
    def out(self) -> Path: ...  # noqa: D102
    @property
    def training(self) -> TrainingConfig: ...  # noqa: D102
    @property
    def report(self) -> ReportConfig: ...  # noqa: D102


class Session:
    """Opens a run's folder and continues from its newest checkpoint, or starts at step 0.

    step: Optimizer steps done so far.
    samples: Training samples consumed so far, over all processes.

    Args:
        config: The command's configuration; it is written to the folder.
        model_config: The model's configuration; it is written to every checkpoint.
        world: All processes construct the session together.
        parts: What a checkpoint holds, by name; see Checkpointer.
        unit: What `advance` counts, e.g. "token".
        flops: Floating-point operations of training on one unit, for the MFU; None reports none.
    """

    def __init__(
        self,
        config: SessionConfig,
        model_config: Any,  # noqa: ANN401 - any config dataclass
        world: World,
        parts: Mapping[str, nn.Module | torch.optim.Optimizer | None],
        unit: str,
        flops: float | None = None,
    ) -> None:
        self.config, self.world = config, world
        make_run_folder(config.out, world)
        report, self.num_steps = config.report, config.training.num_steps
        folder = config.out / "checkpoints"
        self.checkpoints = Checkpointer(
            folder, model_config, world, report.keep_last, report.keep_every, **parts
        )
        state = self.checkpoints.restore_latest()
        self.step, self.samples = state["step"], state.get("samples", 0)
        self.run = Run(config.out, config, report, world)
        self.run.start(self.step, self.num_steps, unit, flops)
        self.preemption = Preemption(world)

    def steps(self) -> Iterator[int]:
        """The indices of the optimizer steps that are left; the first step has index 0."""
        for step in range(self.step, self.num_steps):
            self.run.begin_step(step)
            yield step

    def waiting_for_data(self) -> contextlib.AbstractContextManager[None]:
        """Context in which the loop waits for data; the share of this time is reported."""
        return self.run.waiting()

    def wait_for_copy(self) -> None:
        """Wait until a checkpoint's copy is complete; call it before each optimizer step."""
        self.checkpoints.wait_for_copy()

    def advance(self, units: int) -> None:
        """Count one optimizer step over `units` tokens or images on all processes together."""
        self.step += 1
        self.samples += self.config.training.batch_size
        self.run.progress(units)

    @property
    def report_due(self) -> bool:
        """Whether to report metrics now."""
        return self.config.report.reports(self.step, self.num_steps)

    @property
    def evaluation_due(self) -> bool:
        """Whether to validate and draw samples now; also before the first step of a new run."""
        return self.config.report.samples(self.step, self.num_steps)

    def log(self, metrics: Mapping[str, float | torch.Tensor]) -> None:
        """Write metrics for the current step. Tensors are read from the device (a host sync)."""
        self.run.log(self.step, metrics)

    def log_evaluation(self, metrics: Mapping[str, float | torch.Tensor]) -> None:
        """Write the metrics of an evaluation of the current step, and one line for the log."""
        numbers = {name: float(value) for name, value in metrics.items()}
        self.run.log(self.step, numbers)
        if numbers:
            shown = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
            self.run.say(f"step {self.step}: {shown}")

    def draw(self, pixels: np.ndarray) -> None:
        """Save the current step's sample grid (height, width, 3) uint8, and the curves."""
        self.run.draw(self.step, pixels)

    def save_if_due(self, check: Callable[[], object], unused: Collection[str] = ()) -> None:
        """Save a checkpoint when one is due or the scheduler asked the run to stop.

        Call it after every step on all ranks. `check` is called before saving and raises if the
        weights must not be saved. `unused`: see Checkpointer.save. After a request to stop, this
        saves and ends the process.
        """
        stopping = self.preemption.requested() and self.step < self.num_steps
        if stopping or self.config.report.saves(self.step, self.num_steps):
            check()
            self.checkpoints.save(self.step, unused, samples=self.samples)
            self.run.say(f"step {self.step}: saving a checkpoint")
        if stopping:
            self.checkpoints.finish()
            self.run.end()
            self.preemption.leave(self.step)

    def finish(self) -> None:
        """Wait for the last checkpoint, and print where the results are."""
        self.checkpoints.finish()
        self.preemption.close()
        self.run.finish()
