"""Where pictures to score come from: an npz, a folder or list of images, or a sample run."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from core.config import InputError
from core.datasets import CenterCrop, OrderedImages, Skipped, find_images, ordered_batches
from core.images import read_npz_pictures
from core.shards import read_index


class Pictures(NamedTuple):
    """Batches of pixels (n, height, width, 3) uint8, and the pictures skipped so far."""

    batches: Iterator[torch.Tensor]
    skipped: list[Skipped]


def open_pictures(
    source: Path, image_size: tuple[int, int], batch_size: int, num_workers: int
) -> Pictures:
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
        arrays = read_npz_pictures(source, batch_size)
        return Pictures((torch.from_numpy(np.array(pixels)) for pixels in arrays), [])
    images, skipped = find_images(source), []
    dataset = OrderedImages(images, CenterCrop(*image_size))

    def read() -> Iterator[torch.Tensor]:
        indices = list(range(len(images)))
        for batch in ordered_batches(dataset, indices, batch_size, num_workers):
            skipped.extend(batch.skipped)
            if batch.pixels is not None:
                yield batch.pixels

    return Pictures(read(), skipped)
