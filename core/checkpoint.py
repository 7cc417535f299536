"""Checkpoints: folders `step_0001000` that exist whole or not at all, with nothing pickled.

    step_0001000/
      config.yaml  model.safetensors  ema.safetensors     enough for inference
      training/                                           optimisers, discriminator, step
      checksums.json                                      sha256 of every file

A checkpoint is written aside and renamed; the last k are kept. A damaged one is noticed by its
checksums and the one before it is used.
"""

import logging
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from core.config import InputError, save_config
from core.distributed import World
from core.shards import read_json, write_json
from core.weights import file_sha256, load_tensors, load_weights, save_tensors

Weights = Literal["auto", "model", "ema"]  # auto: the averaged ones where there are any

logger = logging.getLogger(__name__)


class Checkpointer:
    """Saves and restores named parts: modules, and optimisers built from named parameters.

    The parts `model` and `ema` are for inference; all others go to `training/`. `config` is the
    model's configuration. Parts that are None are left out.
    """

    def __init__(
        self,
        folder: Path,
        config: Any,  # noqa: ANN401 - any config dataclass
        world: World,
        keep_last: int,
        **parts: nn.Module | torch.optim.Optimizer | None,
    ) -> None:
        self.folder, self.config, self.world, self.keep_last = folder, config, world, keep_last
        self.parts = {name: part for name, part in parts.items() if part is not None}

    def save(self, step: int, **state: int) -> None:
        """Write `step_{step}`, holding `state`, then remove old ones. All ranks call it."""
        if self.world.is_main:
            final = self.folder / f"step_{step:07d}"
            aside = self.folder / f".{final.name}.tmp"
            shutil.rmtree(aside, ignore_errors=True)
            try:
                self._write(aside, {"step": step, **state})
                if final.exists():
                    shutil.rmtree(final)
                os.replace(aside, final)
            except OSError as error:
                shutil.rmtree(aside, ignore_errors=True)
                last = self.steps()[-1:]
                kept = f"the checkpoint of step {last[0]} is intact" if last else "none exists yet"
                raise OSError(
                    f"cannot save the checkpoint of step {step}: {error}; {kept}"
                ) from error
            for old in self.steps()[: -self.keep_last]:
                shutil.rmtree(self.folder / f"step_{old:07d}")
        self.world.barrier()

    def steps(self) -> list[int]:
        """The steps that have a whole checkpoint, ascending."""
        found = self.folder.glob("step_*/checksums.json")
        return sorted(int(path.parent.name.removeprefix("step_")) for path in found)

    def restore_latest(self) -> dict[str, int]:
        """Load the newest intact checkpoint into the parts -> its state ({"step": 0} for none).

        Raises InputError where there are checkpoints and none is intact.
        """
        step = self.world.broadcast(self._newest_intact() if self.world.is_main else None)
        if step is None:
            return {"step": 0}
        folder = self.folder / f"step_{step:07d}"
        for name, part in self.parts.items():
            path = self._file(folder, name)
            if isinstance(part, nn.Module):
                load_weights(part, load_tensors(path), path)
            else:
                _load_optimizer(part, load_tensors(path), path)
        return read_json(folder / "training" / "state.json")

    def _newest_intact(self) -> int | None:
        for step in reversed(self.steps()):
            folder = self.folder / f"step_{step:07d}"
            if damage := find_damage(folder):
                logger.warning("%s is damaged (%s); trying the one before", folder, damage)
            else:
                return step
        if self.steps():
            raise InputError(f"{self.folder}: no checkpoint is intact; remove them to start anew")
        return None

    def _file(self, folder: Path, name: str) -> Path:
        inside = folder if name in ("model", "ema") else folder / "training"
        return inside / f"{name}.safetensors"

    def _write(self, folder: Path, state: dict[str, int]) -> None:
        (folder / "training").mkdir(parents=True)
        for name, part in self.parts.items():
            tensors = part.state_dict() if isinstance(part, nn.Module) else _optimizer_tensors(part)
            save_tensors(tensors, self._file(folder, name))
        save_config(self.config, folder / "config.yaml")
        write_json(folder / "training" / "state.json", state)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        for path in files:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        sums = {str(path.relative_to(folder)): file_sha256(path) for path in files}
        write_json(folder / "checksums.json", sums)


def inference_files(folder: Path, weights: Weights) -> tuple[Path, Path]:
    """(config.yaml, safetensors file) of a checkpoint folder, or of a run's newest checkpoint.

    "auto" takes the averaged weights where there are any.
    """
    folder = Path(folder)
    steps = sorted(folder.glob("checkpoints/step_*/checksums.json"))
    folder = steps[-1].parent if steps else folder
    name = "ema" if weights == "auto" and (folder / "ema.safetensors").exists() else weights
    path = folder / f"{'model' if name == 'auto' else name}.safetensors"
    if not path.is_file() or not (folder / "config.yaml").is_file():
        raise InputError(f"{folder}: no checkpoint here (expected config.yaml and {path.name})")
    return folder / "config.yaml", path


def find_damage(folder: Path) -> str:
    """What is wrong with a checkpoint folder, or "" where every file matches its checksum."""
    try:
        sums = read_json(folder / "checksums.json")
        for name, expected in sums.items():
            if file_sha256(folder / name) != expected:
                return f"{name} has changed"
    except (InputError, OSError, AttributeError) as error:
        return str(error)
    return ""


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """An optimiser's state as "{slot}/{parameter name}" -> tensor."""
    tensors = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            for slot, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{slot}/{name}"] = value
    return tensors


def _load_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], path: Path
) -> None:
    slots: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        slot, name = key.split("/", 1)
        slots.setdefault(name, {})[slot] = value
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    if slots and set(slots) != set(names):
        wrong = sorted(set(slots) ^ set(names))
        raise InputError(f"{path}: state of other parameters ({wrong[0]}, ... {len(wrong)} in all)")
    # load_state_dict numbers the parameters in the order of the groups, and moves them to devices.
    state = {i: slots[name] for i, name in enumerate(names) if name in slots}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
