"""The interface of a training objective, which is all that the training loop knows about it."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from autoregressive.models.conditioning import ConditionLike
from autoregressive.models.config import GPTConfig
from autoregressive.models.gpt import GPT
from core.rng import random_uniform
from core.training.initialization import Constant, Normal, initialize
from core.training.linear_cross_entropy import linear_cross_entropy

# The random stream of objectives; autoregressive.data has the other streams of a position.
OBJECTIVE_STREAM = 8


@dataclass(frozen=True)
class Batch:
    """What an objective sees of a micro-batch of training.

    codes: (batch, N) int64. condition: as for GPT.forward. drop_condition: (batch,) bool.
    positions: (batch,) int64, the places in the training order, which random draws depend on.
    extra: What the objective's `extra` returned for these places.
    """

    codes: torch.Tensor
    condition: ConditionLike
    drop_condition: torch.Tensor
    positions: torch.Tensor
    extra: Any


class Objective(nn.Module):
    """A GPT and its loss as one module, which FSDP2 and DDP wrap, so that they see the head.

    A subclass defines `training_loss`. What else it may define:
    heads: A module with more trained parameters, saved with the optimizer's state.
    reference: A frozen GPT with the weights that training starts from.
    model_fields: Fields of GPTConfig that it needs.
    check: Refuses a model or a run that it cannot train.
    needs_codebook: `set_codebook` gets the tokenizer's vectors (vocab, codebook_dim) float32.
    needs_one_crop: Its `extra` data belong to one crop of each image.
    raster_order: It cannot train a model with parallel_regions, whose codes have another order.
    sequences_per_image: How many sequences of codes it trains on for an image of the batch.
    extra: More data for a micro-batch.

    Args:
        gpt: The model.
        chunk: Number of codes whose float32 logits exist at the same time.
        seed: Decides all random draws, with the positions of a batch.
        options: The options, of ObjectiveConfig; None for an objective without any.
    """

    model_fields: ClassVar[dict[str, Any]] = {}
    needs_codebook: ClassVar[bool] = False
    needs_one_crop: ClassVar[bool] = False
    raster_order: ClassVar[bool] = False
    sequences_per_image: ClassVar[int] = 1

    def __init__(self, gpt: GPT, chunk: int, seed: int = 0, options: Any = None) -> None:  # noqa: ANN401
        super().__init__()
        self.gpt, self.chunk, self.seed = gpt, chunk, seed
        self.progress = 0.0
        self.heads: Projectors | None = None
        self.reference: GPT | None = None

    def training_loss(self, batch: Batch) -> torch.Tensor:
        """The loss of a micro-batch, a float32 scalar."""
        raise NotImplementedError

    def forward(
        self,
        codes: torch.Tensor,
        condition: ConditionLike,
        drop_condition: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        extra: Any = (),  # noqa: ANN401 - what `extra` returned
    ) -> torch.Tensor:
        """The fields of a Batch -> the training loss, a float32 scalar.

        Without positions: the plain next-token loss, which validation compares objectives by.
        """
        if positions is None or drop_condition is None:
            return self.next_token_loss(codes, condition, drop_condition)
        return self.training_loss(Batch(codes, condition, drop_condition, positions, extra))

    def next_token_loss(
        self,
        codes: torch.Tensor,
        condition: ConditionLike,
        drop_condition: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Arguments of GPT.forward -> mean cross-entropy per code, a float32 scalar."""
        guidance = None
        if self.gpt.config.guidance_input:  # 1: none
            guidance = torch.ones(len(codes), device=codes.device)
        hidden = self.gpt.hidden(codes, condition, drop_condition, guidance=guidance)
        return self.cross_entropy(hidden, codes)

    def cross_entropy(self, hidden: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of the head on hidden (batch, N, dim), against codes (batch, N)."""
        weight = self.gpt.output.weight
        return linear_cross_entropy(hidden.flatten(0, 1), weight, codes.flatten(), self.chunk)

    def begin_step(self, progress: float) -> None:
        """Say how much of the training is done, in [0, 1), before a step."""
        self.progress = progress

    def prepare(self, seed: int, codebook: torch.Tensor | None) -> None:
        """Give all but the GPT its initial values, once the module has memory."""
        if self.heads is not None:
            initialize(self.heads, seed)
        if codebook is not None:
            self.set_codebook(codebook)
        if self.reference is not None:
            self.reference.build_rotary()

    def check(self, config: GPTConfig, images: int) -> None:
        """Raise InputError for a model or a number of images that this objective cannot train."""

    def add_heads(self, codebook_dim: int) -> None:
        """Build heads for vectors of this width; called where needs_codebook is true."""

    def set_codebook(self, codebook: torch.Tensor) -> None:
        """Get the tokenizer's vectors, on the model's device; see needs_codebook."""

    def extra(self, rows: np.ndarray, neighbours: Callable[[], Any]) -> Any:  # noqa: ANN401
        """More data for a micro-batch, tensors in tuples.

        rows: (batch,), which images of the data it has.
        neighbours: gives the condition at the place after each of them in the global batch.
        """
        return ()

    def uniform(self, batch: Batch, *counters: torch.Tensor) -> torch.Tensor:
        """Uniform draws in (0, 1): (batch, ...) for counters that broadcast behind the batch.

        They depend on (seed, place in the training order, counters) alone. Counters are on the
        device of the batch; a copy from the host would make it wait.
        """
        device = batch.positions.device
        positions = batch.positions.view(-1, *[1] * max((c.ndim for c in counters), default=0))
        stream = torch.full((), OBJECTIVE_STREAM, device=device)
        return random_uniform(self.seed, stream, positions, *counters)


class Heads(nn.Module):
    """Parameters of an objective besides the model's: normal weights, biases of zero."""

    def initial_distribution(self, name: str) -> Constant | Normal:
        """How a tensor is initialised; see core.initialization."""
        return Constant(0.0) if name.endswith("bias") else Normal(0.02)


class Projectors(Heads):
    """Several projectors by name."""

    def __init__(self, **parts: "Projector") -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)

    def project(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """(..., dim) -> (..., out) of the projector `name`."""
        return self.parts[name](x)


class Projector(nn.Module):
    """Linear layers with SiLU between them, from the transformer's width to other features."""

    def __init__(self, dim: int, hidden: int, out: int, depth: int) -> None:
        super().__init__()
        widths = [dim, *[hidden] * (depth - 1), out]
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(itertools.pairwise(widths)):
            layers += [nn.SiLU()] * (i > 0) + [nn.Linear(before, after)]
        self.net = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., dim) -> (..., out)."""
        return self.net(x)


def annealed(progress: float, start: float, end: float) -> float:
    """1 until the share `start` of the training, then linearly to 0 at `end`."""
    if progress < start:
        return 1.0
    return max(0.0, (end - progress) / (end - start)) if progress < end else 0.0


def mean_cosine(x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean cosine similarity over all but the last dimension, float32.

    mask: (...) bool; where it is true, the similarity counts as 0.
    """
    cosine = F.cosine_similarity(x.float(), y.float(), dim=-1)
    return cosine.mean() if mask is None else cosine.masked_fill(mask, 0).mean()
