"""AdamW or Muon, the learning-rate schedule, and the optimizer step, for training commands."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from core.config import InputError


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


def build_optimizer(
    model: nn.Module,
    config: OptimizerConfig,
    matrices: Mapping[str, Sequence[int]],
    heads: nn.Module | None = None,
) -> torch.optim.Optimizer:
    """The optimizer that `config` names, over the named trainable parameters; see build_adamw.

    matrices: What Muon trains: names in the state dict, and the numbers of rows of the matrices
        that are stacked in each, which are orthogonalised separately.
    """
    if config.kind == "adamw":
        return build_adamw(model, config, heads)
    return MuonAdamW(_named_parameters(model, heads), matrices, config)


def build_adamw(
    model: nn.Module, config: OptimizerConfig, heads: nn.Module | None = None
) -> torch.optim.AdamW:
    """Fused AdamW over the named trainable parameters, in groups with and without weight decay.

    heads: More parameters, of the objective; their names begin with "objective.".
    """
    return _adamw(_named_parameters(model, heads), config)


def _named_parameters(model: nn.Module, heads: nn.Module | None) -> list[tuple[str, nn.Parameter]]:
    # Names are those of the state dict: named_parameters() adds the prefixes of training wrappers.
    state = model.state_dict(keep_vars=True)
    if heads is not None:
        state |= {f"objective.{n}": p for n, p in heads.state_dict(keep_vars=True).items()}
    return [(n, p) for n, p in state.items() if isinstance(p, nn.Parameter) and p.requires_grad]


def _adamw(named: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> torch.optim.AdamW:
    named = list(named)
    groups = [
        {"params": [(n, p) for n, p in named if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [(n, p) for n, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


class MuonAdamW(torch.optim.Optimizer):
    """Muon for hidden matrices, AdamW for all other weights, as one optimizer.

    Muon (Jordan et al., kellerjordan.github.io/posts/muon) orthogonalises the momentum of a matrix
    by a Newton-Schulz iteration. It is torch.optim.Muon with the update scaled to the size of
    AdamW's (Liu et al., arXiv 2502.16982), so that lr and weight decay carry over. q, k and v are
    stacked in one weight and orthogonalised separately.

    What is known: published gains are for language models, and for ViT and pixel diffusion
    transformers. No published result for autoregressive image models was found, and this project
    has measured none: compare it with AdamW on your data. Matrices must be whole (no FSDP).

    Args:
        named: All trainable parameters by name.
        matrices: As for build_optimizer.
    """

    def __init__(
        self,
        named: Sequence[tuple[str, nn.Parameter]],
        matrices: Mapping[str, Sequence[int]],
        config: OptimizerConfig,
    ) -> None:
        super().__init__([parameter for _, parameter in named], {})
        self.trained = [parameter for _, parameter in named]
        self.views: list[tuple[nn.Parameter, list[nn.Parameter]]] = []
        parts: list[tuple[str, nn.Parameter]] = []
        for name, whole in ((name, whole) for name, whole in named if name in matrices):
            rows = whole.detach().split(list(matrices[name]))  # the same memory
            views = [nn.Parameter(part) for part in rows]
            self.views.append((whole, views))
            parts += [(f"{name}.{i}", view) for i, view in enumerate(views)]
        self.adamw = _adamw((pair for pair in named if pair[0] not in matrices), config)
        self.muon = torch.optim.Muon(
            parts,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            adjust_lr_fn="match_rms_adamw",
        )
        self.param_groups = [*self.adamw.param_groups, *self.muon.param_groups]
        # One state, which checkpoints read and write.
        self.state = self.muon.state = self.adamw.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # noqa: ANN401 - torch's interface
        """Update all parameters from their gradients."""
        assert closure is None
        for whole, views in self.views:
            assert whole.grad is not None
            for view, grad in zip(views, whole.grad.split([len(v) for v in views]), strict=True):
                view.grad = grad
        self.muon.step()
        self.adamw.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of all parameters."""
        super().zero_grad(set_to_none)
        for whole, _ in self.views:
            whole.grad = None


class Stepper:
    """Clips the accumulated gradients and applies them, or skips them; no host sync.

    The fused kernels leave parameters and moments untouched where `found_inf` is 1 (the interface
    that GradScaler uses), so a NaN is detected on the device, and the host reads it only in
    `check`. The norm is computed over all ranks, so all ranks skip or stop together.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, config: OptimizerConfig, device: torch.device
    ) -> None:
        self.optimizer, self.config = optimizer, config
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if isinstance(optimizer, MuonAdamW):
            self.parameters = optimizer.trained
        self.skipped = torch.zeros((), device=device)
        self.in_a_row = torch.zeros((), device=device)
        self.most_in_a_row = torch.zeros((), device=device)
        self.first_bad = torch.full((), 2**62, dtype=torch.int64, device=device)

    def step(self, step: int, num_steps: int) -> torch.Tensor:
        """Do optimizer step `step` and reset the gradients.

        Returns the gradient's L2 norm before clipping, a scalar on the device.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.config, num_steps)
        limit = float("inf") if self.config.clip_norm is None else self.config.clip_norm
        norm = nn.utils.clip_grad_norm_(self.parameters, limit, foreach=True)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()  # the norm over all shards, equal on every rank
        spike = self.config.spike_norm
        # A comparison with NaN is false, so `bad` is 1 for NaN and infinity too.
        bad = (~(norm <= (torch.finfo(norm.dtype).max if spike is None else spike))).float()
        self.skipped += bad
        self.in_a_row = (self.in_a_row + bad) * bad
        self.most_in_a_row = torch.maximum(self.most_in_a_row, self.in_a_row)
        self.first_bad = torch.where(bad > 0, self.first_bad.clamp(max=step), self.first_bad)
        self.optimizer.found_inf = bad  # pyright: ignore[reportAttributeAccessIssue]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def check(self) -> int:
        """The number of steps skipped so far.

        Raises InputError if the configuration does not allow them. This waits for the device
        (a host sync): call it only when reporting and before saving.
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
        return "" if norm is None else f" (or one above optimizer.spike_norm {norm})"
