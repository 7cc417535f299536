"""Loader processes: training batches in the seeded order, and ordered batches for encoding."""

import logging
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from core.config import InputError
from core.data.images import ImageError, center_crop, image_to_pixels
from core.data.open import Images
from core.data.order import ShuffledOrder
from core.data.skip_log import Skipped

logger = logging.getLogger(__name__)


MAX_LOADER_DEATHS = (
    5  # in one run; after that, the machine has a fault that a new process does not repair
)


class TrainingImages(Dataset):
    """Sample p of the endless order, transformed with randomness from (seed, p).

    An image that cannot be read is replaced by another one, chosen from (seed, p), and reported,
    so that the training loop counts and names it.
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
                        f"100 images in a row cannot be read, the last is {name}: {error.reason}"
                    ) from error
                index = int(random.integers(len(self.images)))


def training_batches(
    dataset: TrainingImages,
    positions: Iterator[np.ndarray],
    num_workers: int,
    pin_memory: bool,
) -> Iterator[tuple[torch.Tensor, list[Skipped]]]:
    """Batches of `dataset` at the given positions: pixels (n, height, width, 3) uint8, skipped.

    A loader process that dies is replaced, with a warning, and no sample is lost.
    Raises InputError if hardly any image can be read, OSError if processes die again and again.
    """
    # Positions that the loader has received, and whose batch has not arrived yet.
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
            # Its seed for worker processes must not come out of the step's own generator, or the
            # first step after a resume draws other numbers.
            generator=torch.Generator(),
        )
        try:
            for batch in loader:
                waiting.popleft()
                yield batch
            return
        except InputError as error:
            # The message is the traceback of the loader process; its last line is the error.
            said = str(error).splitlines()[-1]
            raise InputError(said.removeprefix(f"{InputError.__module__}.InputError: ")) from error
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            deaths += 1
            advice = "killed for its memory? try a lower num_workers"
            if deaths > MAX_LOADER_DEATHS:
                raise OSError(
                    f"loader processes die again and again ({error}; {advice})"
                ) from error
            logger.warning("%s (%s); starting another one in its place", error, advice)


class _Batches(torch.utils.data.Sampler[list[int]]):
    """Lists of positions, in the form that DataLoader expects."""

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
        """Crop an image."""
        return image_to_pixels(center_crop(image, self.height, self.width))


class OrderedImages(Dataset):
    """Image i, transformed without randomness, or why it is skipped; to encode or to score."""

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
    """A batch: numbers (n,) int64 and pixels (n, ...) of readable images, and the skipped ones."""

    indices: np.ndarray
    pixels: torch.Tensor | None  # None if no image of the batch could be read
    skipped: list[Skipped]


def ordered_batches(
    dataset: OrderedImages, indices: list[int], batch_size: int, num_workers: int
) -> Iterator[OrderedBatch]:
    """Read the images `indices` in the given order, `batch_size` at a time."""
    chunks = (indices[i : i + batch_size] for i in range(0, len(indices), batch_size))
    return iter(
        DataLoader(
            dataset,
            batch_sampler=_Batches(np.array(chunk) for chunk in chunks),
            collate_fn=_collate_ordered,
            num_workers=num_workers,
            generator=torch.Generator(),
        )
    )


def _collate_ordered(samples: list[tuple[int, np.ndarray | Skipped]]) -> OrderedBatch:
    read = [(i, item) for i, item in samples if not isinstance(item, Skipped)]
    skipped = [item for _, item in samples if isinstance(item, Skipped)]
    pixels = torch.from_numpy(np.stack([item for _, item in read])) if read else None
    return OrderedBatch(np.array([i for i, _ in read], np.int64), pixels, skipped)
