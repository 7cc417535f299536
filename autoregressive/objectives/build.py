"""From the configuration of an objective to the objective."""

import importlib
from typing import get_args

import torch

from autoregressive.models.gpt import GPT
from autoregressive.objectives.base import Objective
from autoregressive.objectives.config import Kind, ObjectiveConfig
from core.errors import InputError


def _read_objective(kind: str) -> type[Objective]:
    """The one subclass of Objective that the file of this name defines."""
    module = importlib.import_module(f"autoregressive.objectives.{kind}")
    own = [v for v in vars(module).values() if getattr(v, "__module__", "") == module.__name__]
    (found,) = [v for v in own if isinstance(v, type) and issubclass(v, Objective)]
    return found


LOSSES: dict[str, type[Objective]] = {kind: _read_objective(kind) for kind in get_args(Kind)}


def check_order(config: ObjectiveConfig, parallel_regions: int | None) -> None:
    """Raise InputError for an objective of raster order, for a model with parallel_regions."""
    if parallel_regions and LOSSES[config.kind].raster_order:
        raise InputError(
            f"objective.kind {config.kind} and model.parallel_regions {parallel_regions} have "
            "different orders of codes: leave one of them out"
        )


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
    check_order(config, gpt.config.parallel_regions)
    objective = LOSSES[config.kind](gpt, chunk, seed, config.options)
    objective.check(gpt.config, images)
    if codebook is not None:
        objective.add_heads(codebook.shape[1])
    return objective
