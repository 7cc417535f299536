"""What every training command has in common: how long it trains, on how much data at once."""

from dataclasses import dataclass

from core.distributed.world import DeviceName, Precision


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
