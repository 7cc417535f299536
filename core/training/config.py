"""What every training command has in common: how long it trains, on how much data at once."""

from dataclasses import dataclass
from typing import Literal

from core.distributed.config import DeviceName, Precision


@dataclass(frozen=True)
class TrainingConfig:
    """Length, batch size, precision and seed of a training run.

    Args:
        num_steps: Optimizer steps.
        batch_size: Samples per optimizer step, over all processes and accumulation steps.
        gradient_accumulation: Micro-batches per optimizer step.
        ema_decay: Decay of the exponential moving average of the weights; null for no EMA.
        precision: bf16 (autocast; weights and optimizer state stay in float32) or fp32.
        seed: Seed of the initial weights, the data order, the augmentation and all dropout.
        device: auto, cpu, cuda or mps.
    """

    num_steps: int
    batch_size: int
    gradient_accumulation: int = 1
    ema_decay: float | None = None
    precision: Precision = "bf16"
    seed: int = 0
    device: DeviceName = "auto"

    def __post_init__(self) -> None:
        if min(self.num_steps, self.batch_size, self.gradient_accumulation) < 1:
            raise ValueError(
                "training: num_steps, batch_size and gradient_accumulation must be >= 1"
            )
        if self.seed < 0:
            raise ValueError(f"training.seed is {self.seed}, must be >= 0")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(
                f"training.ema_decay is {self.ema_decay}, must be in (0, 1), or null for no EMA"
            )


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its learning-rate schedule.

    Args:
        kind: adamw; or muon for the matrices of the transformer's blocks, with AdamW for all other
            weights (see MuonAdamW). With muon, lr and weight_decay can stay those of AdamW.
        lr: Peak learning rate.
        betas: Decay of the first and second moment.
        momentum: Momentum of Muon; only for kind muon.
        weight_decay: Decoupled weight decay of tensors with 2 or more dimensions; the others
            (norms, biases) have none.
        clip_norm: Gradients are scaled down to at most this L2 norm; null for no clipping.
        schedule: constant; cosine (decays to lr * final_lr); wsd (constant, then linear decay).
        warmup_steps: Steps of linear warmup from 0.
        decay_steps: Steps of the linear decay at the end; only for schedule wsd.
        final_lr: Learning rate at the end of cosine and wsd, as a fraction of lr.
        on_nan: What to do when a gradient is not finite: stop the run, or skip the step.
        spike_norm: A gradient with a larger L2 norm is treated like one that is not finite; null
            for no limit.
        max_skipped: With on_nan skip, the run stops after more than this many skipped steps in a
            row.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    momentum: float = 0.95
    weight_decay: float = 0.05
    clip_norm: float | None = 1.0
    schedule: Literal["constant", "cosine", "wsd"] = "constant"
    warmup_steps: int = 0
    decay_steps: int = 0
    final_lr: float = 0.0
    on_nan: Literal["stop", "skip"] = "stop"
    spike_norm: float | None = None
    max_skipped: int = 20

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"optimizer.lr is {self.lr}, must be > 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas is {self.betas}, each must be in [0, 1)")
        if not 0 <= self.momentum < 1 or (self.kind == "adamw" and self.momentum != 0.95):
            raise ValueError("optimizer.momentum must be in [0, 1), and needs optimizer.kind muon")
        if self.kind == "muon" and self.on_nan == "skip":
            raise ValueError(
                "optimizer.kind muon cannot skip steps: leave optimizer.on_nan at stop"
            )
        counts = (self.warmup_steps, self.decay_steps, self.max_skipped)
        if min(self.weight_decay, *counts) < 0:
            raise ValueError("optimizer: weight_decay and all counts must be >= 0")
        for name in ("clip_norm", "spike_norm"):
            norm = getattr(self, name)
            if norm is not None and norm <= 0:
                raise ValueError(f"optimizer.{name} is {norm}, must be > 0, or null for no limit")
        if not 0 <= self.final_lr <= 1:
            raise ValueError(f"optimizer.final_lr is {self.final_lr}, must be in [0, 1]")
        if self.decay_steps and self.schedule != "wsd":
            raise ValueError("optimizer.decay_steps needs optimizer.schedule wsd")


@dataclass(frozen=True)
class ReportConfig:
    """How often a run reports, evaluates and saves. All intervals count optimizer steps.

    Args:
        report_every: Interval between reports of the metrics, the only host sync of the loop.
        sample_every: Interval between evaluations: the validation is run, and samples and curves
            are drawn. There is also one before the first step and one at the end; null for never.
        save_every: Interval between checkpoints. A run always ends with a checkpoint.
        keep_last: Number of the newest checkpoints to keep.
        keep_every: Checkpoints whose step is a multiple of this are never deleted; null for none.
        profile_every: Interval between steps that are profiled to measure the share of time spent
            in collectives; null for never.
        trackers: Trackers that also get the metrics: wandb (WANDB_MODE=offline works), tensorboard.
        project: Project name for wandb.
    """

    report_every: int = 100
    sample_every: int | None = 5000
    save_every: int = 5000
    keep_last: int = 2
    keep_every: int | None = None
    profile_every: int | None = None
    trackers: tuple[Literal["wandb", "tensorboard"], ...] = ()
    project: str = "llamagen"

    def __post_init__(self) -> None:
        if min(self.report_every, self.save_every, self.keep_last) < 1:
            raise ValueError("report: report_every, save_every and keep_last must be >= 1")
        optional = (self.sample_every, self.keep_every, self.profile_every)
        if any(every is not None and every < 1 for every in optional):
            raise ValueError(
                "report: sample_every, keep_every and profile_every must be >= 1, or null for never"
            )

    def reports(self, step: int, num_steps: int) -> bool:
        """Whether to report after `step` steps."""
        return step % self.report_every == 0 or step == num_steps

    def samples(self, step: int, num_steps: int) -> bool:
        """Whether to draw samples and validate after `step` steps."""
        if self.sample_every is None:
            return False
        return step % self.sample_every == 0 or step == num_steps

    def saves(self, step: int, num_steps: int) -> bool:
        """Whether to save after `step` steps."""
        return step % self.save_every == 0 or step == num_steps
