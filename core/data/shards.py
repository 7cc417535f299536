"""Arrays on disk in shards with an `index.json`: codes, features, sampled pixels.

A shard holds a fixed range of items, independent of the number of processes, so any number of
ranks can divide the shards among themselves. A shard is complete when its `shard_00003.json`
exists, which is written last: a killed command loses at most one shard per process. `index.json` is
written when all shards are complete.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core.config import InputError
from core.data.arrays import load_array
from core.distributed.world import World
from core.files import atomic_write, read_record, write_json


def codes_dtype(vocab_size: int) -> np.dtype:
    """The dtype in which codes of this vocabulary are stored: uint16 up to 65,536, then uint32."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


MARKER_FIELDS = {"rows": int}  # what a shard's marker has, whichever command wrote it


@dataclass(frozen=True)
class ShardWriter:
    """Writes `{name}_{shard}.npy` for items 0 .. count - 1, with `shard_size` items per shard.

    settings: everything that the arrays depend on. `begin` refuses a folder with other settings.
    """

    folder: Path
    count: int
    shard_size: int
    settings: Mapping[str, Any]
    world: World

    def begin(self) -> list[int]:
        """Create or check the folder -> the shards that this rank still has to write.

        Raises InputError if the folder was begun with other settings.
        """
        if self.world.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            expected = {**self.settings, "items": self.count, "shard_size": self.shard_size}
            path = self.folder / "settings.json"
            found = read_record(path, {}) if path.exists() else None
            if found is not None and found != json.loads(json.dumps(expected)):
                different = sorted(k for k in expected | found if expected.get(k) != found.get(k))
                raise InputError(
                    f"{self.folder}: was begun with other settings ({', '.join(different)}); "
                    "choose another folder or remove it"
                )
            write_json(path, expected)
        return self._share(written=False)

    def finished(self) -> list[int]:
        """This rank's share of the shards that an earlier run completed; call it before `begin`."""
        return self._share(written=True)

    def _share(self, written: bool) -> list[int]:
        # Rank 0 decides for all: other ranks may already be writing.
        shards = range(math.ceil(self.count / self.shard_size))
        found = [s for s in shards if self._marker(s).exists() == written]
        return self.world.broadcast(found)[self.world.rank :: self.world.size]

    def items(self, shard: int) -> range:
        """The items of a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.count))

    def write(
        self,
        shard: int,
        arrays: Mapping[str, np.ndarray],
        ragged: Mapping[str, np.ndarray] | None = None,
        **facts: Any,  # noqa: ANN401 - any JSON value
    ) -> None:
        """Write the arrays of a shard (equal first dimension), then its marker with `facts`.

        ragged: Arrays with another first dimension, which ShardReader cannot read.
        """
        rows = {len(array) for array in arrays.values()}
        assert len(rows) == 1, f"arrays of different lengths: {rows}"
        for name, array in {**arrays, **(ragged or {})}.items():
            path = self.folder / f"{name}_{shard:05d}.npy"
            with atomic_write(path) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
        write_json(self._marker(shard), {"rows": rows.pop(), "arrays": sorted(arrays), **facts})

    def read(self, shard: int, name: str) -> np.ndarray:
        """One array of a complete shard; raises InputError if it is missing or damaged."""
        return load_array(self.folder / f"{name}_{shard:05d}.npy")

    def markers(self, facts: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """The facts that `write` recorded for each shard; call it when all ranks have finished.

        facts: their names and types. Raises InputError for a damaged marker.
        """
        shards = range(math.ceil(self.count / self.shard_size))
        fields = {**MARKER_FIELDS, **(facts or {})}
        return [read_record(self._marker(shard), fields) for shard in shards]

    def finish(self, index: Mapping[str, Any]) -> None:
        """Write `index.json`: the settings, `index` and the rows per shard. All ranks call it."""
        self.world.barrier()
        if self.world.is_main:
            rows = [marker["rows"] for marker in self.markers()]
            whole = {**self.settings, **index, "count": sum(rows), "rows": rows}
            write_json(self.folder / "index.json", whole)
        self.world.barrier()

    def _marker(self, shard: int) -> Path:
        return self.folder / f"shard_{shard:05d}.json"


class ShardReader:
    """One array of a complete folder, memory-mapped; `reader[rows]` gathers rows in any order."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = Path(folder), name
        rows = read_index(self.folder)["rows"]
        if not sum(rows):
            raise InputError(f"{folder}: holds no rows")
        self.starts = np.concatenate([[0], np.cumsum(rows)]).astype(np.int64)
        self._shards = [map_array(self._path(i), count) for i, count in enumerate(rows)]
        for i, shard in enumerate(self._shards):
            first = self._shards[0]
            if (shard.dtype, shard.shape[1:]) != (first.dtype, first.shape[1:]):
                raise InputError(
                    f"{self._path(i)}: {shard.dtype} {shard.shape}, unlike that of shard 0: "
                    f"{first.dtype} {first.shape}"
                )

    def _path(self, shard: int) -> Path:
        return self.folder / f"{self.name}_{shard:05d}.npy"

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def item_shape(self) -> tuple[int, ...]:
        """The shape of one row."""
        return self._shards[0].shape[1:]

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Row numbers (n,) -> their values (n, ...) in memory."""
        return self._gather(rows, (), self.item_shape)

    def pick(self, rows: np.ndarray, items: np.ndarray) -> np.ndarray:
        """One item of each row, e.g. one crop: equals reader[rows][range(n), items]."""
        return self._gather(rows, (items,), self.item_shape[1:])

    def _gather(
        self, rows: np.ndarray, items: tuple[np.ndarray, ...], shape: tuple[int, ...]
    ) -> np.ndarray:
        shards = np.searchsorted(self.starts, rows, side="right") - 1
        result = np.empty((len(rows), *shape), self._shards[0].dtype)
        for shard in np.unique(shards):
            here = shards == shard
            chosen = tuple(index[here] for index in items)
            result[here] = self._shards[shard][(rows[here] - self.starts[shard], *chosen)]
        return result


def map_array(path: Path, rows: int) -> np.ndarray:
    """Memory-map an npy of `rows` rows; raises InputError if it is missing or damaged."""
    array = load_array(path, mapped=True)
    if array.shape[:1] != (rows,):
        raise InputError(f"{path}: an array of shape {array.shape}, expected {rows} rows")
    return array


def read_index(folder: Path, fields: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The `index.json` of a folder, with at least `fields`, a type for each key.

    Raises InputError if the folder is incomplete, or a field is missing or of another type.
    """
    path = Path(folder) / "index.json"
    if not path.is_file():
        unfinished = (Path(folder) / "settings.json").exists()
        advice = (
            "run the command that was writing it again" if unfinished else "is it the right folder?"
        )
        raise InputError(f"{folder}: no index.json ({advice})")
    return read_record(path, {"rows": list[int], **(fields or {})})
