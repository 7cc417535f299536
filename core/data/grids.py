"""Image grids, with or without captions."""

import math
import textwrap
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw

CAPTION_WIDTH, CAPTION_LINES, CHARACTER = 160, 3, (6, 11)  # pixels, lines, a letter's pixels


def image_grid(
    pixels: np.ndarray, columns: int, captions: Sequence[str] | None = None, padding: int = 2
) -> np.ndarray:
    """Images (n, height, width, 3) uint8 -> one image uint8, `columns` per row on white.

    captions: a text below each image; small images are enlarged to make room for it.
    """
    if captions:
        pairs = zip(pixels, captions, strict=True)
        pixels = np.stack([_captioned(image, caption) for image, caption in pairs])
    count, height, width, _ = pixels.shape
    rows = math.ceil(count / columns)
    shape = rows * (height + padding) + padding, columns * (width + padding) + padding, 3
    grid = np.full(shape, 255, np.uint8)
    for i, image in enumerate(pixels):
        top = padding + (i // columns) * (height + padding)
        left = padding + (i % columns) * (width + padding)
        grid[top : top + height, left : left + width] = image
    return grid


def enlarged_grid(images: Sequence[Image.Image], columns: int, times: int = 3) -> Image.Image:
    """Images of one size as one image with `columns` a row, `times` as large: for notebooks."""
    pixels = image_grid(np.stack([np.asarray(image) for image in images]), columns)
    height, width = pixels.shape[:2]
    return Image.fromarray(pixels).resize((width * times, height * times), Image.Resampling.NEAREST)


def _captioned(image: np.ndarray, caption: str) -> np.ndarray:
    """An image (height, width, 3) uint8, at least CAPTION_WIDTH wide, with its caption below."""
    times = math.ceil(CAPTION_WIDTH / image.shape[1])
    image = image.repeat(times, axis=0).repeat(times, axis=1)
    height, width, _ = image.shape
    lines = textwrap.wrap(caption, width // CHARACTER[0])
    if len(lines) > CAPTION_LINES:
        lines = [*lines[: CAPTION_LINES - 1], lines[CAPTION_LINES - 1][:-3] + "..."]
    canvas = Image.new("RGB", (width, height + CAPTION_LINES * CHARACTER[1] + 4), "white")
    canvas.paste(Image.fromarray(image))
    ImageDraw.Draw(canvas).text((2, height), "\n".join(lines), fill="black", spacing=1)
    return np.asarray(canvas)


def side_by_side(real: torch.Tensor, fake: torch.Tensor, columns: int) -> np.ndarray:
    """Two sets of pixels (n, height, width, 3) uint8 -> a grid of alternating rows: real, fake."""
    columns = min(columns, len(real))
    rows = [part[i : i + columns] for i in range(0, len(real), columns) for part in (real, fake)]
    return image_grid(torch.cat(rows).numpy(), columns)
