"""Aligns hidden states with features of the images (REPA for autoregressive models).

LlamaGen-REPA (Tencent-Hunyuan/GEAR, src/train_ar.py) and Mirai-I (arXiv 2601.14671): a small
network maps a block's states to the features of a frozen image encoder, one vector per code. Only
training uses it.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch

from autoregressive.models.config import GPTConfig
from autoregressive.models.gpt import GPT
from autoregressive.objectives.base import Batch, Objective, Projector, Projectors, mean_cosine
from autoregressive.objectives.config import AlignmentOptions
from core.config import InputError
from core.data.arrays import load_array


class AlignmentLoss(Objective):
    """Cross-entropy, and hidden states aligned with features of the images (REPA)."""

    needs_one_crop: ClassVar[bool] = True

    def __init__(self, gpt: GPT, chunk: int, seed: int, options: AlignmentOptions) -> None:
        super().__init__(gpt, chunk, seed)
        if options.features is None:
            raise InputError("objective.alignment.features is missing")
        self.options = options
        self.features = load_array(options.features, mapped=True)
        shape, codes = self.features.shape, gpt.config.num_codes
        fits = len(shape) == 3 and shape[1] == codes and shape[2] > 0
        if not fits or self.features.dtype.kind != "f":
            raise InputError(
                f"{options.features}: {self.features.dtype} {shape}, expected floats "
                f"(images, {codes}, dim)"
            )
        depth = round(gpt.config.num_layers * options.depth_share)
        self.block = min(max(1, depth), gpt.config.num_layers) - 1
        self.heads = Projectors(align=Projector(gpt.config.dim, options.hidden, shape[2], 3))

    def check(self, config: GPTConfig, images: int) -> None:
        """Refuse features of other images, and a shift by one where codes have another order."""
        if config.parallel_regions and self.options.shift:
            raise InputError(
                "objective.alignment.shift 1 needs codes in raster order: leave it out, or "
                "model.parallel_regions"
            )
        if len(self.features) != images:
            raise InputError(
                f"{self.options.features}: features of {len(self.features)} images, the codes are "
                f"of {images}"
            )

    def extra(self, rows: np.ndarray, neighbours: Callable[[], Any]) -> Any:  # noqa: ANN401
        """The features (batch, N, dim) float32."""
        return (torch.from_numpy(self.features[rows].astype(np.float32)),)

    def training_loss(self, batch: Batch) -> torch.Tensor:
        """Cross-entropy and alignment."""
        codes, taps = batch.codes, {self.block: batch.codes.new_zeros(())}
        inputs = self.gpt.tok_embeddings(codes[:, :-1])
        hidden = self.gpt.hidden_of(inputs, batch.condition, batch.drop_condition, taps=taps)
        assert self.heads is not None
        loss = alignment_loss(
            self.heads.project("align", taps[self.block][:, self.options.shift :]), batch.extra[0]
        )
        return self.cross_entropy(hidden, codes) + self.options.weight * loss


def alignment_loss(projected: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """-mean cosine: projected (batch, M, dim) with the first M of features (batch, N, dim)."""
    return -mean_cosine(projected, features[:, : projected.shape[1]])
