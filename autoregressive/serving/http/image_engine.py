"""What the HTTP server asks of an engine: images of tasks, as they grow."""

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch

from autoregressive.inference.sampling_config import SamplingConfig
from autoregressive.models.conditioning import Condition
from autoregressive.models.config import GPTConfig
from core.config import InputError
from core.data.images import images_to_pixels
from tokenizer.models.vq_model import VQModel

# (class index or caption, negative caption) -> their conditions, of one image each.
Encode = Callable[[str | int, str | None], tuple[Condition, Condition | None]]
BLANK = 127  # grey level of the rows that are not sampled yet


class EngineStoppingError(Exception):
    """The server is being stopped and starts no further image."""


@dataclass(frozen=True)
class ImageTask:
    """One image to sample. It depends on these fields alone, not on what else runs.

    Args:
        prompt: The caption of a text model, or the class index of a class model.
        sampling: Guidance, filters and seed.
        sample_id: Number of the image among those of its seed.
        negative_prompt: The caption that guidance leads away from; None: the null caption.
        preview_rows: Numbers of rows of codes after which the image so far is wanted.
    """

    prompt: str | int
    sampling: SamplingConfig
    sample_id: int = 0
    negative_prompt: str | None = None
    preview_rows: tuple[int, ...] = ()


class ImageProgress(NamedTuple):
    """An image so far: its task's index, its rows of codes, pixels (height, width, 3) uint8.

    Rows of pixels that are not sampled yet are grey. The image is finished when `rows` is the
    grid's height.
    """

    index: int
    rows: int
    pixels: np.ndarray


class ImageEngine(Protocol):
    """Samples images. All methods are called in the server's event loop."""

    gpt: GPTConfig
    image_size: tuple[int, int]  # height and width in pixels
    negative_prompts: bool  # whether guidance can lead away from a caption

    async def start(self) -> None:
        """Begin to work; called once, in the loop in which images are asked for."""
        ...

    def images(self, tasks: Sequence[ImageTask]) -> AsyncGenerator[ImageProgress, None]:
        """Sample the tasks; yields previews, and each image once it is finished.

        Closing the generator gives the tasks up. Raises EngineStoppingError after `drain`.
        """
        ...

    def drain(self) -> None:
        """Refuse what has not begun, now and from now on; finish what has."""
        ...

    async def stop(self) -> None:
        """Free the models; nothing runs any more."""
        ...


def image_size(vq: VQModel, gpt: GPTConfig) -> tuple[int, int]:
    """Height and width of the GPT's images in pixels."""
    height, width = (vq.config.downsample * side for side in gpt.grid)
    return height, width


@torch.inference_mode()
def decode_rows(vq: VQModel, codes: torch.Tensor, grid: tuple[int, int]) -> np.ndarray:
    """The first codes of one image, (rows * width,) int64 -> pixels (height, width, 3) uint8.

    One image per call: another number of images could round differently.
    """
    (height, width), factor = grid, vq.config.downsample
    pixels = np.full((height * factor, width * factor, 3), BLANK, np.uint8)
    rows = len(codes) // width
    device = next(vq.parameters()).device
    decoded = vq.decode(codes.to(device).view(1, rows, width)).float()
    pixels[: rows * factor] = images_to_pixels(decoded)[0].cpu().numpy()
    return pixels


def class_of(gpt: GPTConfig, text: str | int, names: Sequence[str]) -> int:
    """The class index that a number or a class name stands for; raises InputError for neither."""
    lowered = [name.lower() for name in names]
    if isinstance(text, str) and text.strip().lower() in lowered:
        return lowered.index(text.strip().lower())
    try:
        label = int(text)
    except ValueError:
        label = -1
    if not 0 <= label < gpt.num_classes:
        named = " or a class name" if names else ""
        raise InputError(f"prompt must be a class in 0 .. {gpt.num_classes - 1}{named}")
    return label
