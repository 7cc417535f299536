"""Cross-entropy behind a linear head, in chunks: the full logits never exist."""

from typing import Any

import torch
from torch.nn import functional as F


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    chunk: int,
    constant: torch.Tensor | None = None,
    clusters: torch.Tensor | None = None,
    cluster_weight: float = 0.0,
) -> torch.Tensor:
    """Mean cross-entropy of `hidden @ weight.T` against targets, a float32 scalar.

    hidden (n, dim), weight (vocab, dim), targets (n,) int64, or (n, k): the mean over k targets of
    a row; `chunk` rows at a time, so that memory for float32 logits is chunk x vocab instead of
    n x vocab.
    constant: (n, dim), added to `hidden` for the logits; they give no gradient to it nor, through
        it, to the weight.
    clusters: (vocab,) int64, the cluster of each entry; adds cluster_weight times the cross-entropy
        of the target's cluster, whose probability is the sum over its entries (IAR, arXiv
        2501.00880). For targets (n,).
    Products are in autocast's dtype where it is on; softmax and sums are float32. Gradients are
    computed along with the loss, one product each, so nothing is recomputed.
    """
    targets = targets if targets.ndim == 2 else targets[:, None]
    options = (constant, clusters, cluster_weight)
    return _LinearCrossEntropy.apply(
        hidden, weight, targets, chunk, torch.is_grad_enabled(), *options
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,  # noqa: ANN401
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        chunk: int,
        needed: bool,
        constant: torch.Tensor | None,
        clusters: torch.Tensor | None,
        cluster_weight: float,
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
                part, wanted = hidden[rows].to(dtype), targets[rows]
                mixed = part if constant is None else part + constant[rows].to(dtype)
                logits = F.linear(mixed, compute_weight).float()
                log_sums = logits.logsumexp(dim=-1, keepdim=True)
                total += (log_sums - logits.gather(1, wanted)).sum() / wanted.shape[1]
                inside = None
                if clusters is not None:
                    members = clusters == clusters[wanted]
                    inside = logits.masked_fill(~members, -torch.inf)
                    cluster_sums = inside.logsumexp(dim=-1, keepdim=True)
                    total += cluster_weight * (log_sums - cluster_sums).sum()
                    inside = inside.sub_(cluster_sums).exp_()
                if grad_hidden is not None and grad_weight is not None:
                    # d loss / d logits = softmax - one-hot, in the logits' own memory.
                    grad = logits.sub_(log_sums).exp_()
                    if inside is not None:
                        grad.mul_(1 + cluster_weight).sub_(inside, alpha=cluster_weight)
                    share = torch.full_like(log_sums, -1 / wanted.shape[1]).expand_as(wanted)
                    grad.scatter_add_(1, wanted, share)
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
        return grad_hidden * scale, (grad_weight * scale).to(ctx.dtype), *[None] * 6
