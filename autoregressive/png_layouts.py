"""Sampled pictures as png files, in the folders that the scorers of benchmarks read."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np

from autoregressive.conditions import Prompts
from core.config import InputError
from core.data.grids import image_grid
from core.data.images import save_png

Layout = Literal["flat", "geneval", "dpg"]


def write_pngs(
    folder: Path, layout: Layout, ids: range, pixels: np.ndarray, prompts: Prompts | None
) -> None:
    """Write images `ids`, pixels (n, height, width, 3) uint8; see SampleConfig.layout."""
    folder.mkdir(exist_ok=True)
    if layout == "flat":
        # Compression, which takes the time, runs outside the interpreter's lock.
        with ThreadPoolExecutor() as pool:
            list(pool.map(save_png, pixels, (folder / f"{i:06d}.png" for i in ids)))
        return
    if prompts is None:
        raise InputError(f"layout {layout} is of prompts; this decoder is conditioned on classes")
    for i, picture in zip(ids, pixels, strict=True):
        prompt, number = divmod(i, prompts.per_prompt)
        if layout == "geneval":
            place = folder / f"{prompt:05d}"
            (place / "samples").mkdir(parents=True, exist_ok=True)
            (place / "metadata.jsonl").write_text(prompts.of(i).record + "\n", "utf-8")
            save_png(picture, place / "samples" / f"{number:04d}.png")
        elif number == 0:
            # A shard holds whole prompts (SampleConfig), so all of this one's images are here.
            images = pixels[i - ids.start :][: prompts.per_prompt]
            columns = int(np.ceil(prompts.per_prompt**0.5))
            save_png(image_grid(images, columns), folder / f"{prompts.of(i).name}.png")
