"""Training data with classes: our shards, or the published layout of one file per image."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from autoregressive.data.config import DataConfig
from autoregressive.models.conditioning import ClassCondition
from core.config import InputError
from core.data.arrays import load_array
from core.data.shards import ShardReader, read_index
from core.rng import random_uniform

# What index.json of tokenizer.encode says, equal in all folders that are used together.
INDEX_FIELDS = {
    "vocab_size": int,
    "grid": list[int],
    "tokenizer_sha256": str,
    "classes": list[str],
}

# Independent random streams of a training position.
CROP_STREAM, DROP_STREAM, CAPTION_STREAM = 1, 2, 4


class _Source(Protocol):
    """Codes (rows, crops, tokens) of one folder."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: np.ndarray) -> np.ndarray: ...

    @property
    def item_shape(self) -> tuple[int, ...]: ...

    def pick(self, rows: np.ndarray, items: np.ndarray) -> np.ndarray: ...


class ReferenceCodes:
    """The layout of the published code: `{i}.npy`, int64 (1, crops, tokens), one per image."""

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
        """Row numbers (n,) -> the arrays of the files, stacked without their first dimension."""
        return np.stack([self._load(int(row)) for row in rows])

    @property
    def item_shape(self) -> tuple[int, ...]:
        """The shape of one row: (crops, tokens) of codes."""
        return self._load(0).shape

    def pick(self, rows: np.ndarray, items: np.ndarray) -> np.ndarray:
        """One crop of each row: row numbers (n,) and crop numbers (n,) -> (n, tokens)."""
        return np.stack([self._load(int(r))[i] for r, i in zip(rows, items, strict=True)])

    def _load(self, row: int) -> np.ndarray:
        path = self.folder / f"{row}.npy"
        array = load_array(path)
        if array.ndim < 1 or not len(array) or array.dtype.kind not in "iu":
            raise InputError(f"{path}: {array.dtype} {array.shape}, expected integers (1, ...)")
        return array[0]


