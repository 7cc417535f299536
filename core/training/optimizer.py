"""The optimiser and its schedule, for every training of the project."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from core.config import InputError


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule.

    Args:
        lr: Peak learning rate.
        betas: Decay of the first and second moment.
        weight_decay: Decoupled decay of tensors with 2 or more dimensions; others have none.
        clip_norm: Gradients are scaled to at most this L2 norm; 0 leaves them alone.
        schedule: constant; cosine to lr * final_lr; wsd (constant, then a linear decay).
        warmup_steps: Steps of linear growth from 0.
        decay_steps: Length of the linear decay at the end, for wsd alone.
        final_lr: The share of lr that cosine and wsd end at.
        on_nan: What a bad step does, one whose gradient is not finite: stop the run, or be skipped.
        spike_norm: A step whose gradient has a larger L2 norm is bad as well; 0 for none.
        max_skipped: With on_nan skip, more bad steps in a row than this stop the run.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    schedule: Literal["constant", "cosine", "wsd"] = "constant"
    warmup_steps: int = 0
    decay_steps: int = 0
    final_lr: float = 0.0
    on_nan: Literal["stop", "skip"] = "stop"
    spike_norm: float = 0.0
    max_skipped: int = 20

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"optimizer.lr is {self.lr}, must be > 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas is {self.betas}, each must be in [0, 1)")
        counts = (self.warmup_steps, self.decay_steps, self.max_skipped)
        if min(self.weight_decay, self.clip_norm, self.spike_norm, *counts) < 0:
            raise ValueError(
                "optimizer: weight_decay, clip_norm, spike_norm and all counts must be >= 0"
            )
        if not 0 <= self.final_lr <= 1:
            raise ValueError(f"optimizer.final_lr is {self.final_lr}, must be in [0, 1]")
        if self.decay_steps and self.schedule != "wsd":
            raise ValueError("optimizer.decay_steps is read by schedule wsd alone")


def learning_rate(step: int, config: OptimizerConfig, num_steps: int) -> float:
    """The learning rate of optimizer step `step` in 0 .. num_steps - 1."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
        fall = (1 + math.cos(math.pi * min(1.0, progress))) / 2
    elif config.schedule == "wsd":
        fall = min(1.0, (num_steps - step) / max(1, config.decay_steps))
    else:
        return config.lr
    return config.lr * (config.final_lr + (1 - config.final_lr) * fall)


def build_adamw(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW over the trainable parameters, named, in one decayed and one undecayed group."""
    # The state dict's names: those of named_parameters change with the wrappers of training.
    state = model.state_dict(keep_vars=True)
    named = [(n, p) for n, p in state.items() if isinstance(p, nn.Parameter) and p.requires_grad]
    groups = [
        {"params": [(n, p) for n, p in named if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [(n, p) for n, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


class Stepper:
    """Applies accumulated gradients: clip, skip what is not finite, step; no host sync.

    The fused kernels leave parameters and moments untouched where `found_inf` is 1 (the interface
    that GradScaler uses), so a NaN is noticed on the device and read by the host only in `check`.
    The norm is that of the gradient over all ranks, so that they skip and stop together.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, config: OptimizerConfig, device: torch.device
    ) -> None:
        self.optimizer, self.config = optimizer, config
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.skipped = torch.zeros((), device=device)
        self.in_a_row = torch.zeros((), device=device)
        self.most_in_a_row = torch.zeros((), device=device)
        self.first_bad = torch.full((), 2**62, dtype=torch.int64, device=device)

    def step(self, step: int, num_steps: int) -> torch.Tensor:
        """One optimizer step -> the gradient's L2 norm before clipping, a scalar on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.config, num_steps)
        limit = self.config.clip_norm or float("inf")
        norm = nn.utils.clip_grad_norm_(self.parameters, limit, foreach=True)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()  # of all shards: every rank decides alike
        # A comparison with NaN is false, so this finds what is not finite as well.
        bad = (~(norm <= (self.config.spike_norm or torch.finfo(norm.dtype).max))).float()
        self.skipped += bad
        self.in_a_row = (self.in_a_row + bad) * bad
        self.most_in_a_row = torch.maximum(self.most_in_a_row, self.in_a_row)
        self.first_bad = torch.where(bad > 0, self.first_bad.clamp(max=step), self.first_bad)
        self.optimizer.found_inf = bad  # pyright: ignore[reportAttributeAccessIssue]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def check(self) -> int:
        """How many steps were skipped so far; raises InputError where that is not allowed.

        Reads from the device: call it when reporting and before saving.
        """
        skipped = int(self.skipped.item())
        if skipped and self.config.on_nan == "stop":
            raise InputError(
                f"non-finite gradient{self._or_spike()} at step {int(self.first_bad.item())}; "
                "nothing was saved since. Lower optimizer.lr, or set optimizer.on_nan: skip"
            )
        if skipped and (most := int(self.most_in_a_row.item())) > self.config.max_skipped:
            raise InputError(
                f"{most} steps in a row had a non-finite gradient{self._or_spike()} (first: step "
                f"{int(self.first_bad.item())}), more than optimizer.max_skipped "
                f"{self.config.max_skipped}; lower optimizer.lr"
            )
        return skipped

    def _or_spike(self) -> str:
        norm = self.config.spike_norm
        return f" (or one above optimizer.spike_norm {norm})" if norm else ""
