"""Arrays on disk in shards with an `index.json`: codes, features, sampled pixels.

A shard covers a fixed range of item numbers, whatever the number of processes. It is finished when
its `shard_00003.json` exists, which is written last; so a killed command loses one shard at most,
and shards can be shared out over any number of ranks. `index.json` is written when all are there.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core.config import InputError
from core.distributed.world import World
from core.files import atomic_write, read_json, write_json


@dataclass(frozen=True)
class ShardWriter:
    """Writes `{name}_{shard}.npy` for items 0 .. count-1, `shard_size` items a shard.

    `settings` is what the arrays depend on: a folder begun with other settings is refused.
    """

    folder: Path
    count: int
    shard_size: int
    settings: Mapping[str, Any]
    world: World

    def begin(self) -> list[int]:
        """Make or check the folder -> the shards that this rank has still to write."""
        if self.world.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            expected = {**self.settings, "items": self.count, "shard_size": self.shard_size}
            path = self.folder / "settings.json"
            if path.exists() and (found := read_json(path)) != json.loads(json.dumps(expected)):
                different = sorted(k for k in expected | found if expected.get(k) != found.get(k))
                raise InputError(
                    f"{self.folder}: was begun with other settings ({', '.join(different)}); "
                    "choose another folder or remove it"
                )
            write_json(path, expected)
        return self._share(written=False)

    def finished(self) -> list[int]:
        """This rank's share of the shards that an earlier run wrote; call it before `begin`."""
        return self._share(written=True)

    def _share(self, written: bool) -> list[int]:
        # One rank looks: another's would already miss what a third has just written.
        shards = range(math.ceil(self.count / self.shard_size))
        found = [s for s in shards if self._marker(s).exists() == written]
        return self.world.broadcast(found)[self.world.rank :: self.world.size]

    def items(self, shard: int) -> range:
        """The item numbers of a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.count))

    def write(
        self,
        shard: int,
        arrays: Mapping[str, np.ndarray],
        ragged: Mapping[str, np.ndarray] | None = None,
        **facts: Any,  # noqa: ANN401 - any JSON value
    ) -> None:
        """Write a shard's arrays (equal first dimension), then its marker with `facts`.

        ragged: arrays with another first dimension, which ShardReader does not read.
        """
        rows = {len(array) for array in arrays.values()}
        assert len(rows) == 1, f"arrays of different lengths: {rows}"
        for name, array in {**arrays, **(ragged or {})}.items():
            path = self.folder / f"{name}_{shard:05d}.npy"
            with atomic_write(path) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
        write_json(self._marker(shard), {"rows": rows.pop(), "arrays": sorted(arrays), **facts})

    def read(self, shard: int, name: str) -> np.ndarray:
        """An array of a shard that has been written."""
        path = self.folder / f"{name}_{shard:05d}.npy"
        try:
            return np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: missing or damaged ({error})") from error

    def markers(self) -> list[dict[str, Any]]:
        """What `write` noted of every shard; call it when all ranks have finished."""
        return [read_json(self._marker(s)) for s in range(math.ceil(self.count / self.shard_size))]

    def finish(self, index: Mapping[str, Any]) -> None:
        """Write `index.json` (call on all ranks): the settings, `index` and the rows per shard."""
        self.world.barrier()
        if self.world.is_main:
            rows = [marker["rows"] for marker in self.markers()]
            whole = {**self.settings, **index, "count": sum(rows), "rows": rows}
            write_json(self.folder / "index.json", whole)
        self.world.barrier()

    def _marker(self, shard: int) -> Path:
        return self.folder / f"shard_{shard:05d}.json"


class ShardReader:
    """One array of a finished folder, memory-mapped: `reader[rows]` gathers any rows."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = Path(folder), name
        rows = read_index(self.folder)["rows"]
        self.starts = np.concatenate([[0], np.cumsum(rows)]).astype(np.int64)
        self._shards = [map_array(self._path(i), count) for i, count in enumerate(rows)]

    def _path(self, shard: int) -> Path:
        return self.folder / f"{self.name}_{shard:05d}.npy"

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def item_shape(self) -> tuple[int, ...]:
        """The shape of one row."""
        return self._shards[0].shape[1:]

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Row numbers (n,) -> (n, ...) in memory."""
        return self._gather(rows, (), self.item_shape)

    def pick(self, rows: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Of each row (n,) the one item (n,), e.g. a crop: reader[rows][range(n), items]."""
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
    """A memory-mapped npy of so many rows; raises InputError where it is missing or damaged."""
    try:
        array = np.load(path, mmap_mode="r" if rows else None, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: missing or damaged ({error})") from error
    if len(array) != rows:
        raise InputError(f"{path}: {len(array)} rows, expected {rows}")
    return array


def read_index(folder: Path) -> dict[str, Any]:
    """A folder's `index.json`; raises InputError where the command has not finished it."""
    path = Path(folder) / "index.json"
    if not path.is_file():
        unfinished = (Path(folder) / "settings.json").exists()
        advice = (
            "run the command that was writing it again" if unfinished else "is it the right folder?"
        )
        raise InputError(f"{folder}: no index.json ({advice})")
    return read_json(path)
