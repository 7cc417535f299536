"""Codes and labels for training: our shards, or the reference's one file per image."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from core.config import InputError
from core.randomness import random_uniform
from core.shards import ShardReader, read_index

CROP_STREAM = 1  # tells the draws of one training position apart
DROP_STREAM = 2


@dataclass(frozen=True)
class CodesConfig:
    """Where the codes are.

    Args:
        codes: Folders of tokenizer.encode. Several must hold the same images in the same order,
            e.g. at two crop ranges: each sample is taken from one of them at random.
        labels: Only for the reference's layout: the label folder of each code folder, both with
            one `{i}.npy` per image. Vocabulary and classes then come from the next two fields.
        vocab_size: Entries of the codebook, for the reference's layout.
        num_classes: Classes, for the reference's layout.
    """

    codes: tuple[Path, ...]
    labels: tuple[Path, ...] = ()
    vocab_size: int = 16384
    num_classes: int = 1000

    def __post_init__(self) -> None:
        if not self.codes:
            raise ValueError("data.codes: give at least one folder")
        if self.labels and len(self.labels) != len(self.codes):
            raise ValueError("data.labels: give one label folder per code folder")


class _Source(Protocol):
    """Codes (rows, crops, tokens) of one folder."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: np.ndarray) -> np.ndarray: ...

    @property
    def item_shape(self) -> tuple[int, ...]: ...

    def pick(self, rows: np.ndarray, items: np.ndarray) -> np.ndarray: ...


class ReferenceCodes:
    """The reference's layout: `{i}.npy`, int64 (1, crops, tokens), one file per image."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise InputError(f"{folder}: no such folder")
        self.size = sum(1 for path in self.folder.iterdir() if path.suffix == ".npy")
        missing = [i for i in (0, self.size - 1) if not (self.folder / f"{i}.npy").exists()]
        if self.size == 0 or missing:
            raise InputError(f"{folder}: expected files 0.npy to N-1.npy, found {self.size} .npy")

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Row numbers (n,) -> whatever the files hold, stacked without their first dimension."""
        return np.stack([self._load(int(row)) for row in rows])

    @property
    def item_shape(self) -> tuple[int, ...]:
        """The shape of one row: (crops, tokens) of codes."""
        return self._load(0).shape

    def pick(self, rows: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Of each row (n,) the one crop (n,)."""
        return np.stack([self._load(int(r))[i] for r, i in zip(rows, items, strict=True)])

    def _load(self, row: int) -> np.ndarray:
        path = self.folder / f"{row}.npy"
        try:
            return np.load(path, allow_pickle=False)[0]
        except (OSError, ValueError, IndexError) as error:
            raise InputError(f"{path}: missing or damaged ({error})") from error


class CodeDataset:
    """Every image's codes under its crops, and its class.

    vocab_size, num_classes, grid (rows, columns) and tokenizer_sha256 come from `index.json`.
    """

    def __init__(self, config: CodesConfig) -> None:
        self.sources: list[_Source]
        if config.labels:
            self._open_reference(config)
        else:
            self._open_ours(config.codes)
        sizes = {len(source) for source in self.sources}
        if sizes != {len(self.labels)}:
            raise InputError(f"data.codes: folders of different sizes ({sizes}); they must match")
        tokens = self.sources[0][np.array([0])].shape[-1]
        if tokens != self.grid[0] * self.grid[1]:
            raise InputError(f"{config.codes[0]}: {tokens} codes an image, but a grid {self.grid}")

    def _open_ours(self, folders: tuple[Path, ...]) -> None:
        indices = [read_index(folder) for folder in folders]
        for key in ("vocab_size", "grid", "tokenizer_sha256", "classes"):
            found = [
                _field(index, key, folder) for index, folder in zip(indices, folders, strict=True)
            ]
            for value, folder in zip(found, folders, strict=True):
                if value != found[0]:
                    raise InputError(f"{folder}: {key} differs from that of {folders[0]}")
        index = indices[0]
        self.index = index
        self.vocab_size, self.num_classes = int(index["vocab_size"]), len(index["classes"])
        self.grid = (int(index["grid"][0]), int(index["grid"][1]))
        self.tokenizer_sha256 = str(index["tokenizer_sha256"])
        if not self.num_classes:
            raise InputError(f"{folders[0]}: the images had no classes; encode a folder of classes")
        self.sources = [ShardReader(folder, "codes") for folder in folders]
        labels = [_all(ShardReader(folder, "labels")) for folder in folders]
        if any(not np.array_equal(labels[0], other) for other in labels[1:]):
            raise InputError("data.codes: the folders hold different images")
        self.labels = labels[0]

    def _open_reference(self, config: CodesConfig) -> None:
        self.sources = [ReferenceCodes(folder) for folder in config.codes]
        self.labels = _all(ReferenceCodes(config.labels[0])).reshape(-1)
        self.vocab_size, self.num_classes = config.vocab_size, config.num_classes
        self.tokenizer_sha256, self.index = "", {}
        side = round(self.sources[0][np.array([0])].shape[-1] ** 0.5)
        self.grid = (side, side)  # the reference has square images only

    def __len__(self) -> int:
        return len(self.labels)

    def batch(
        self, rows: np.ndarray, positions: np.ndarray, seed: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows (n,) of the data set -> codes (n, tokens) int64, labels (n,) int64.

        Which folder and crop each sample shows depends on (seed, its position in the training
        order) alone. Raises InputError for a code outside the vocabulary.
        """
        uniform = random_uniform(
            seed, torch.tensor([CROP_STREAM]), torch.from_numpy(positions)[:, None], torch.arange(2)
        ).numpy()
        folders = (uniform[:, 0] * len(self.sources)).astype(np.int64)
        codes = np.empty((len(rows), self.grid[0] * self.grid[1]), np.int64)
        for folder, source in enumerate(self.sources):
            here = np.flatnonzero(folders == folder)
            if len(here):
                chosen = (uniform[here, 1] * source.item_shape[0]).astype(np.int64)
                codes[here] = source.pick(rows[here], chosen)
        if codes.min() < 0 or codes.max() >= self.vocab_size:
            raise InputError(
                f"data.codes: code {codes.max()} is outside the vocabulary of {self.vocab_size}"
            )
        return torch.from_numpy(codes), torch.from_numpy(self.labels[rows])


def dropped_conditions(positions: np.ndarray, rate: float, seed: int) -> torch.Tensor:
    """Which training positions (n,) see the null condition -> (n,) bool, from (seed, position)."""
    stream = torch.tensor([DROP_STREAM])
    return random_uniform(seed, stream, torch.from_numpy(positions)) < rate


def _all(source: _Source) -> np.ndarray:
    return source[np.arange(len(source))].astype(np.int64)


def _field(index: dict[str, Any], key: str, folder: Path) -> Any:  # noqa: ANN401 - any JSON value
    if key not in index:
        raise InputError(f"{folder}/index.json: no {key}; is it a folder of tokenizer.encode?")
    return index[key]
