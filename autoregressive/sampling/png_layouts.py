"""Sampled images as png files, in the folder layouts that benchmark scorers read."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from autoregressive.sampling.conditions import PromptList
from autoregressive.sampling.config import Layout
from core.config import InputError
from core.data.grids import image_grid
from core.data.images import save_png


def check_layout(layout: Layout, prompts: PromptList | None) -> None:
    """Raise InputError for a layout by prompt if the images have no prompts."""
    if layout != "flat" and prompts is None:
        raise InputError(f"layout {layout} needs prompts; this model is conditioned on classes")


def has_pngs(folder: Path, layout: Layout, ids: range, prompts: PromptList | None) -> bool:
    """Whether every file that write_pngs writes for these images exists."""
    if layout == "flat" or prompts is None:  # None: see check_layout
        return all((folder / f"{i:06d}.png").exists() for i in ids)
    if layout == "geneval":
        places = (divmod(i, prompts.per_prompt) for i in ids)
        return all((folder / f"{p:05d}" / "samples" / f"{n:04d}.png").exists() for p, n in places)
    return all((folder / f"{prompts.of_image(i).name}.png").exists() for i in ids)


def write_pngs(
    folder: Path, layout: Layout, ids: range, pixels: np.ndarray, prompts: PromptList | None
) -> None:
    """Write images `ids`, pixels (n, height, width, 3) uint8; layout: see SampleRunConfig."""
    folder.mkdir(exist_ok=True)
    if layout == "flat":
        # PNG compression releases the interpreter's lock, so threads help.
        with ThreadPoolExecutor() as pool:
            list(pool.map(save_png, pixels, (folder / f"{i:06d}.png" for i in ids)))
        return
    assert prompts is not None  # check_layout
    for i, image in zip(ids, pixels, strict=True):
        prompt, number = divmod(i, prompts.per_prompt)
        if layout == "geneval":
            place = folder / f"{prompt:05d}"
            (place / "samples").mkdir(parents=True, exist_ok=True)
            (place / "metadata.jsonl").write_text(prompts.of_image(i).record + "\n", "utf-8")
            save_png(image, place / "samples" / f"{number:04d}.png")
        elif number == 0:
            # SampleRunConfig makes a shard contain all images of a prompt.
            images = pixels[i - ids.start :][: prompts.per_prompt]
            columns = int(np.ceil(prompts.per_prompt**0.5))
            save_png(image_grid(images, columns), folder / f"{prompts.of_image(i).name}.png")
