"""Vector quantisation with a low-dimensional, l2-normalised codebook (LlamaGen, section 2.1)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from tokenizer.quantizers.base import Quantized, Quantizer, QuantizerSettings
from tokenizer.quantizers.dead_codes import revive_dead_codes

SEARCH_ROWS = 8192  # vectors compared with the codebook at once, fewer if it is large:
SEARCH_SCORES = 1 << 27  # scores held at once, 512 MiB in float32
ROTATION_EPSILON = 1e-6  # added to every norm of the rotation trick, as published


@dataclass(frozen=True)
class VectorOptions:
    """Options of the quantizer vq alone.

    Args:
        gradient: How the decoder's gradient reaches the encoder. straight_through: unchanged.
            rotation: rotated and scaled by the map from a vector to its entry (Fifty et al. 2024,
            section 4).
        dead_codes: What happens to entries that no vector chooses. keep: nothing. cvq: each
            micro-batch moves them to vectors of the batch (CVQ-VAE, section 3.2).
    """

    gradient: Literal["straight_through", "rotation"] = "straight_through"
    dead_codes: Literal["keep", "cvq"] = "keep"


DEFAULT_OPTIONS = VectorOptions()


class VectorQuantizer(Quantizer):
    """Replaces each vector by its nearest codebook entry, with straight-through gradients."""

    kind = "vq"
    code_frequency: torch.Tensor  # only with dead_codes cvq

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        l2_normalize: bool,
        commitment_weight: float,
        entropy_weight: float,
        options: VectorOptions = DEFAULT_OPTIONS,
    ) -> None:
        super().__init__(vocab_size, dim)
        self.l2_normalize, self.options = l2_normalize, options
        self.commitment_weight, self.entropy_weight = commitment_weight, entropy_weight
        self.embedding = nn.Embedding(vocab_size, dim)
        nn.init.uniform_(self.embedding.weight, -1 / vocab_size, 1 / vocab_size)
        if l2_normalize:
            self.embedding.weight.data = F.normalize(self.embedding.weight.data, dim=-1)
        # The released files contain this buffer of their trainer. Nothing reads it.
        self.register_buffer("codebook_used", torch.zeros(65536))
        if options.dead_codes == "cvq":
            self.register_buffer("code_frequency", torch.zeros(vocab_size))

    def codebook(self) -> torch.Tensor:
        """The entries (vocab_size, dim) float32, normalised if the model normalises vectors."""
        return self._normalized(self.embedding.weight.float())

    @classmethod
    def build(cls, settings: QuantizerSettings) -> "VectorQuantizer":
        """See Quantizer."""
        s = settings
        return cls(
            s.vocab_size, s.dim, s.l2_normalize, s.commitment_weight, s.entropy_weight, s.options
        )

    def forward(self, z: torch.Tensor) -> Quantized:
        """z (b, dim, h, w) -> codes, vectors, and the losses codebook, commitment and entropy."""
        # In float32 even under autocast: in bf16, 5.6 % of the codes change.
        with torch.autocast(z.device.type, enabled=False):
            raw = z.float().movedim(1, -1)
            z, codebook = self._normalized(raw), self.codebook()
            codes = nearest(z.flatten(0, -2), codebook).view(z.shape[:-1])
            vectors = codebook[codes]
            losses = {
                "codebook": F.mse_loss(vectors, z.detach()),
                "commitment": self.commitment_weight * F.mse_loss(z, vectors.detach()),
            }
            if self.entropy_weight:
                losses["entropy"] = self.entropy_weight * entropy_loss(z.flatten(0, -2), codebook)
            if self.options.gradient == "rotation":
                vectors = rotate_to(z, vectors)
            else:
                vectors = z + (vectors - z).detach()
            # In training mode only, as the statistics of batch norm: encoding changes no entry.
            if self.options.dead_codes == "cvq" and self.training:
                self._revive(codes.flatten(), raw.flatten(0, -2))
        return Quantized(codes, vectors.movedim(-1, 1), losses)

    def lookup(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes (b, h, w) int64 -> vectors (b, dim, h, w) in the codebook's dtype."""
        return self.codebook()[codes].movedim(-1, 1).to(self.embedding.weight.dtype)

    def _revive(self, codes: torch.Tensor, vectors: torch.Tensor) -> None:
        """Move rarely used entries to vectors (n, dim) of the batch, whose codes (n,) are given."""
        weight = self.embedding.weight
        revived = revive_dead_codes(
            weight.detach(), self.code_frequency, codes, vectors, self.l2_normalize
        )
        # New tensors: the backward pass, and a checkpoint being copied, still read the old ones.
        weight.data, self.code_frequency = revived

    def _normalized(self, vectors: torch.Tensor) -> torch.Tensor:
        return F.normalize(vectors, dim=-1) if self.l2_normalize else vectors


@torch.no_grad()
def nearest(vectors: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Vectors (n, dim) -> their nearest entries in the codebook (vocab_size, dim), (n,) int64."""
    # |v|^2 is constant within a row, so it does not change the argmin.
    offset = codebook.square().sum(-1)
    chunks = [
        torch.addmm(offset, rows, codebook.T, alpha=-2).argmin(-1)
        for rows in vectors.split(max(1, min(SEARCH_ROWS, SEARCH_SCORES // len(codebook))))
    ]
    return torch.cat(chunks)


def rotate_to(vectors: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The targets (..., dim) in value, as a rotation and scaling of the vectors (..., dim).

    The rotation and the scale are constants of the backward pass, so that a gradient keeps its
    angle to the vector. Fifty et al. 2024, equation 4.
    """
    with torch.no_grad():
        norm, target_norm = (x.norm(dim=-1, keepdim=True) for x in (vectors, targets))
        start, end = vectors / (norm + ROTATION_EPSILON), targets / (target_norm + ROTATION_EPSILON)
        between = start + end
        between /= between.norm(dim=-1, keepdim=True) + ROTATION_EPSILON
        scale = target_norm / (norm + ROTATION_EPSILON)
    reflected = vectors - 2 * (vectors * between).sum(-1, keepdim=True) * between
    return scale * (reflected + 2 * (vectors * start).sum(-1, keepdim=True) * end)


def entropy_loss(
    vectors: torch.Tensor, codebook: torch.Tensor, temperature: float = 0.01
) -> torch.Tensor:
    """Mean entropy of each row's soft assignment minus the entropy of the mean assignment."""
    logits = -torch.cdist(vectors, codebook).square() / temperature
    log_probability = logits.log_softmax(-1)
    probability = log_probability.exp()
    mean = probability.mean(0)
    sample_entropy = -(probability * log_probability).sum(-1).mean()
    return sample_entropy + (mean * (mean + 1e-5).log()).sum()
