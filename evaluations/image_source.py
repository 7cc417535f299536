"""Where pictures to score come from: an npz, a folder or list of images, or a sample run."""

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from core.config import InputError
from core.data.loader import CenterCrop, OrderedImages, ordered_batches
from core.data.npz import npz_images_shape, read_npz_images
from core.data.open import Images, open_images
from core.data.shards import read_index
from core.data.skip_log import Skipped
from core.distributed.world import DeviceName


@dataclass(frozen=True, kw_only=True)
class ImageSourceConfig:
    """How pictures are read.

    Args:
        image_size: Height and width of the centre crop, for image files; an npz is taken as it is.
        num_workers: Loader processes per rank, for image files.
        device: auto, cpu, cuda or mps.
    """

    image_size: tuple[int, int] = (256, 256)
    num_workers: int = 8
    device: DeviceName = "auto"

    def __post_init__(self) -> None:
        if min(self.image_size) < 1 or self.num_workers < 0:
            raise ValueError("image_size must be >= 1, num_workers >= 0")


@dataclass(frozen=True)
class ImageSource:
    """Pictures 0 .. count - 1 of one size: their number is their id.

    `labels` (count,) indexes `classes` (or is a number, where there are no names); None without.
    `images` are the files of a folder or list, None for an npz. `skipped` fills while reading.
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
        """(ids (n,), pixels (n, height, width, 3) uint8) of the pictures `ids`, ascending."""
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
    """The pictures of an npz (arr_0), of a run of autoregressive.sample, or of an image folder.

    Files of an image folder are centre-cropped to `image_size`; the others are taken as they are.
    """
    source = Path(source)
    if (source / "index.json").is_file():
        read_index(source)  # refuses an unfinished run
        source = source / "samples.npz"
        if not source.is_file():
            raise InputError(f"{source}: the sample run wrote no npz (npz: true)")
    if source.is_file() and source.suffix == ".npz":
        count, height, width, _ = npz_images_shape(source)
        return ImageSource(source, count, (height, width), _npz_labels(source, count))
    images = open_images(source)
    labels = images.labels if (images.labels >= 0).all() else None
    return ImageSource(source, len(images), image_size, labels, images.classes, images)


def _npz_labels(path: Path, count: int) -> np.ndarray | None:
    """`arr_1` where it holds one class per picture, as ADM's files and our samples do."""
    try:
        with np.load(path, allow_pickle=False) as file:
            labels = file["arr_1"] if "arr_1" in file.files else None
    except (ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: arr_1 is not an array of labels ({error})") from error
    if labels is None or labels.shape != (count,) or labels.dtype.kind not in "iu":
        return None
    return labels
