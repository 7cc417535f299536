"""Which objective a training uses, and the options of each."""

from dataclasses import dataclass, field, fields
from typing import Literal

import torch

from autoregressive.models.gpt import GPT
from autoregressive.objectives.alignment import AlignmentLoss, AlignmentOptions
from autoregressive.objectives.base import Objective
from autoregressive.objectives.clusters import ClustersLoss, ClustersOptions
from autoregressive.objectives.contrastive import ContrastiveLoss, ContrastiveOptions
from autoregressive.objectives.guidance_free import GuidanceFreeLoss, GuidanceFreeOptions
from autoregressive.objectives.next_patch import NextPatchLoss, NextPatchOptions
from autoregressive.objectives.next_token import NextTokenLoss
from autoregressive.objectives.noisy_context import NoisyContextLoss, NoisyContextOptions
from autoregressive.objectives.random_order import RandomOrderLoss, RandomOrderOptions

LOSSES: dict[str, type[Objective]] = {
    "next_token": NextTokenLoss,
    "next_patch": NextPatchLoss,
    "alignment": AlignmentLoss,
    "noisy_context": NoisyContextLoss,
    "guidance_free": GuidanceFreeLoss,
    "contrastive": ContrastiveLoss,
    "clusters": ClustersLoss,
    "random_order": RandomOrderLoss,
}


@dataclass(frozen=True)
class ObjectiveConfig:
    """The training objective. Options of one that is not in use must have their defaults.

    Args:
        kind: What is minimised.
            next_token: cross-entropy of the next code (LlamaGen).
            next_patch: first of patches of codes, which are shorter sequences (NPP).
            alignment: also aligns hidden states with features of the images (REPA).
            noisy_context: wrong input codes, and heads that predict the codes' vectors (reAR).
            guidance_free: the guidance is an input; sampling takes half the rows (GFT).
            contrastive: fine-tuning after which no guidance is needed (CCA); needs init_from.
            clusters: also cross-entropy of clusters of similar codes (IAR).
            random_order: random orders that become raster order (RAR).
        next_patch: Options of next_patch.
        alignment: Options of alignment.
        noisy_context: Options of noisy_context.
        guidance_free: Options of guidance_free.
        contrastive: Options of contrastive.
        clusters: Options of clusters.
        random_order: Options of random_order.
    """

    kind: Literal[
        "next_token",
        "next_patch",
        "alignment",
        "noisy_context",
        "guidance_free",
        "contrastive",
        "clusters",
        "random_order",
    ] = "next_token"
    next_patch: NextPatchOptions = field(default_factory=NextPatchOptions)
    alignment: AlignmentOptions = field(default_factory=AlignmentOptions)
    noisy_context: NoisyContextOptions = field(default_factory=NoisyContextOptions)
    guidance_free: GuidanceFreeOptions = field(default_factory=GuidanceFreeOptions)
    contrastive: ContrastiveOptions = field(default_factory=ContrastiveOptions)
    clusters: ClustersOptions = field(default_factory=ClustersOptions)
    random_order: RandomOrderOptions = field(default_factory=RandomOrderOptions)

    def __post_init__(self) -> None:
        for part in fields(self):
            value = getattr(self, part.name)
            if part.name not in ("kind", self.kind) and value != type(value)():
                raise ValueError(f"objective.{part.name} is set, but objective.kind is {self.kind}")

    @property
    def loss(self) -> type[Objective]:
        """The class of the objective."""
        return LOSSES[self.kind]


def build_objective(
    config: ObjectiveConfig,
    gpt: GPT,
    chunk: int,
    seed: int,
    codebook: torch.Tensor | None,
    images: int,
) -> Objective:
    """The objective of a configuration, on a model; call its `prepare` when it has memory.

    codebook: the tokenizer's vectors (vocab, dim), for an objective that needs them.
    images: how many images the training data have.
    Raises InputError where the objective cannot train this model.
    """
    given = (gpt, chunk, seed)
    match config.kind:
        case "next_token":
            objective = NextTokenLoss(*given)
        case "next_patch":
            objective = NextPatchLoss(*given, config.next_patch)
        case "alignment":
            objective = AlignmentLoss(*given, config.alignment)
        case "noisy_context":
            objective = NoisyContextLoss(*given, config.noisy_context)
        case "guidance_free":
            objective = GuidanceFreeLoss(*given, config.guidance_free)
        case "contrastive":
            objective = ContrastiveLoss(*given, config.contrastive)
        case "clusters":
            objective = ClustersLoss(*given, config.clusters)
        case "random_order":
            objective = RandomOrderLoss(*given, config.random_order)
    objective.check(gpt.config, images)
    if codebook is not None:
        objective.add_heads(codebook.shape[1])
    return objective
