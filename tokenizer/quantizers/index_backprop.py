"""Index back-propagation (IBQ): a code is the argmax of inner products with the codebook.

The straight-through estimator acts on the one-hot index instead of the vector, so every entry of
the codebook receives a gradient at each step, and codebooks of 262,144 entries train (SEED-Voken,
IBQ). The published code materialises (rows, vocab_size) tensors; the closed-form gradients here
recompute them chunk by chunk, so that memory does not grow with rows times vocab_size.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tokenizer.quantizers.base import Quantized, Quantizer

CHUNK_ELEMENTS = 1 << 25  # scores held at once: 128 MiB in float32
TEMPERATURE = 0.01  # of the assignments whose entropy is rewarded
MEAN_EPSILON = 1e-5  # added to the mean assignment inside its logarithm, as published


class IndexBackpropQuantizer(Quantizer):
    """Maps each vector to the entry with the largest inner product.

    codebook_weight is the 0.25 of the published loss, which weights the codebook term.
    """

    def __init__(
        self, vocab_size: int, dim: int, codebook_weight: float, entropy_weight: float
    ) -> None:
        super().__init__(vocab_size, dim)
        self.codebook_weight, self.entropy_weight = codebook_weight, entropy_weight
        self.embedding = nn.Embedding(vocab_size, dim)

    def forward(self, z: torch.Tensor) -> Quantized:
        """z (b, dim, h, w) -> codes, vectors, and the losses of IBQ by name."""
        # In float32 even under autocast: scores of similar entries differ by less than bf16 shows.
        with torch.autocast(z.device.type, enabled=False):
            z = z.float().movedim(1, -1)
            rows, codebook = z.flatten(0, -2), self.embedding.weight.float()
            codes = best_entries(rows, codebook)
            vectors, entries = _StraightThroughIndex.apply(rows, codebook, codes)
            losses = {
                "index": F.mse_loss(vectors, rows),
                "commitment": F.mse_loss(rows, entries.detach()),
                "codebook": self.codebook_weight * F.mse_loss(entries, rows.detach()),
            }
            if self.entropy_weight:
                entropy = _AssignmentEntropy.apply(rows, codebook)
                losses["entropy"] = self.entropy_weight * entropy
        shape = z.shape[:-1]
        return Quantized(codes.view(shape), vectors.view(*shape, -1).movedim(-1, 1), losses)

    def lookup(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes (b, h, w) int64 -> vectors (b, dim, h, w) in the codebook's dtype."""
        return self.embedding(codes).movedim(-1, 1)


@torch.no_grad()
def best_entries(rows: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Vectors (n, dim) -> their entries (vocab_size, dim) of largest inner product, (n,) int64."""
    return torch.cat([(part @ codebook.T).argmax(-1) for part in row_chunks(rows, codebook)])


def row_chunks(rows: torch.Tensor, codebook: torch.Tensor) -> Iterator[torch.Tensor]:
    """Split rows (n, ...) so that scores (rows, vocab_size) of a part stay CHUNK_ELEMENTS."""
    yield from rows.split(max(1, CHUNK_ELEMENTS // len(codebook)))


class _StraightThroughIndex(torch.autograd.Function):
    """(onehot - stop_gradient(p) + p) @ codebook with p = softmax(rows @ codebook.T); the entries.

    In value both are codebook[codes]. With g the gradient of the first: a = g codebook^T,
    dl = p * (a - <p, a>), d rows = dl codebook, d codebook = scatter(codes, g) + dl^T rows. The
    entries add their gradient to the scatter here, so that no second (vocab_size, dim) tensor is
    made for them.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's context
        rows: torch.Tensor,
        codebook: torch.Tensor,
        codes: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(rows, codebook, codes)
        entries = codebook[codes]
        return entries, entries.clone()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,  # noqa: ANN401
        gradient: torch.Tensor,
        entries_gradient: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        rows, codebook, codes = ctx.saved_tensors
        d_codebook = torch.zeros_like(codebook).index_add_(0, codes, gradient + entries_gradient)
        d_rows = []
        for part, g in zip(row_chunks(rows, codebook), row_chunks(gradient, codebook), strict=True):
            probability = (part @ codebook.T).softmax(-1)
            weighted = probability * (g @ codebook.T)
            d_logits = weighted - probability * weighted.sum(-1, keepdim=True)
            d_rows.append(d_logits @ codebook)
            d_codebook.addmm_(d_logits.T, part)
        return torch.cat(d_rows), d_codebook, None


class _AssignmentEntropy(torch.autograd.Function):
    """Mean entropy of p = softmax(rows @ codebook.T / 0.01) minus the entropy of the mean of p."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
        mean, entropy = torch.zeros_like(codebook[:, 0]), rows.new_zeros(())
        for part in row_chunks(rows, codebook):
            log_p = (part @ codebook.T / TEMPERATURE).log_softmax(-1)
            probability = log_p.exp()
            mean += probability.sum(0) / len(rows)
            entropy -= (probability * log_p).sum() / len(rows)
        ctx.save_for_backward(rows, codebook, mean)
        return entropy + (mean * (mean + MEAN_EPSILON).log()).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ANN401
        rows, codebook, mean = ctx.saved_tensors
        d_mean = (mean + MEAN_EPSILON).log() + mean / (mean + MEAN_EPSILON)
        scale = gradient / (len(rows) * TEMPERATURE)
        d_codebook, d_rows = torch.zeros_like(codebook), []
        for part in row_chunks(rows, codebook):
            log_p = (part @ codebook.T / TEMPERATURE).log_softmax(-1)
            probability = log_p.exp()
            outer = d_mean - log_p
            d_logits = probability * (outer - (probability * outer).sum(-1, keepdim=True)) * scale
            d_rows.append(d_logits @ codebook)
            d_codebook.addmm_(d_logits.T, part)
        return torch.cat(d_rows), d_codebook
