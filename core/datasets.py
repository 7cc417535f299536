"""Image folders and lists, in a seeded order whose position is one integer.

Training sees the endless sequence epoch 0, epoch 1, ... each a seeded permutation. Sample number p
of that sequence, its crop and its flip depend on (seed, p) alone, so a run resumes anywhere, with
any number of processes, without any loader state.
"""

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from core.config import InputError
from core.distributed import World
from core.images import ImageError, center_crop, image_to_pixels, load_image

logger = logging.getLogger(__name__)

MAX_LOADER_DEATHS = 5  # in one run; then its machine has a fault that starting anew does not mend
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm"}


@dataclass(frozen=True)
class ImageList:
    """Pictures on disk and their classes: labels[i] indexes `classes`, or is -1 without any."""

    paths: list[Path]
    labels: np.ndarray  # (n,) int64
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """What picture `index` is called in lists of skipped ones."""
        return str(self.paths[index])

    def load(self, index: int) -> Image.Image:
        """Read picture `index`; raises ImageError."""
        return load_image(self.paths[index])


class Images(Protocol):
    """Numbered pictures: an ImageList, or the pictures of core.pairs."""

    def __len__(self) -> int:
        """How many."""
        ...

    def name(self, index: int) -> str:
        """What picture `index` is called in lists of skipped ones."""
        ...

    def load(self, index: int) -> Image.Image:
        """Read picture `index`; raises ImageError."""
        ...


