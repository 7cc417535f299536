"""Checkpoints of PyTorch Lightning that hold EMA weights besides the trained ones (SEED-Voken)."""

from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from core.errors import InputError
from core.hub import Weights

EMA_PREFIX = "model_ema."
EMA_SCALARS = ("decay", "num_updates")


def live_weights(
    state: Mapping[str, torch.Tensor],
    weights: Weights,
    path: Path,
    ignore: Collection[str] = (),
) -> dict[str, torch.Tensor]:
    """The weights of a Lightning state dict under their live names.

    The EMA of `a.b.weight` is stored as `model_ema.abweight`. "auto" takes
    EMA weights if there are any. ignore: prefixes of other modules, e.g. losses, to leave out.
    Raises InputError, which names the key, if the EMA of a weight or the weight of an EMA is
    missing.
    """
    live = {key: value for key, value in state.items() if not key.startswith((EMA_PREFIX, *ignore))}
    shadows = {
        key.removeprefix(EMA_PREFIX): value
        for key, value in state.items()
        if key.startswith(EMA_PREFIX) and key.removeprefix(EMA_PREFIX) not in EMA_SCALARS
    }
    averaged = bool(shadows) or f"{EMA_PREFIX}decay" in state
    if weights == "model" or (weights == "auto" and not averaged):
        return live
    if not averaged:
        raise InputError(f"{path}: has no ema weights, only model")
    name_of = {key.replace(".", ""): key for key in live}
    ignored = tuple(prefix.replace(".", "") for prefix in ignore)
    for shadow in shadows.keys() - name_of.keys():
        if not (ignored and shadow.startswith(ignored)):
            raise InputError(f"{path}: {EMA_PREFIX}{shadow} is the average of no weight here")
    missing = sorted(name_of.keys() - shadows.keys())
    if missing:
        raise InputError(f"{path}: {EMA_PREFIX}{missing[0]} is missing")
    return {key: shadows[shadow] for shadow, key in name_of.items()}
