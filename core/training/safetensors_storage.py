"""The storage of torch.distributed.checkpoint (DCP): one complete safetensors file per part.

DCP plans which process writes and reads which piece of which tensor; this module stores them. DCP's
own storages do not fit: its file storage keeps an index as a pickle, which runs code when it is
read, and its safetensors storage writes one file per process, which inference cannot read before
they are merged. Here every process writes its pieces directly to their positions in the file.
Therefore the bytes of a checkpoint are the same for every strategy and number of processes, and
`model.safetensors` is both the checkpoint and the file to release.

Tensors are named "part/name". Pieces are ranges of rows, because FSDP2 shards rows.
"""

import json
import math
import os
import sys
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from core.config import InputError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

Shape = tuple[int, ...]


class SafetensorsWriter(StorageWriter):
    """Writes every part to its file. files: the path of each part."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.files = files

    def reset(self, checkpoint_id: Any = None) -> None:  # noqa: ANN401
        """Part of DCP's interface; does nothing, because there is no state."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Part of DCP's interface."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Part of DCP's interface."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the coordinator, which knows all pieces: create the files and assign positions."""
        tensors: dict[str, tuple[torch.dtype, Shape]] = {}
        for item in (item for plan in plans for item in plan.items):
            assert item.tensor_data is not None, f"{item.index.fqn} is no tensor"
            data = item.tensor_data
            tensors[item.index.fqn] = (data.properties.dtype, tuple(data.size))
        starts = {}
        for part, path in self.files.items():
            prefix = f"{part}/"
            mine = {key: value for key, value in tensors.items() if key.startswith(prefix)}
            starts |= _create_file(path, mine, prefix)
        # Network file systems write whole pages, and so overwrite bytes of other processes, unless
        # a file is opened for synchronous writes.
        flags = os.O_DSYNC if sum(bool(plan.items) for plan in plans) > 1 else 0
        return [replace(plan, storage_data=(starts, flags)) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this process's pieces."""
        lower_thread_priority()
        starts, flags = plan.storage_data
        open_files = {part: os.open(path, os.O_WRONLY | flags) for part, path in self.files.items()}
        results = []
        try:
            for item in plan.items:
                assert item.tensor_data is not None
                chunk, size = item.tensor_data.chunk, item.tensor_data.size
                assert chunk.sizes[1:] == size[1:], f"{item.index.fqn}: not sharded by rows"
                tensor = planner.resolve_data(item)
                assert isinstance(tensor, torch.Tensor)
                raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
                rows = chunk.offsets[0] if chunk.offsets else 0
                start = starts[item.index.fqn] + rows * math.prod(size[1:]) * tensor.element_size()
                _write_at(open_files[item.index.fqn.split("/", 1)[0]], raw.data, start)
                results.append(WriteResult(item.index, len(raw), None))
            for descriptor in open_files.values():
                os.fsync(descriptor)
        finally:
            for descriptor in open_files.values():
                os.close(descriptor)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Part of DCP's interface; does nothing, because the headers of the files tell all."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:  # noqa: ANN401
        """Part of DCP's interface."""
        return True


class SafetensorsReader(StorageReader):
    """Reads pieces of the files, which any number of processes may have written."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.files = files

    def reset(self, checkpoint_id: Any = None) -> None:  # noqa: ANN401
        """Part of DCP's interface; does nothing, because there is no state."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:  # noqa: ANN401
        """Describe each tensor as one piece, from the headers of the files."""
        tensors = {}
        for name, (dtype, shape) in read_headers(self.files).items():
            whole = ChunkStorageMetadata(torch.Size([0] * len(shape)), torch.Size(shape))
            tensors[name] = TensorStorageMetadata(
                TensorProperties(dtype=dtype), torch.Size(shape), [whole]
            )
        return Metadata(tensors)

    def set_up_storage_reader(self, metadata: Metadata, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Part of DCP's interface."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Part of DCP's interface."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Part of DCP's interface."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy the pieces that this process holds into its tensors."""
        for part, path in self.files.items():
            with safe_open(path, framework="pt") as file:
                for item in plan.items:
                    owner, name = item.storage_index.fqn.split("/", 1)
                    if owner != part:
                        continue
                    ranges = zip(item.storage_offsets, item.lengths, strict=True)
                    piece = tuple(slice(start, start + length) for start, length in ranges)
                    target = planner.resolve_tensor(item)
                    stored = file.get_slice(name)[piece] if piece else file.get_tensor(name)
                    target.detach().copy_(stored)
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:  # noqa: ANN401
        """Part of DCP's interface."""
        return True


def read_headers(files: Mapping[str, Path]) -> dict[str, tuple[torch.dtype, Shape]]:
    """Every tensor's dtype and shape by "part/name"; raises InputError for a damaged file."""
    tensors = {}
    for part, path in files.items():
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    piece = file.get_slice(name)
                    tensors[f"{part}/{name}"] = (
                        _DTYPES[piece.get_dtype()],
                        tuple(piece.get_shape()),
                    )
        except (OSError, SafetensorError, KeyError) as error:
            raise InputError(f"{path}: missing or damaged ({error})") from error
    return tensors


def lower_thread_priority() -> None:
    """Lower the priority of this thread, so that training gets the processor first."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def _create_file(
    path: Path, tensors: Mapping[str, tuple[torch.dtype, Shape]], prefix: str
) -> dict[str, int]:
    """Create a safetensors file without its data -> the byte where each tensor starts."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts, position = {}, 0
    # The widest dtypes come first, as in safetensors, so that every tensor is aligned.
    for key in sorted(tensors, key=lambda key: (-tensors[key][0].itemsize, key)):
        dtype, shape = tensors[key]
        end = position + math.prod(shape) * dtype.itemsize
        header[key.removeprefix(prefix)] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [position, end],
        }
        starts[key], position = position, end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
    return {key: 8 + len(text) + start for key, start in starts.items()}


def _write_at(descriptor: int, data: memoryview, position: int) -> None:
    """Write all of `data`; one call of the system may write only a part."""
    while data:
        # In parts of 64 MiB, so that other threads of this process can use the disk in between.
        written = os.pwrite(descriptor, data[: 1 << 26], position)
        data, position = data[written:], position + written
