"""Pictures: the only copies of loading, cropping, range conversion and writing.

*images* are float tensors in [-1, 1], *pixels* are uint8.
"""

import contextlib
import io
import math
import os
import struct
import textwrap
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

from core.config import InputError

MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 89_478_485  # Pillow only warns there; we refuse

# What Pillow's decoders raise on damaged files, besides OSError.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


class ImageError(InputError):
    """A picture that cannot be read; `reason` is one short phrase to count by."""

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.reason = reason


def load_image(source: Path | str | bytes, name: str = "") -> Image.Image:
    """Read a picture as upright 8-bit RGB, whatever it was (grey, CMYK, palette, 16-bit, rotated).

    `source` is a path or the encoded bytes. Raises ImageError for anything that is not a whole
    picture of at most MAX_PIXELS pixels.
    """
    name = name or (str(source) if not isinstance(source, bytes) else "image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            opened = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        with opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise ImageError(name, "decompression bomb")
            opened.load()
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I") or image.mode == "F":
                return _from_wide_grey(image)
            if image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")
            return image.convert("RGB")
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(name, "decompression bomb") from error
    except Image.UnidentifiedImageError as error:
        raise ImageError(name, "not an image") from error
    except FileNotFoundError as error:
        raise ImageError(name, "no such file") from error
    except _DECODE_ERRORS as error:
        raise ImageError(name, "damaged image") from error


def _from_wide_grey(image: Image.Image) -> Image.Image:
    """16-bit grey to 8-bit RGB by scaling; Pillow's own conversion would clip it to white."""
    values = np.asarray(image, dtype=np.float64)
    # Modes "I" and "F" do not say whether they hold 8-bit or 16-bit values.
    wide = image.mode.startswith("I;16") or values.max() > 255
    scale = 255 / 65535 if wide else 1.0
    grey = np.clip(np.round(values * scale), 0, 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def resize_to_cover(image: Image.Image, height: int, width: int) -> Image.Image:
    """Resize so that (height, width) just fits inside, as ADM: BOX halvings, then BICUBIC."""
    while max(height / image.height, width / image.width) <= 0.5:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    return image.resize(size, Image.Resampling.BICUBIC)


def center_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """ADM's centre crop (guided-diffusion, image_datasets.py): cover, then cut the middle."""
    image = resize_to_cover(image, height, width)
    top, left = (image.height - height) // 2, (image.width - width) // 2
    return image.crop((left, top, left + width, top + height))


def random_crop(
    image: Image.Image, height: int, width: int, random: np.random.Generator, scale: float = 0.8
) -> Image.Image:
    """Cover a random size in [1, 1 / scale] times (height, width), crop at random, flip half.

    `scale` in (0, 1]: the least share of the resized short side that the crop keeps (ADM: 0.8).
    """
    short = min(height, width)
    grown = int(random.integers(short, math.ceil(short / scale) + 1)) / short
    image = resize_to_cover(image, round(height * grown), round(width * grown))
    top = int(random.integers(0, image.height - height + 1))
    left = int(random.integers(0, image.width - width + 1))
    image = image.crop((left, top, left + width, top + height))
    return ImageOps.mirror(image) if random.random() < 0.5 else image


def image_to_pixels(image: Image.Image) -> np.ndarray:
    """An RGB picture -> (height, width, 3) uint8."""
    return np.array(image, dtype=np.uint8)


def pixels_to_images(pixels: torch.Tensor) -> torch.Tensor:
    """(..., height, width, 3) uint8 -> (..., 3, height, width) float32 in [-1, 1]."""
    return pixels.movedim(-1, -3).float().div_(127.5).sub_(1)


def images_to_pixels(images: torch.Tensor) -> torch.Tensor:
    """(..., 3, height, width) in about [-1, 1] -> (..., height, width, 3) uint8.

    floor(clamp(127.5 x + 128, 0, 255)), which rounds half up; published numbers depend on it.
    """
    scaled = images.float().mul(127.5).add_(128).clamp_(0, 255)
    return scaled.movedim(-3, -1).to(torch.uint8)


CAPTION_WIDTH, CAPTION_LINES, CHARACTER = 160, 3, (6, 11)  # pixels, lines, a letter's pixels


def image_grid(
    pixels: np.ndarray, columns: int, captions: Sequence[str] | None = None, padding: int = 2
) -> np.ndarray:
    """(n, height, width, 3) uint8 -> one picture with `columns` a row on white, uint8.

    With captions, each stands under its picture; small pictures are enlarged to give it room.
    """
    if captions:
        pairs = zip(pixels, captions, strict=True)
        pixels = np.stack([_captioned(picture, caption) for picture, caption in pairs])
    count, height, width, _ = pixels.shape
    rows = math.ceil(count / columns)
    shape = rows * (height + padding) + padding, columns * (width + padding) + padding, 3
    grid = np.full(shape, 255, np.uint8)
    for i, picture in enumerate(pixels):
        top = padding + (i // columns) * (height + padding)
        left = padding + (i % columns) * (width + padding)
        grid[top : top + height, left : left + width] = picture
    return grid


def _captioned(picture: np.ndarray, caption: str) -> np.ndarray:
    """A picture (height, width, 3) uint8, at least CAPTION_WIDTH wide, above its caption."""
    times = math.ceil(CAPTION_WIDTH / picture.shape[1])
    picture = picture.repeat(times, axis=0).repeat(times, axis=1)
    height, width, _ = picture.shape
    lines = textwrap.wrap(caption, width // CHARACTER[0])
    if len(lines) > CAPTION_LINES:
        lines = [*lines[: CAPTION_LINES - 1], lines[CAPTION_LINES - 1][:-3] + "..."]
    canvas = Image.new("RGB", (width, height + CAPTION_LINES * CHARACTER[1] + 4), "white")
    canvas.paste(Image.fromarray(picture))
    ImageDraw.Draw(canvas).text((2, height), "\n".join(lines), fill="black", spacing=1)
    return np.asarray(canvas)


def side_by_side(real: torch.Tensor, fake: torch.Tensor, columns: int) -> np.ndarray:
    """Pixels (n, height, width, 3) uint8 twice -> a grid: a row of real, its row of fake, ..."""
    columns = min(columns, len(real))
    rows = [part[i : i + columns] for i in range(0, len(real), columns) for part in (real, fake)]
    return image_grid(torch.cat(rows).numpy(), columns)


def save_png(pixels: np.ndarray, path: Path) -> None:
    """(height, width, 3) uint8 -> a PNG file, whole or not at all."""
    aside = path.with_name(f".{path.name}.tmp")
    Image.fromarray(pixels).save(aside, format="PNG")
    os.replace(aside, path)


def save_npz(path: Path, count: int, batches: Iterable[np.ndarray], **arrays: np.ndarray) -> None:
    """Stream `count` pictures (n, height, width, 3) uint8 into `arr_0`; then the other arrays.

    ADM's layout, readable by its evaluator; never holds more than one batch in memory.
    """
    aside = path.with_name(f".{path.name}.tmp")
    with zipfile.ZipFile(aside, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            written = 0
            for batch in batches:
                if written == 0:
                    shape = (count, *batch.shape[1:])
                    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(member, header)
                member.write(np.ascontiguousarray(batch, dtype=np.uint8).data)
                written += len(batch)
        assert written == count, f"{path}: announced {count} pictures, got {written}"
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
    os.replace(aside, path)


def npz_pictures_shape(path: Path) -> tuple[int, int, int, int]:
    """(n, height, width, 3) of `arr_0`; raises InputError for anything but such uint8 pictures."""
    with _open_npz_pictures(path) as (_, shape):
        return shape


def read_npz_pictures(path: Path, batch_size: int = 256) -> Iterator[np.ndarray]:
    """Batches (n, height, width, 3) uint8 of `arr_0`, streamed: the file may exceed the memory."""
    with _open_npz_pictures(path) as (member, shape):
        per_picture = math.prod(shape[1:])
        for start in range(0, shape[0], batch_size):
            count = min(batch_size, shape[0] - start)
            data = member.read(count * per_picture)
            if len(data) != count * per_picture:
                raise InputError(f"{path}: arr_0 ends after {start} of {shape[0]} pictures")
            yield np.frombuffer(data, np.uint8).reshape(count, *shape[1:])


@contextlib.contextmanager
def _open_npz_pictures(path: Path) -> Iterator[tuple[IO[bytes], tuple[int, int, int, int]]]:
    """`arr_0` after its header, and its shape."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
            np.lib.format.read_magic(member)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
            if fortran or dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
                raise InputError(f"{path}: arr_0 is {dtype} {shape}, expected uint8 (n, h, w, 3)")
            yield member, shape
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError, zlib.error) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not an npz of pictures with arr_0 ({error})") from error
