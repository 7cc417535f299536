"""Loading, cropping, range conversion and writing of images, for all packages.

*images* are float tensors in [-1, 1], *pixels* are uint8.
"""

import io
import math
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from core.data.config import MAX_PIXELS
from core.errors import InputError
from core.files import atomic_write, check_regular_file

# Formats that Pillow decodes by itself. PostScript, for example, would start another program.
Image.init()
FORMATS = tuple(
    name
    for name in ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
    if name in Image.OPEN  # that this build of Pillow supports
)

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
    """An image that cannot be read. reason: a short phrase, by which such images are counted."""

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.reason = reason


def load_image(source: Path | str | bytes, name: str = "") -> Image.Image:
    """Read an image of any mode (grey, CMYK, palette, 16-bit, rotated) as upright 8-bit RGB.

    `source` is a path or the encoded bytes. Raises ImageError for a file
    that is no image, is truncated, or has more than MAX_PIXELS pixels.
    """
    name = name or (str(source) if not isinstance(source, bytes) else "image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if isinstance(source, bytes):
                opened = Image.open(io.BytesIO(source), formats=FORMATS)
            else:
                check_regular_file(Path(source))
                opened = Image.open(source, formats=FORMATS)
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
    except InputError as error:
        missing = isinstance(error.__cause__, FileNotFoundError)
        raise ImageError(name, "no such file" if missing else "not a file") from error
    except _DECODE_ERRORS as error:
        raise ImageError(name, "damaged image") from error


def _from_wide_grey(image: Image.Image) -> Image.Image:
    """16-bit grey to 8-bit RGB by scaling; Pillow's own conversion would clip it to white."""
    values = np.asarray(image, dtype=np.float64)
    # The modes "I" and "F" do not tell whether their values have 8 or 16 bits.
    wide = image.mode.startswith("I;16") or values.max() > 255
    scale = 255 / 65535 if wide else 1.0
    grey = np.clip(np.round(values * scale), 0, 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


INTERPOLATION = "box halvings, then bicubic"  # of every crop here, as the table of models says it


def resize_to_cover(image: Image.Image, height: int, width: int) -> Image.Image:
    """Resize to the smallest cover of (height, width), as ADM: BOX halvings, then BICUBIC."""
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
    """Resize to a random size, crop (height, width) at a random place, flip half of the images.

    scale: in (0, 1], the smallest share of the resized short side that the crop keeps (ADM: 0.8).
        The size is 1 to 1 / scale times the smallest one that covers (height, width).
    """
    short = min(height, width)
    grown = int(random.integers(short, math.ceil(short / scale) + 1)) / short
    image = resize_to_cover(image, round(height * grown), round(width * grown))
    top = int(random.integers(0, image.height - height + 1))
    left = int(random.integers(0, image.width - width + 1))
    image = image.crop((left, top, left + width, top + height))
    return ImageOps.mirror(image) if random.random() < 0.5 else image


def image_to_pixels(image: Image.Image) -> np.ndarray:
    """An RGB image -> (height, width, 3) uint8."""
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


def save_png(pixels: np.ndarray, path: Path) -> None:
    """Write pixels (height, width, 3) uint8 as a PNG file, which appears only when complete."""
    with atomic_write(path) as file:
        Image.fromarray(pixels).save(file, format="PNG")
