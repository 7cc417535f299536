"""Images in ADM's npz layout, written and read as streams."""

import contextlib
import math
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np

from core.config import InputError
from core.data.arrays import DAMAGE
from core.data.config import check_image_size
from core.files import atomic_write, check_regular_file


def save_npz(path: Path, count: int, batches: Iterable[np.ndarray], **arrays: np.ndarray) -> None:
    """Write batches of images (n, height, width, 3) uint8, `count` in all, to `arr_0`.

    arrays: further arrays of the file. The layout is ADM's, which its evaluator reads. Only one
    batch is in memory at a time. Without images there is no `arr_0`.
    """
    with (
        atomic_write(path) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
    ):
        if count:
            _write_images(archive, path, count, batches)
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def _write_images(
    archive: zipfile.ZipFile, path: Path, count: int, batches: Iterable[np.ndarray]
) -> None:
    """Stream `arr_0` into the file."""
    with archive.open("arr_0.npy", "w", force_zip64=True) as member:
        written = 0
        for batch in batches:
            if written == 0:
                shape = (count, *batch.shape[1:])
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(member, header)
            member.write(np.ascontiguousarray(batch, dtype=np.uint8).data)
            written += len(batch)
    assert written == count, f"{path}: announced {count} images, got {written}"


def npz_images_shape(path: Path) -> tuple[int, int, int, int]:
    """The shape (n, height, width, 3) of `arr_0`; raises InputError if it is not uint8 images."""
    with _open_npz_images(path) as (_, shape):
        return shape


def read_npz_images(path: Path, batch_size: int = 256) -> Iterator[np.ndarray]:
    """Read `arr_0` in batches (n, height, width, 3) uint8; the file may be larger than memory."""
    with _open_npz_images(path) as (member, shape):
        per_image = math.prod(shape[1:])
        for start in range(0, shape[0], batch_size):
            count = min(batch_size, shape[0] - start)
            data = member.read(count * per_image)
            if len(data) != count * per_image:
                raise InputError(f"{path}: arr_0 ends after {start} of {shape[0]} images")
            yield np.frombuffer(data, np.uint8).reshape(count, *shape[1:])


@contextlib.contextmanager
def _open_npz_images(path: Path) -> Iterator[tuple[IO[bytes], tuple[int, int, int, int]]]:
    """Open `arr_0` at its first image; returns the file and the shape."""
    check_regular_file(path)
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
            np.lib.format.read_magic(member)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
            if fortran or dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
                raise InputError(f"{path}: arr_0 is {dtype} {shape}, expected uint8 (n, h, w, 3)")
            check_image_size(shape[1], shape[2], f"{path}: arr_0, images of")
            yield member, shape
    except DAMAGE as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not an npz of images with arr_0 ({error})") from error
