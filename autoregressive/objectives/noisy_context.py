"""Noisy context with heads that predict the codes' vectors (reAR, arXiv 2510.04450).

A part of the input codes is replaced by random ones, so that the model learns to go on from its own
mistakes. One small network reads the vector of an input code from an early block, a second one the
vector of the code to predict from a late block. Both are for training alone.
"""

import torch
from torch.nn import functional as F

from autoregressive.models.config import GPTConfig
from autoregressive.models.gpt import GPT
from autoregressive.objectives.base import (
    Batch,
    Objective,
    Projector,
    Projectors,
    annealed,
    mean_cosine,
)
from autoregressive.objectives.config import NoisyContextOptions
from core.config import InputError


class NoisyContextLoss(Objective):
    """Cross-entropy behind a noisy context, and heads that predict codes' vectors (reAR)."""

    needs_codebook = True
    raster_order = True
    codebook: torch.Tensor

    def __init__(self, gpt: GPT, chunk: int, seed: int, options: NoisyContextOptions) -> None:
        super().__init__(gpt, chunk, seed)
        self.options = options
        layers = gpt.config.num_layers
        self.decode_block = min(layers - 1, int(layers * options.decode_share))

    def check(self, config: GPTConfig, images: int) -> None:
        """Refuse a block that the model does not have."""
        if self.options.encode_block >= config.num_layers:
            raise InputError(
                f"objective.noisy_context.encode_block {self.options.encode_block}: the model has "
                f"{config.num_layers} blocks"
            )

    def add_heads(self, codebook_dim: int) -> None:
        """Build the heads, for vectors of this width."""
        if self.options.embedding_weight > 0:
            sizes = (self.gpt.config.dim, self.options.hidden, codebook_dim, 3)
            self.heads = Projectors(encode=Projector(*sizes), decode=Projector(*sizes))

    def set_codebook(self, codebook: torch.Tensor) -> None:
        """The heads predict unit vectors."""
        self.register_buffer("codebook", F.normalize(codebook, dim=-1), persistent=False)

    def training_loss(self, batch: Batch) -> torch.Tensor:
        """Cross-entropy, and the heads' loss."""
        codes, gpt = batch.codes, self.gpt
        replaced, inputs = self.perturb(batch)
        encode, decode = self.options.encode_block, self.decode_block
        taps = {encode: codes.new_zeros(()), decode: codes.new_zeros(())} if self.heads else None
        vectors = gpt.tok_embeddings(inputs[:, :-1])
        hidden = gpt.hidden_of(vectors, batch.condition, batch.drop_condition, taps=taps)
        loss = self.cross_entropy(hidden, codes)
        if taps is None or self.heads is None:
            return loss
        wanted = self.codebook[codes]
        similarity = embedding_similarity(
            self.heads.project("encode", taps[encode][:, 1:]),
            self.heads.project("decode", taps[decode]),
            wanted,
            replaced[:, :-1],
        )
        return loss - self.options.embedding_weight * similarity

    def perturb(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Which codes are replaced (batch, N) bool, and the codes with their replacements."""
        codes = batch.codes
        share = self.options.noise * annealed(self.progress, 0.0, self.options.noise_end)
        places = torch.arange(codes.shape[1], device=codes.device)
        streams = torch.arange(3, device=codes.device)
        draws = self.uniform(batch, places[:, None], streams[1:])  # (batch, N, 2)
        own = self.uniform(batch, streams[:1]) * share
        replaced = draws[..., 0] < own
        vocab = self.gpt.config.vocab_size
        others = (draws[..., 1].double() * vocab).long().clamp_(max=vocab - 1)
        return replaced, torch.where(replaced, others, codes)


def embedding_similarity(
    encoded: torch.Tensor, decoded: torch.Tensor, vectors: torch.Tensor, replaced: torch.Tensor
) -> torch.Tensor:
    """Mean cosines of both heads' outputs with the vectors of clean codes, summed.

    encoded (batch, M, z) of the first M <= N codes, decoded (batch, N, z), vectors (batch, N, z),
    replaced (batch, M) bool: inputs that were replaced count as 0.
    """
    first = vectors[:, : encoded.shape[1]]
    return mean_cosine(encoded, first, replaced) + mean_cosine(decoded, vectors)
