"""AdamW or Muon, the learning-rate schedule, and the optimizer step, for training commands."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from core.config import InputError
from core.training.config import OptimizerConfig


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
