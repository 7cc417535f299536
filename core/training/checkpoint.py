"""Checkpoints: folders `step_0001000` that exist whole or not at all, with nothing pickled.

    step_0001000/
      config.yaml  model.safetensors  ema.safetensors     enough for inference
      training/                                           optimizers, discriminator, step
      checksums.json                                      sums of every file

torch.distributed.checkpoint copies the tensors to the CPU and writes them from a thread while
training goes on; each process copies and writes its own shards. A checkpoint is written to a
temporary folder, which is renamed at the end; the last k are kept. Damage is detected by the
checksums, and the checkpoint before is used instead.
"""

import logging
import os
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse, async_save

from core.checksums import FileSums, checkpoint_folders, find_damage, write_checksums
from core.config import InputError, save_config
from core.distributed.parallel import local, written_here
from core.distributed.world import TORCH_VERSION, World
from core.files import read_json, write_json
from core.training.safetensors_storage import (
    SafetensorsReader,
    SafetensorsWriter,
    Shape,
    lower_thread_priority,
    read_headers,
)
from core.weights import check_shapes, first_not_finite

logger = logging.getLogger(__name__)

STAGES_ONCE = TORCH_VERSION < (2, 13)  # a stager of older releases fails at its second checkpoint


class Checkpointer:
    """Saves and restores named parts: modules, and optimisers built from named parameters.

    The parts `model` and `ema` are for inference; all others go to `training/`. `config` is the
    model's configuration. Parts that are None are left out. The last `keep_last` checkpoints are
    kept, and those whose step is a multiple of `keep_every` are never deleted (None for none).
    Parts may be sharded: any strategy and number of processes can restore a checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        config: Any,  # noqa: ANN401 - any config dataclass
        world: World,
        keep_last: int,
        keep_every: int | None = None,
        **parts: nn.Module | torch.optim.Optimizer | None,
    ) -> None:
        self.folder, self.config, self.world = folder, config, world
        self.keep_last, self.keep_every = keep_last, keep_every
        self.parts = {name: part for name, part in parts.items() if part is not None}
        self._group = world.new_group()
        # DCP says so once per checkpoint in a world of one, where it is what is wanted.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._stager = _new_stager(world)
        self._copied: Future[None] | None = None
        self._saving: Future[str] | None = None
        self._problem = ""

    def save(self, step: int, **state: int) -> None:
        """Begin to write `step_{step}`, with `state`; all ranks call it and go on training.

        Do not modify any parameter until wait_for_copy() has returned. If a checkpoint cannot be
        written, a warning is logged and the checkpoint before stays as it is.
        Raises InputError where a weight is not finite.
        """
        self.wait()
        self._check_finite(step)
        temporary = self.folder / f".step_{step:07d}.tmp"
        if self.world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        if STAGES_ONCE:
            self._stager.close()
            self._stager = _new_stager(self.world)
        tensors, buffers = {}, False
        for part, value in self.parts.items():
            own = value.state_dict() if isinstance(value, nn.Module) else _optimizer_tensors(value)
            tensors |= {f"{part}/{n}": t for n, t in own.items() if written_here(t, self.world)}
            if isinstance(value, nn.Module):
                buffers |= len(own) > len(list(value.parameters()))
        if self.world.device.type == "cuda":  # the copy runs on a stream of its own
            torch.cuda.current_stream().synchronize()
        response = async_save(
            tensors,
            storage_writer=SafetensorsWriter(self._files(temporary)),
            planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True),
            process_group=self._group,
            async_stager=self._stager,
            no_dist=self.world.size == 1,
        )
        assert isinstance(response, AsyncSaveResponse)
        self._copied = response.staging_completion
        written = response.upload_completion
        self._saving = self._thread.submit(self._commit, written, step, temporary, state)
        if buffers:  # a forward pass changes them: BatchNorm's statistics
            self.wait_for_copy()

    def _check_finite(self, step: int) -> None:
        """Raise InputError, the same on all ranks, unless all weights are finite (a host sync)."""
        modules = {n: part for n, part in self.parts.items() if isinstance(part, nn.Module)}
        weights = {
            f"{n}/{k}": t for n, part in modules.items() for k, t in part.state_dict().items()
        }
        here = first_not_finite({name: local(tensor) for name, tensor in weights.items()})
        if name := next(filter(None, self.world.gather(here, self._group)), ""):
            raise InputError(
                f"{name} is not finite after step {step}, so no checkpoint of it is saved; the one "
                "before stays. Lower optimizer.lr, then run the same command again"
            )

    def wait_for_copy(self) -> None:
        """Wait until the parameters may be modified; call it before every optimizer step.

        The copy to the CPU overlaps with the forward and backward pass that follow a save.
        """
        if self._copied is not None:
            self._copied.result()
            self._copied = None

    @property
    def saving(self) -> bool:
        """Whether a checkpoint is still being written."""
        return self._saving is not None and not self._saving.done()

    def wait(self) -> None:
        """Wait until the checkpoint that is being written exists, or has failed."""
        self.wait_for_copy()
        if self._saving is not None:
            self._problem, self._saving = self._saving.result(), None

    def finish(self) -> None:
        """Wait for all ranks, and raise OSError if the last checkpoint could not be written."""
        self.wait()
        self.world.barrier()  # a launcher may kill the others as soon as one has ended
        if self._problem:
            raise OSError(self._problem)

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        return list(checkpoint_folders(self.folder))

    def restore_latest(self) -> dict[str, int]:
        """Load the newest intact checkpoint into the parts -> its state ({"step": 0} for none).

        Raises InputError if there are checkpoints and none is intact.
        """
        if self.world.is_main:
            for unfinished in self.folder.glob(".step_*.tmp"):
                shutil.rmtree(unfinished, ignore_errors=True)
        steps = self.world.broadcast(self.steps())
        for step in reversed(steps):
            folder = self.folder / f"step_{step:07d}"
            found = self.world.gather(find_damage(folder, self.world.rank, self.world.size))
            if damage := next(filter(None, found), ""):
                if self.world.is_main:
                    logger.warning("%s is damaged (%s); trying the one before", folder, damage)
                continue
            self._load(folder)
            return read_json(folder / "training" / "state.json")
        if steps:
            raise InputError(f"{self.folder}: no checkpoint is intact; remove them to start again")
        return {"step": 0}

    def _files(self, folder: Path) -> dict[str, Path]:
        """Where each part lies."""
        inference = ("model", "ema")
        return {
            part: (folder if part in inference else folder / "training") / f"{part}.safetensors"
            for part in self.parts
        }

    def _commit(
        self, written: Future[Any], step: int, temporary: Path, state: dict[str, int]
    ) -> str:
        """In the thread of every rank: checksums, then the rename -> what went wrong, or ""."""
        lower_thread_priority()
        problem, sums = "", {}
        try:
            written.result()
            mine = list(self._files(temporary).values())[self.world.rank :: self.world.size]
            if self.world.is_main:
                (temporary / "training").mkdir(exist_ok=True)
                mine += [temporary / "config.yaml", temporary / "training" / "state.json"]
                save_config(self.config, mine[-2])
                write_json(mine[-1], {"step": step, **state})
            sums = {str(path.relative_to(temporary)): FileSums.of(path) for path in mine}
        except CheckpointException as error:
            problem = str(next(iter(error.failures.values()))[0])
        except OSError as error:
            problem = str(error)
        reports = self.world.gather((problem, sums), self._group)
        problem = next((problem for problem, _ in reports if problem), "")
        if not self.world.is_main:
            return problem
        try:
            if not problem:
                sums = {name: value for _, part in reports for name, value in part.items()}
                write_checksums(temporary, sums)
                self._publish(temporary, self.folder / f"step_{step:07d}")
                return ""
        except OSError as error:
            problem = str(error)
        shutil.rmtree(temporary, ignore_errors=True)
        last = [old for old in self.steps() if old != step][-1:]
        kept = f"the checkpoint of step {last[0]} is intact" if last else "none exists yet"
        problem = (
            f"cannot save the checkpoint of step {step} in {self.folder}: {problem}; {kept}. Is "
            "the disk full? Then free space there: the next checkpoint is tried again"
        )
        logger.warning("%s", problem)
        return problem

    def _publish(self, temporary: Path, final: Path) -> None:
        """Rename a whole checkpoint into its place, then remove old ones."""
        for path in (
            *(path for path in temporary.rglob("*.[jy]*")),
            temporary / "training",
            temporary,
        ):
            _sync(path)
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
        _sync(self.folder)
        for old in self.steps()[: -self.keep_last]:
            if self.keep_every is None or old % self.keep_every:
                shutil.rmtree(self.folder / f"step_{old:07d}")

    def _load(self, folder: Path) -> None:
        files = self._files(folder)
        stored = {name: shape for name, (_, shape) in read_headers(files).items()}
        tensors = {}
        for part, value in self.parts.items():
            prefix = f"{part}/"
            shapes = {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
            if isinstance(value, nn.Module):
                check_shapes(value, shapes, files[part])
                own = value.state_dict()
            else:
                own = _allocate_state(value, shapes, files[part])
            tensors |= {prefix + name: tensor for name, tensor in own.items()}
        load(
            tensors,
            storage_reader=SafetensorsReader(files),
            process_group=self._group,
            no_dist=self.world.size == 1,
        )


def _sync(path: Path) -> None:
    """Have a file's or a folder's content on the disk before what comes next."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _new_stager(world: World) -> DefaultStager:
    """Copies the tensors of a checkpoint to buffers on the CPU, pinned for a GPU, that it keeps."""
    gpu = world.device.type == "cuda"
    return DefaultStager(
        StagingOptions(
            use_pinned_memory=gpu,
            use_shared_memory=False,
            use_async_staging=True,
            use_non_blocking_copy=gpu,
        )
    )


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """An optimiser's state as "{slot}/{parameter name}" -> tensor."""
    tensors = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            for slot, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{slot}/{name}"] = value
    return tensors


def _allocate_state(
    optimizer: torch.optim.Optimizer, shapes: dict[str, Shape], path: Path
) -> dict[str, torch.Tensor]:
    """Make room for stored slots, sharded like their parameters -> what to read into."""
    parameters = {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }
    stored = {key.split("/", 1)[1] for key in shapes}
    if stored and stored != set(parameters):
        wrong = sorted(stored ^ set(parameters))
        raise InputError(f"{path}: state of other parameters ({wrong[0]}, ... {len(wrong)} in all)")
    optimizer.state.clear()
    for key, shape in shapes.items():
        slot, name = key.split("/", 1)
        parameter = parameters[name]
        if shape == tuple(parameter.shape):
            room = torch.zeros_like(parameter, requires_grad=False)
        else:
            room = torch.zeros(shape, device=parameter.device)  # the count of steps
        optimizer.state[parameter][slot] = room
    return _optimizer_tensors(optimizer)