def find_images(source: Path) -> ImageList:
    """The pictures of a folder of class folders (sorted names), a flat folder, or a list file.

    A list file has one picture a line: a path (relative to the list) and, after a tab, optionally
    its class name or number. Raises InputError where nothing is found or a class has no picture.
    """
    source = Path(source)
    if source.is_file():
        return _from_list(source)
    if not source.is_dir():
        raise InputError(f"{source}: no such image folder or list file")
    folders = sorted(p for p in source.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not folders:
        paths = _pictures_in(source)
        if not paths:
            raise InputError(f"{source}: holds no picture ({', '.join(sorted(IMAGE_SUFFIXES))})")
        return ImageList(paths, np.full(len(paths), -1, np.int64), ())
    paths, labels = [], []
    for label, folder in enumerate(folders):
        found = _pictures_in(folder)
        if not found:
            raise InputError(f"{folder}: class folder without a picture; fill it or remove it")
        paths += found
        labels += [label] * len(found)
    return ImageList(paths, np.array(labels, np.int64), tuple(p.name for p in folders))


def _pictures_in(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)


def _from_list(source: Path) -> ImageList:
    try:
        lines = [line for line in source.read_text().splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise InputError(f"{source}: not a text file with one picture a line") from error
    if not lines:
        raise InputError(f"{source}: the list is empty")
    rows = [line.split("\t") for line in lines]
    if len({len(row) for row in rows}) != 1 or len(rows[0]) > 2:
        raise InputError(
            f"{source}: every line needs a path and, on all or none, a tab and a class"
        )
    paths = [source.parent / row[0] for row in rows]
    if len(rows[0]) == 1:
        return ImageList(paths, np.full(len(paths), -1, np.int64), ())
    names = [row[1] for row in rows]
    if all(name.isdigit() for name in names):
        classes = tuple(str(i) for i in range(max(int(name) for name in names) + 1))
    else:
        classes = tuple(sorted(set(names)))
    number = {name: i for i, name in enumerate(classes)}
    return ImageList(paths, np.array([number[name] for name in names], np.int64), classes)


class Skipped(NamedTuple):
    """A picture that could not be read, and why."""

    path: str
    reason: str


class SkipLog:
    """Counts pictures that were skipped, by reason, and names each once in a file."""

    def __init__(self, path: Path | None = None) -> None:
        self.path, self.seen, self.reasons = path, set(), Counter()
        if path and path.exists():  # a resumed run: what is listed is counted, and not listed again
            for line in path.read_text().splitlines():
                name, _, reason = line.partition("\t")
                self.seen.add(name)
                self.reasons[reason] += 1

    def add(self, skipped: list[Skipped]) -> None:
        """Note pictures; each is counted once, however many epochs meet it."""
        for item in skipped:
            if item.path in self.seen:
                continue
            self.seen.add(item.path)
            self.reasons[item.reason] += 1
            logger.warning("skipped %s: %s", item.path, item.reason)
            if self.path:
                with self.path.open("a") as file:
                    file.write(f"{item.path}\t{item.reason}\n")

    def __len__(self) -> int:
        return len(self.seen)

    def summary(self) -> str:
        """For people: "3 pictures skipped (2 damaged image, 1 not an image)", or nothing."""
        if not self.seen:
            return ""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common())
        return f"{len(self.seen)} picture{'s' * (len(self.seen) > 1)} skipped ({reasons})"


class ShuffledOrder:
    """The endless training order over `size` samples: a fresh seeded permutation per epoch."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self._epochs: dict[int, np.ndarray] = {}

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        """Positions (n,) in the endless sequence -> sample numbers (n,) int64."""
        epochs, offsets = positions // self.size, positions % self.size
        result = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            result[here] = self._permutation(int(epoch))[offsets[here]]
        return result

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            # Two epochs at most: a batch may straddle the border.
            self._epochs = {k: v for k, v in self._epochs.items() if k >= epoch - 1}
            random = np.random.default_rng((self.seed, epoch))
            self._epochs[epoch] = random.permutation(self.size)
        return self._epochs[epoch]


def local_positions(
    first: int, batch_size: int, accumulation: int, world: World
) -> list[np.ndarray]:
    """This rank's share of the global batch at position `first`: one array per micro-batch.

    Micro-batch m of rank r is chunk m * world.size + r, so that any number of ranks and of
    accumulation steps sees the same samples in one optimizer step.
    """
    chunks = np.arange(first, first + batch_size).reshape(accumulation * world.size, -1)
    return [chunks[m * world.size + world.rank] for m in range(accumulation)]


def check_batch_size(batch_size: int, accumulation: int, world: World) -> None:
    """Raise InputError unless the global batch splits evenly over ranks and accumulation steps."""
    if batch_size <= 0 or batch_size % (accumulation * world.size):
        raise InputError(
            f"batch_size {batch_size} must be a positive multiple of gradient_accumulation "
            f"{accumulation} x {world.size} processes"
        )


class TrainingImages(Dataset):
    """Sample p of the endless order, transformed with randomness from (seed, p).

    A picture that cannot be read gives its place to another one, drawn from (seed, p); it is
    reported, so that the loop counts and names it.
    """

    def __init__(
        self,
        images: Images,
        transform: Callable[[Image.Image, np.random.Generator], np.ndarray],
        seed: int,
    ) -> None:
        self.images, self.transform, self.seed = images, transform, seed
        self.order = ShuffledOrder(len(images), seed)

    def __getitem__(self, position: int) -> tuple[np.ndarray, list[Skipped]]:
        random = np.random.default_rng((self.seed, position))
        index, skipped = int(self.order[np.array([position])][0]), []
        while True:
            try:
                return self.transform(self.images.load(index), random), skipped
            except ImageError as error:
                name = self.images.name(index)
                skipped.append(Skipped(name, error.reason))
                if len(skipped) == 100:
                    raise InputError(
                        f"100 pictures in a row cannot be read, the last is {name}: {error.reason}"
                    ) from error
                index = int(random.integers(len(self.images)))


def training_batches(
    dataset: TrainingImages,
    positions: Iterator[np.ndarray],
    num_workers: int,
    pin_memory: bool,
) -> Iterator[tuple[torch.Tensor, list[Skipped]]]:
    """Batches of `dataset` at the given positions: pixels (n, height, width, 3) uint8, skipped.

    Loader processes that die are replaced, with a warning, and no sample is lost. Raises InputError
    where hardly any picture can be read, OSError where the processes die again and again.
    """
    # Positions that were handed to the loader and whose batch has not arrived.
    waiting: deque[np.ndarray] = deque()

    def hand_out() -> Iterator[np.ndarray]:
        yield from list(waiting)
        for batch in positions:
            waiting.append(batch)
            yield batch

    deaths = 0
    while True:
        loader = DataLoader(
            dataset,
            batch_sampler=_Batches(hand_out()),
            collate_fn=_collate,
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
        )
        try:
            for batch in loader:
                waiting.popleft()
                yield batch
            return
        except InputError as error:
            # A loader process sends its traceback as the message; its last line is what was said.
            said = str(error).splitlines()[-1]
            raise InputError(said.removeprefix("core.config.InputError: ")) from error
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            deaths += 1
            advice = "killed for its memory? try a lower num_workers"
            if deaths > MAX_LOADER_DEATHS:
                raise OSError(
                    f"loader processes die again and again ({error}; {advice})"
                ) from error
            logger.warning("%s (%s); starting its place anew", error, advice)


class _Batches(torch.utils.data.Sampler[list[int]]):
    """Lists of positions, as DataLoader wants them."""

    def __init__(self, positions: Iterator[np.ndarray]) -> None:
        self.positions = positions

    def __iter__(self) -> Iterator[list[int]]:
        return (batch.tolist() for batch in self.positions)


def _collate(samples: list[tuple[np.ndarray, list[Skipped]]]) -> tuple[Any, list[Skipped]]:
    pixels = torch.from_numpy(np.stack([pixels for pixels, _ in samples]))
    return pixels, [item for _, skipped in samples for item in skipped]


@dataclass(frozen=True)
class CenterCrop:
    """The centre crop as pixels (height, width, 3) uint8; picklable, for loader processes."""

    height: int
    width: int

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Crop a picture."""
        return image_to_pixels(center_crop(image, self.height, self.width))


class OrderedImages(Dataset):
    """Picture i, transformed without randomness, or why it is skipped; for encoding and scoring."""

    def __init__(self, images: Images, transform: Callable[[Image.Image], np.ndarray]) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, np.ndarray | Skipped]:
        try:
            return index, self.transform(self.images.load(index))
        except ImageError as error:
            return index, Skipped(self.images.name(index), error.reason)


class OrderedBatch(NamedTuple):
    """What could be read of a run of pictures: their numbers (n,), pixels (n, ...), the rest."""

    indices: np.ndarray
    pixels: torch.Tensor | None  # None where nothing of the batch could be read
    skipped: list[Skipped]


def ordered_batches(
    dataset: OrderedImages, indices: list[int], batch_size: int, num_workers: int
) -> Iterator[OrderedBatch]:
    """The pictures `indices` in their order, `batch_size` at a time."""
    chunks = (indices[i : i + batch_size] for i in range(0, len(indices), batch_size))
    return iter(
        DataLoader(
            dataset,
            batch_sampler=_Batches(np.array(chunk) for chunk in chunks),
            collate_fn=_collate_ordered,
            num_workers=num_workers,
        )
    )


def _collate_ordered(samples: list[tuple[int, np.ndarray | Skipped]]) -> OrderedBatch:
    read = [(i, item) for i, item in samples if not isinstance(item, Skipped)]
    skipped = [item for _, item in samples if isinstance(item, Skipped)]
    pixels = torch.from_numpy(np.stack([item for _, item in read])) if read else None
    return OrderedBatch(np.array([i for i, _ in read], np.int64), pixels, skipped)
