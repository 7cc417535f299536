"""Which objective a training uses, and the options of each.

An objective is one file of this folder, and one line here: the name of the file in `Kind`. The file
defines one subclass of Objective, whose first line of documentation is shown by --help, and the
dataclass of its options, if it has any.
"""

import dataclasses
import importlib
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from autoregressive.models.gpt import GPT
from autoregressive.objectives.base import Objective

Kind = Literal[
    "next_token",
    "next_patch",
    "alignment",
    "noisy_context",
    "guidance_free",
    "contrastive",
    "clusters",
    "random_order",
    "z_loss",
]


def _read_objective(kind: str) -> type[Objective]:
    """The one subclass of Objective that the file of this name defines."""
    module = importlib.import_module(f"autoregressive.objectives.{kind}")
    own = [v for v in vars(module).values() if getattr(v, "__module__", "") == module.__name__]
    (found,) = [v for v in own if isinstance(v, type) and issubclass(v, Objective)]
    return found


LOSSES: dict[str, type[Objective]] = {kind: _read_objective(kind) for kind in get_args(Kind)}


@dataclass(frozen=True)
class ObjectiveKind:
    """The training objective. Options of one that is not in use must have their defaults."""

    kind: Kind = "next_token"

    def __post_init__(self) -> None:
        for part in fields(self):
            value = getattr(self, part.name)
            if part.name not in ("kind", self.kind) and value != type(value)():
                raise ValueError(f"objective.{part.name} is set, but objective.kind is {self.kind}")

    @property
    def loss(self) -> type[Objective]:
        """The class of the objective."""
        return LOSSES[self.kind]


def _add_options(base: type[ObjectiveKind]) -> type[ObjectiveKind]:
    """The class with a field for the options of each objective that has any, documented."""
    groups = {kind: loss.options_type for kind, loss in LOSSES.items() if loss.options_type}
    kinds = [f"{kind}: {(loss.__doc__ or '').splitlines()[0]}" for kind, loss in LOSSES.items()]
    lines = ["kind: What is minimised.", *(f"    {line}" for line in kinds)]
    lines += [f"{kind}: Options of {kind}." for kind in groups]
    document = f"{base.__doc__}\n\n    Args:\n" + "".join(f"        {line}\n" for line in lines)
    return dataclasses.make_dataclass(
        "ObjectiveConfig",
        [(kind, group, field(default_factory=group)) for kind, group in groups.items()],
        bases=(base,),
        frozen=True,
        namespace={"__doc__": document, "__module__": __name__},
    )


if TYPE_CHECKING:

    class ObjectiveConfig(ObjectiveKind):
        """What _add_options returns, for type checkers."""

        def __init__(self, kind: Kind = "next_token", **options: Any) -> None: ...  # noqa: ANN401
else:
    ObjectiveConfig = _add_options(ObjectiveKind)


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
    options = getattr(config, config.kind, None)
    objective = config.loss(gpt, chunk, seed, options)
    objective.check(gpt.config, images)
    if codebook is not None:
        objective.add_heads(codebook.shape[1])
    return objective