class CodeDataset:
    """The codes of every crop of every image, and its class.

    vocab_size, classes, grid (rows, columns) and tokenizer_sha256 come from `index.json`.
    """

    def __init__(self, config: DataConfig) -> None:
        self.sources: list[_Source]
        if config.labels:
            self._open_reference(config)
        else:
            self._open_ours(config.codes)
        self.first_class, self.unconditional = config.first_class, config.condition == "none"
        if self.unconditional:
            self.num_classes, self.labels = 0, np.zeros_like(self.labels)
        elif self.num_classes:
            self.num_classes += self.first_class
            self.labels = self.labels + self.first_class
        sizes = {len(source) for source in self.sources}
        if sizes != {len(self.labels)}:
            raise InputError(f"data.codes: folders with different numbers of images ({sizes})")
        for source in self.sources:
            if len(source.item_shape) != 2 or source.item_shape[1] < 1:
                raise InputError(
                    f"{config.codes[0]}: rows of shape {source.item_shape}, expected codes "
                    "(crops, tokens)"
                )
        tokens = self.sources[0].item_shape[-1]
        if tokens != self.grid[0] * self.grid[1]:
            raise InputError(f"{config.codes[0]}: {tokens} codes per image, but a grid {self.grid}")

    def _open_ours(self, folders: tuple[Path, ...]) -> None:
        indices = [read_index(folder, INDEX_FIELDS) for folder in folders]
        for key in INDEX_FIELDS:
            found = [index[key] for index in indices]
            for value, other, folder in zip(found, indices, folders, strict=True):
                # Older codes name the tokenizer by its file.
                same_tokenizer = key == "tokenizer_sha256" and bool(
                    tokenizer_names(other) & tokenizer_names(indices[0])
                )
                if value != found[0] and not same_tokenizer:
                    raise InputError(f"{folder}: {key} differs from that of {folders[0]}")
        index = self.index = indices[0]
        self.vocab_size, self.num_classes = index["vocab_size"], len(index["classes"])
        if len(index["grid"]) != 2 or min(self.vocab_size, *index["grid"]) < 1:
            raise InputError(f"{folders[0]}/index.json: grid or vocab_size is of no codes")
        self.grid = (index["grid"][0], index["grid"][1])
        self.tokenizer_sha256 = index["tokenizer_sha256"]
        self.sources = [ShardReader(folder, "codes") for folder in folders]
        labels = [_all(ShardReader(folder, "labels")) for folder in folders]
        if any(not np.array_equal(labels[0], other) for other in labels[1:]):
            raise InputError("data.codes: the folders contain different images")
        self.labels = labels[0]
        _check_labels(self.labels, self.num_classes, folders[0])

    def _open_reference(self, config: DataConfig) -> None:
        self.sources = [ReferenceCodes(folder) for folder in config.codes]
        self.labels = _all(ReferenceCodes(config.labels[0])).reshape(-1)
        self.vocab_size, self.num_classes = config.vocab_size, config.num_classes
        _check_labels(self.labels, self.num_classes, config.labels[0])
        self.tokenizer_sha256, self.index = "", {}
        side = round(self.sources[0][np.array([0])].shape[-1] ** 0.5)
        self.grid = (side, side)  # the published code only has square images

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def crops(self) -> int:
        """Crops of an image, over all folders; a sample uses one of them at random."""
        return sum(source.item_shape[0] for source in self.sources)

    def model_fields(self) -> dict[str, Any]:
        """The fields of GPTConfig that follow from the data.

        Raises InputError if the images have no classes.
        """
        if self.unconditional:
            return {"condition": "none", "num_classes": 0, **self.code_fields()}
        if not self.num_classes:
            raise InputError(
                "data.codes: the images had no classes; give --data.condition none to train an "
                "unconditional model, or data.features (their captions), or encode class folders"
            )
        return {"condition": "class", "num_classes": self.num_classes, **self.code_fields()}

    def code_fields(self) -> dict[str, Any]:
        """The fields that follow from the codes, with classes or captions."""
        names = ("vocab_size", "grid", "tokenizer_sha256")
        return {name: getattr(self, name) for name in names}

    def batch(
        self, rows: np.ndarray, positions: np.ndarray, seed: int
    ) -> tuple[torch.Tensor, ClassCondition]:
        """Rows (n,) of the data set -> codes (n, tokens) int64, and their classes."""
        classes = ClassCondition(torch.from_numpy(self.labels[rows]))
        return self.code_batch(rows, positions, seed), classes

    def conditions(self, ids: np.ndarray) -> ClassCondition:
        """The classes of sampled images number ids (n,): all classes of the data in turn."""
        count = max(1, self.num_classes - self.first_class)
        return ClassCondition(torch.from_numpy(self.first_class + ids % count))

    def code_batch(self, rows: np.ndarray, positions: np.ndarray, seed: int) -> torch.Tensor:
        """Rows (n,) of the data set -> codes (n, tokens) int64.

        The choice of folder and crop depends only on (seed, position in the training order).
        Raises InputError for a code outside the vocabulary.
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
        return torch.from_numpy(codes)


def chosen_captions(
    positions: np.ndarray, seed: int, variants: Sequence[str], config: DataConfig
) -> np.ndarray:
    """The caption variant of each training position (n,) -> (n,) int64.

    It depends only on (seed, position). Raises InputError for an unknown variant.
    """
    wanted = [config.caption, config.short_caption or config.caption]
    for name in wanted:
        if name not in variants:
            raise InputError(f"data.caption: no variant {name!r}, only {', '.join(variants)}")
    stream = torch.tensor([CAPTION_STREAM])
    uniform = random_uniform(seed, stream, torch.from_numpy(positions)).numpy()
    long, short = (list(variants).index(name) for name in wanted)
    return np.where(uniform < config.short_caption_rate, short, long)


def drop_condition(positions: np.ndarray, rate: float, seed: int) -> torch.Tensor:
    """Which training positions (n,) drop their condition -> (n,) bool, from (seed, position)."""
    stream = torch.tensor([DROP_STREAM])
    return random_uniform(seed, stream, torch.from_numpy(positions)) < rate


def _all(source: _Source) -> np.ndarray:
    return source[np.arange(len(source))].astype(np.int64)


def _check_labels(labels: np.ndarray, num_classes: int, folder: Path) -> None:
    """Raise InputError unless labels (n,) are classes, or all -1 for images without classes."""
    if labels.ndim != 1:
        raise InputError(f"{folder}: labels of shape {labels.shape}, expected one per image")
    least, most = (0, num_classes - 1) if num_classes else (-1, -1)
    wrong = np.flatnonzero((labels < least) | (labels > most))
    if len(wrong):
        raise InputError(
            f"{folder}: label {labels[wrong[0]]} of image {wrong[0]} is not in {least} .. {most}"
        )


def tokenizer_names(index: Mapping[str, Any]) -> set[str]:
    """What an index knows the tokenizer by: the sha256 of its weights, of its file, and of the file
    that it was converted from. Codes and runs of older versions know it by a file.
    """
    keys = ("tokenizer_sha256", "tokenizer_file_sha256", "tokenizer_source_sha256")
    return {index[key] for key in keys if isinstance(index.get(key), str)}
