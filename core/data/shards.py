"""Arrays on disk in shards with an `index.json`: codes, features, sampled pixels.

A shard holds a fixed range of items, independent of the number of processes, so any number of
ranks can divide the shards among themselves. A shard is complete when its `shard_00003.json`
exists, which is written last: a killed command loses at most one shard per process. It holds the
size and sha256 of the shard's files, which are compared when a command continues: a damaged shard
is made again. `index.json` is written when all shards are complete.
"""

import functools
import hashlib
import io
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from core.config import InputError
from core.data.arrays import load_array
from core.distributed.world import World
from core.files import atomic_write, file_sha256, read_json, read_record, write_json

logger = logging.getLogger(__name__)


def codes_dtype(vocab_size: int) -> np.dtype:
    """The dtype in which codes of this vocabulary are stored: uint16 up to 65,536, then uint32."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


MARKER_FIELDS = {"rows": int}  # what a shard's marker has, whichever command wrote it


@dataclass(frozen=True)
class ShardWriter:
    """Writes `{name}_{shard}.npy` for items 0 .. count - 1, with `shard_size` items per shard.

    settings: everything that the arrays depend on. `begin` refuses a folder with other settings.
    earlier: values of settings that folders of older versions may have instead; None: not there.
    remarks: settings that may differ, each with the warning that the user then gets.
    """

    folder: Path
    count: int
    shard_size: int
    settings: Mapping[str, Any]
    world: World
    earlier: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    remarks: Mapping[str, str] = field(default_factory=dict)

    def begin(self) -> list[int]:
        """Create or check the folder -> the shards that this rank still has to write.

        Raises InputError if the folder was begun with other settings.
        """
        if self.world.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            expected = {**self.settings, "items": self.count, "shard_size": self.shard_size}
            path = self.folder / "settings.json"
            if path.exists():
                self._check_settings(read_record(path, {}), json.loads(json.dumps(expected)))
            write_json(path, expected)
        self.world.barrier()
        todo = self._share(written=False)
        if self.world.is_main and len(self._intact) < len(self._shards):
            (self.folder / "index.json").unlink(missing_ok=True)  # of arrays that are incomplete
        return todo

    def finished(self) -> list[int]:
        """This rank's share of the shards that an earlier run completed; call it after `begin`."""
        return self._share(written=True)

    def _check_settings(self, found: Any, expected: dict[str, Any]) -> None:  # noqa: ANN401 - JSON
        if not isinstance(found, dict):
            raise InputError(f"{self.folder / 'settings.json'}: damaged; remove the folder")
        different = sorted(
            key
            for key in expected | found
            if expected.get(key) != found.get(key)
            and found.get(key) not in self.earlier.get(key, ())
            and key not in self.remarks
        )
        if different:
            raise InputError(
                f"{self.folder}: was begun with other settings ({', '.join(different)}); "
                "choose another folder or remove it"
            )
        for key, remark in self.remarks.items():
            if found.get(key) not in (None, expected.get(key)):  # None: of an older version
                logger.warning("%s: %s", self.folder, remark)

    def _share(self, written: bool) -> list[int]:
        found = [s for s in self._shards if (s in self._intact) == written]
        return found[self.world.rank :: self.world.size]

    @functools.cached_property
    def _shards(self) -> range:
        return range(math.ceil(self.count / self.shard_size))

    @functools.cached_property
    def _intact(self) -> frozenset[int]:
        """The shards that are complete before this run writes any; all ranks read a share."""
        mine = self._shards[self.world.rank :: self.world.size]
        marked = [shard for shard in mine if self._marker(shard).exists()]
        checked = {shard: self._damage(shard) for shard in marked}
        everywhere = {s: found for part in self.world.gather(checked) for s, found in part.items()}
        damaged = {shard: damage for shard, damage in sorted(everywhere.items()) if damage}
        if damaged and self.world.is_main:
            logger.warning(
                "%s: %d damaged shard%s, to be made again (%s)",
                self.folder,
                len(damaged),
                "" if len(damaged) == 1 else "s",
                next(iter(damaged.values())),
            )
        return frozenset(everywhere) - frozenset(damaged)

    def _damage(self, shard: int, read: bool = True) -> str:
        """What is wrong with a shard that has a marker, or ""; read: compare checksums as well."""
        path = self._marker(shard)
        try:
            marker = read_json(path)
            if "files" not in marker:  # written by an older version
                return self._header_damage(shard, marker)
            for name, (size, sha256) in marker["files"].items():
                if (self.folder / name).stat().st_size != size:
                    return f"{name} is truncated"
                if read and file_sha256(self.folder / name) != sha256:
                    return f"{name} has changed"
        except FileNotFoundError as error:
            return f"{Path(str(error.filename)).name} is missing"
        except (InputError, KeyError, TypeError, ValueError, AttributeError) as error:
            return f"{path.name} is damaged ({error})"
        return ""

    def _header_damage(self, shard: int, marker: dict[str, Any]) -> str:
        """Without checksums: whether the arrays are as large as their headers say."""
        names = {f"{name}_{shard:05d}.npy" for name in marker["arrays"]}
        found = {path.name for path in self.folder.glob(f"*_{shard:05d}.npy")}
        for name in sorted(names | found):
            try:
                array = np.load(self.folder / name, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                return f"{name} is missing or damaged ({error})"
            if name in names and len(array) != marker["rows"]:
                return f"{name} has {len(array)} rows, expected {marker['rows']}"
        return ""

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
        self._marker(shard).unlink(missing_ok=True)  # of a damaged shard that is made again
        files = {}
        for name, array in {**arrays, **(ragged or {})}.items():
            path = self.folder / f"{name}_{shard:05d}.npy"
            files[path.name] = write_array(path, array)
        marker = {"rows": rows.pop(), "arrays": sorted(arrays), "files": files}
        write_json(self._marker(shard), {**marker, **facts})

    def read(self, shard: int, name: str) -> np.ndarray:
        """One array of a complete shard; raises InputError if it is missing or damaged."""
        return load_array(self.folder / f"{name}_{shard:05d}.npy")

    def markers(self, facts: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """The facts that `write` recorded for each shard; call it when all ranks have finished.

        facts: their names and types. Raises InputError for a damaged marker.
        """
        fields = {**MARKER_FIELDS, **(facts or {})}
        return [read_record(self._marker(shard), fields) for shard in self._shards]

    def finish(self, index: Mapping[str, Any]) -> None:
        """Write `index.json`: the settings, `index` and the rows per shard. All ranks call it.

        Raises InputError where a shard is not as large as it was written.
        """
        self.world.barrier()
        if self.world.is_main:
            for shard in self._shards:
                if damage := self._damage(shard, read=False):
                    raise InputError(f"{self.folder}: {damage}; run the same command again")
            rows = [marker["rows"] for marker in self.markers()]
            whole = {**self.settings, **index, "count": sum(rows), "rows": rows}
            write_json(self.folder / "index.json", whole)
        self.world.barrier()

    def _marker(self, shard: int) -> Path:
        return self.folder / f"shard_{shard:05d}.json"


def write_array(path: Path, array: np.ndarray) -> tuple[int, str]:
    """Write an npy file whole or not at all -> its size in bytes and its sha256."""
    header = io.BytesIO()
    array = np.ascontiguousarray(array)
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    # Not `tofile`: some file systems take a part of what it writes without an error.
    parts = header.getvalue(), array.reshape(-1).view(np.uint8).data
    digest = hashlib.sha256()
    with atomic_write(path) as file:
        for part in parts:
            digest.update(part)
            file.write(part)
        file.flush()
        size, expected = os.fstat(file.fileno()).st_size, sum(len(part) for part in parts)
        if size != expected:
            raise OSError(
                f"{path}: only {size} of {expected} bytes were written; is the disk full?"
            )
    return size, digest.hexdigest()


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
