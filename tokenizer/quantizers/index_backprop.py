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

CHUNK_ELEMENTS = 1 << 23  # of a chunk's scores, of which about three exist: 32 MiB each in float32
TEMPERATURE = 0.01  # of the assignments whose entropy is rewarded
MEAN_EPSILON = 1e-5  # added to the mean assignment inside its logarithm, as published


class IndexBackpropQuantizer(Quantizer):
    """Maps each vector to the entry with the largest inner product.

    codebook_weight is the 0.25 of the published loss, which weights the codebook term.
    """

    kind = "ibq"

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
            vectors, entries, entropy = _IndexBackprop.apply(
                rows, codebook, codes, self.entropy_weight > 0
            )
            losses = {
                "index": F.mse_loss(vectors, rows),
                "commitment": F.mse_loss(rows, entries.detach()),
                "codebook": self.codebook_weight * F.mse_loss(entries, rows.detach()),
            }
            if self.entropy_weight:
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


def _through_softmax(gradient: torch.Tensor, probability: torch.Tensor) -> torch.Tensor:
    """Turn the gradient of softmax's output p into that of its input, in place: p (g - <p, g>)."""
    gradient.mul_(probability)
    return gradient.addcmul_(probability, gradient.sum(-1, keepdim=True), value=-1)


class _IndexBackprop(torch.autograd.Function):
    """The straight-through vectors, the entries, and the entropy of the assignments (or 0).

    Vectors: (onehot - stop_gradient(p) + p) @ codebook with p = softmax(rows @ codebook.T); in
    value, vectors and entries both are codebook[codes]. With g the gradient of the vectors:
    a = g codebook^T, dl = p * (a - <p, a>), d rows = dl codebook,
    d codebook = scatter(codes, g) + dl^T rows. All three share one gradient of the codebook and one
    pass over the chunks, so that no second (vocab_size, dim) tensor is made.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's context
        rows: torch.Tensor,
        codebook: torch.Tensor,
        codes: torch.Tensor,
        with_entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ctx.with_entropy = with_entropy
        mean, entropy = codebook.new_zeros(0), codebook.new_zeros(())
        if with_entropy:
            mean, entropy = _assignment_entropy(rows, codebook)
        ctx.save_for_backward(rows, codebook, codes, mean)
        entries = codebook[codes]
        return entries, entries.clone(), entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,  # noqa: ANN401
        gradient: torch.Tensor,
        entries_gradient: torch.Tensor,
        entropy_gradient: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        rows, codebook, codes, mean = ctx.saved_tensors
        d_codebook = torch.zeros_like(codebook).index_add_(0, codes, gradient + entries_gradient)
        d_mean = (mean + MEAN_EPSILON).log() + mean / (mean + MEAN_EPSILON)
        scale = entropy_gradient / (len(rows) * TEMPERATURE)
        d_rows = []
        for part, g in zip(row_chunks(rows, codebook), row_chunks(gradient, codebook), strict=True):
            logits = part @ codebook.T
            d_logits = _through_softmax(g @ codebook.T, logits.softmax(-1))
            if ctx.with_entropy:
                log_p = logits.div_(TEMPERATURE).log_softmax(-1)
                del logits
                probability = log_p.exp()
                d_logits += _through_softmax(log_p.neg_().add_(d_mean), probability).mul_(scale)
                del log_p, probability
            d_rows.append(d_logits @ codebook)
            d_codebook.addmm_(d_logits.T, part)
            del d_logits  # before the next chunk's are made
        return torch.cat(d_rows), d_codebook, None, None


def _assignment_entropy(
    rows: torch.Tensor, codebook: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean (vocab_size,) of p = softmax(rows @ codebook.T / 0.01), and the loss.

    The loss is the mean entropy of p minus the entropy of the mean.
    """
    mean, entropy = torch.zeros_like(codebook[:, 0]), rows.new_zeros(())
    for part in row_chunks(rows, codebook):
        log_p = (part @ codebook.T).div_(TEMPERATURE).log_softmax(-1)
        probability = log_p.exp()
        mean += probability.sum(0) / len(rows)
        entropy -= log_p.mul_(probability).sum() / len(rows)
        del log_p, probability
    return mean, entropy + (mean * (mean + MEAN_EPSILON).log()).sum()
