"""Images to score: an npz, a sample run, or anything that core.data.open reads."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.config import InputError
from core.data.arrays import npz_header, npz_names, read_npz_array
from core.data.loader import CenterCrop, OrderedImages, ordered_batches
from core.data.npz import npz_images_shape, read_npz_images
from core.data.open import Images, open_images
from core.data.shards import read_index
from core.data.skip_log import Skipped


@dataclass(frozen=True)
class ImageSource:
    """Images 0 .. count - 1 of one size (height, width). Their numbers are their ids.

    labels: (count,) int64, indices into `classes`, or plain numbers if there are no names; None
    without classes. images: None for an npz. skipped: filled while reading.
    """

    source: Path
    count: int
    size: tuple[int, int]
    labels: np.ndarray | None
    classes: tuple[str, ...] = ()
    images: Images | None = None
    skipped: list[Skipped] = field(default_factory=list)

    def batches(
        self, ids: np.ndarray, batch_size: int, num_workers: int
    ) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Yield (ids (n,), pixels (n, height, width, 3) uint8) for ascending ids."""
        if self.images is None:
            yield from self._from_npz(ids, batch_size)
            return
        dataset = OrderedImages(self.images, CenterCrop(*self.size))
        for batch in ordered_batches(dataset, ids.tolist(), batch_size, num_workers):
            self.skipped.extend(batch.skipped)
            if batch.pixels is not None:
                yield batch.indices, batch.pixels

    def _from_npz(
        self, ids: np.ndarray, batch_size: int
    ) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        start = 0
        for block in read_npz_images(self.source, batch_size):
            here = ids[(ids >= start) & (ids < start + len(block))]
            if len(here):
                yield here, torch.from_numpy(block[here - start])
            start += len(block)


def open_image_source(source: Path, image_size: tuple[int, int]) -> ImageSource:
    """Open an npz (arr_0), a run of autoregressive.sample, or any source of open_images.

    image_size: Height and width of the centre crop of image files; an npz is not cropped.
    Raises InputError if there are no images or the run is unfinished.
    """
    source = Path(source)
    if (source / "index.json").is_file():
        index = read_index(source)  # raises InputError for an unfinished run
        source = source / "samples.npz"
        if not source.is_file():
            raise InputError(f"{source}: the sample run wrote no npz (npz: true)")
        _check_index(source, index)
    if source.is_file() and source.suffix == ".npz":
        count, height, width, _ = npz_images_shape(source)
        return ImageSource(source, count, (height, width), _npz_labels(source, count))
    images = open_images(source)
    labels = images.labels if (images.labels >= 0).all() else None
    return ImageSource(source, len(images), image_size, labels, images.classes, images)


def _check_index(npz: Path, index: dict[str, Any]) -> None:
    """Raise InputError for an npz that is left from other samples than the index describes."""
    count = npz_images_shape(npz)[0]
    found, labels = _npz_labels(npz, count), index.get("image_labels")
    same_labels = labels is None or (found is not None and found.tolist() == labels)
    if count != index.get("count") or not same_labels:
        raise InputError(
            f"{npz}: not the images of the index.json beside it; run the sample command again"
        )


def _npz_labels(path: Path, count: int) -> np.ndarray | None:
    """`arr_1`, if it contains one class per image, as in ADM's files and our samples."""
    if "arr_1" not in npz_names(path):
        return None
    shape, dtype = npz_header(path, "arr_1")
    if shape != (count,) or dtype.kind not in "iu":
        return None
    return read_npz_array(path, "arr_1", (count,), "iu")
