"""Cross-entropy behind a linear head, in chunks: the full logits never exist."""

from typing import Any

import torch
from torch.nn import functional as F


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: int
) -> torch.Tensor:
    """Mean cross-entropy of `hidden @ weight.T` against targets, a float32 scalar.

    hidden (n, dim), weight (vocab, dim), targets (n,) int64; `chunk` rows at a time, so that memory
    for float32 logits is chunk x vocab instead of n x vocab. Products are in autocast's dtype where
    it is on; softmax and sums are float32. Gradients are computed along with the loss, one product
    each, so nothing is recomputed.
    """
    return _LinearCrossEntropy.apply(hidden, weight, targets, chunk, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,  # noqa: ANN401
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        chunk: int,
        needed: bool,
    ) -> torch.Tensor:
        device, dtype = hidden.device.type, hidden.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        compute_weight = weight.to(dtype)
        total = torch.zeros((), device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needed else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needed else None
        with torch.autocast(device, enabled=False):
            for start in range(0, len(hidden), chunk):
                rows = slice(start, start + chunk)
                part = hidden[rows].to(dtype)
                logits = F.linear(part, compute_weight).float()
                log_sums = logits.logsumexp(dim=-1, keepdim=True)
                total += (log_sums - logits.gather(1, targets[rows, None])).sum()
                if grad_hidden is not None and grad_weight is not None:
                    # d loss / d logits = softmax - one-hot, in the logits' own memory.
                    grad = logits.sub_(log_sums).exp_()
                    grad.scatter_add_(1, targets[rows, None], -torch.ones_like(log_sums))
                    grad = grad.to(dtype)
                    grad_hidden[rows] = grad @ compute_weight
                    grad_weight += grad.T @ part
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.count, ctx.dtype = len(hidden), weight.dtype
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> Any:  # noqa: ANN401 # pyright: ignore[reportIncompatibleMethodOverride]
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = scale / ctx.count
        # Scaled only now: a mean over many tokens would fall below bf16's range too early.
        return grad_hidden * scale, (grad_weight * scale).to(ctx.dtype), None, None, None
