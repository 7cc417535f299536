"""Text features on disk: folders of language.encode, or the reference's one file per caption."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.config import InputError
from core.data.arrays import load_array
from core.data.image_text import CaptionError
from core.data.shards import ShardReader, map_array, read_index
from language.t5 import pad

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
INDEX_FIELDS = {"variants": list[str], "dim": int, "max_tokens": int, "dtype": str}  # of index.json


class FeatureDataset:
    """A memory-mapped folder of language.encode.

    ids: numbers of the images that have captions, (n,) int64, ascending. variants: names of the
    captions of an image. dim: width of the features. max_tokens: longest caption. index: the
    content of index.json.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.index: dict[str, Any] = read_index(self.folder, INDEX_FIELDS)
        if not self.index["variants"] or self.index["dtype"] not in DTYPES:
            raise InputError(f"{folder}/index.json: variants or dtype are not of language.encode")
        self.dim, self.max_tokens = self.index["dim"], self.index["max_tokens"]
        self.variants = tuple(self.index["variants"])
        self.ids = self._all("ids")
        self.lengths = self._all("lengths")
        expected = (len(self.ids), len(self.variants))
        integers = self.ids.dtype.kind in "iu" and self.lengths.dtype.kind in "iu"
        if self.ids.ndim != 1 or self.lengths.shape != expected or not integers:
            raise InputError(f"{folder}: ids and lengths are not integers of shape {expected}")
        if self.lengths.min() < 1 or self.lengths.max() > self.max_tokens:
            raise InputError(f"{folder}: lengths are not in 1 .. {self.max_tokens}")
        if (np.diff(self.ids) <= 0).any():
            raise InputError(f"{folder}: ids are not ascending")
        rows = self.index["rows"]
        self._shard = np.repeat(np.arange(len(rows)), rows)
        starts = np.zeros(self.lengths.size, np.int64)
        self._shards = []
        first = 0
        for shard, count in enumerate(rows):
            size = count * len(self.variants)
            here = self.lengths.reshape(-1)[first : first + size].astype(np.int64)
            starts[first : first + size] = np.cumsum(here) - here
            path = self.folder / f"features_{shard:05d}.npy"
            features = map_array(path, int(here.sum()))
            if features.shape[1:] != (self.dim,) or features.dtype != np.int16:
                raise InputError(
                    f"{path}: {features.dtype} {features.shape}, expected int16 (n, {self.dim})"
                )
            self._shards.append(features)
            first += size
        self._starts = starts.reshape(self.lengths.shape)

    def _all(self, name: str) -> np.ndarray:
        reader = ShardReader(self.folder, name)
        return reader[np.arange(len(reader))]

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, ids: np.ndarray, variants: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Image numbers (n,), variants (n,) -> features (n, T, dim), lengths (n,) int64.

        Raises InputError for an image without a caption.
        """
        rows = np.searchsorted(self.ids, ids)
        if len(ids) and (rows.max() >= len(self.ids) or (self.ids[rows] != ids).any()):
            raise InputError(f"{self.folder}: no caption for some of the requested images")
        dtype = DTYPES[self.index["dtype"]]
        found = []
        for row, variant in zip(rows.tolist(), variants.tolist(), strict=True):
            start = self._starts[row, variant]
            bits = self._shards[self._shard[row]][start : start + self.lengths[row, variant]]
            found.append(torch.from_numpy(bits.copy()).view(dtype))
        return pad(found)


class ReferenceFeatures:
    """The reference's layout: FOLDER/{jsonl stem}/{line:09d}.npy, float (1, tokens, dim).

    dim, identity ("": unknown) and cut: see language.t5.T5.
    """

    identity = ""

    def __init__(self, folder: Path, max_tokens: int) -> None:
        self.folder, self.max_tokens, self.cut = Path(folder), max_tokens, 0
        first = next(self.folder.rglob("*.npy"), None)
        if first is None:
            raise InputError(f"{folder}: contains no .npy features")
        self.dim = self._load(first).shape[1]

    def read(self, key: str) -> torch.Tensor:
        """Features (tokens, dim) float32 of an image; raises CaptionError if there are none."""
        path = self.folder / f"{key}.npy"
        if not path.is_file():
            raise CaptionError("no features")
        features = self._load(path)
        self.cut += len(features) > self.max_tokens
        return torch.from_numpy(features[: self.max_tokens].astype(np.float32))

    def _load(self, path: Path) -> np.ndarray:
        array = load_array(path)
        if array.ndim != 3 or array.shape[0] != 1 or not array.size or array.dtype.kind != "f":
            raise InputError(
                f"{path}: {array.dtype} {array.shape}, expected features (1, tokens, dim)"
            )
        return array[0]
