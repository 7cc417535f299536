"""Complete pictures: keep the top rows, or redraw a rectangle; under classes or prompts.

    python -m autoregressive.inpaint --gpt runs/gpt_b --tokenizer weights/vq16 --images photos \
        --keep_rows 8 --classes [207] --out completions

A decoder draws codes in raster order, each from the codes before it. What is kept *below or right
of* a redrawn cell is kept, but its cell was drawn without seeing it: seams there are expected.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from autoregressive.conditions import ConditionConfig, open_conditions
from autoregressive.inference.engine import InferenceEngine
from autoregressive.inference.generate import sample_codes
from autoregressive.inference.sampling_config import SamplingConfig
from autoregressive.models.conditioning import ConditionLike, as_condition
from autoregressive.pipeline import PipelineConfig, decode_pixels, load_pair, make_ready
from core.config import InputError, parse_config, run_command, save_config
from core.data.grids import image_grid
from core.data.images import pixels_to_images, save_png
from core.data.loader import CenterCrop, OrderedImages, ordered_batches
from core.data.open import open_images
from core.distributed.world import World, distributed
from core.files import write_json
from tokenizer.models.vq_model import VQModel

HOLE = 128  # the grey level of what is redrawn, in the shown input


@dataclass(frozen=True, kw_only=True)
class InpaintConfig(PipelineConfig, ConditionConfig):
    """Which pictures, and what of them to draw anew.

    Args:
        images: Pictures: a folder, or a list file; num_images takes the first ones.
        out: The folder to write completions.png, png/ and index.json to.
        keep_rows: Rows of codes to keep from the top; the rest is drawn.
        redraw: Instead: top, left, bottom, right of the cells to redraw; [0, 0, 0, 0] for none.
        sampling: Guidance, filters and seed.
        batch_size: Pictures at a time.
    """

    images: Path
    out: Path
    keep_rows: int = 0
    redraw: tuple[int, int, int, int] = (0, 0, 0, 0)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    batch_size: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 1 or self.keep_rows < 0:
            raise ValueError("batch_size must be >= 1, keep_rows >= 0")
        if bool(self.keep_rows) == any(self.redraw):
            raise ValueError("give keep_rows or redraw, one of them")


def positions_to_inpaint(config: InpaintConfig, grid: tuple[int, int]) -> torch.Tensor:
    """Which cells are drawn anew, (rows, columns) bool."""
    rows, columns = grid
    top, left, bottom, right = config.redraw
    if config.keep_rows:
        top, left, bottom, right = config.keep_rows, 0, rows, columns
    if not (0 <= top < bottom <= rows and 0 <= left < right <= columns):
        raise InputError(f"keep_rows or redraw: not a part of the grid of {rows} x {columns} codes")
    cells = torch.zeros(rows, columns, dtype=torch.bool)
    cells[top:bottom, left:right] = True
    return cells


def inpaint(config: InpaintConfig, world: World) -> None:
    """Draw every picture's missing part and write the results."""
    pair = load_pair(config)
    cells = positions_to_inpaint(config, pair.gpt.config.grid)
    images = open_images(config.images)
    count = min(config.num_images or len(images), len(images))
    asked = dataclasses.replace(config, num_images=count)
    shown = open_conditions(asked, pair.gpt.config, config.sampling.seed, world)
    if shown.count < count:
        raise InputError(f"{shown.count} prompts for {count} pictures: give one for each")
    gpt, vq = make_ready(config, pair, math.ceil(count / config.batch_size), world)
    config.out.mkdir(parents=True, exist_ok=True)
    save_config(config, config.out / "config.yaml")
    height, width = (vq.config.downsample * side for side in gpt.config.grid)
    dataset = OrderedImages(images, CenterCrop(height, width))
    rows, skipped = [], []
    for batch in tqdm(ordered_batches(dataset, list(range(count)), config.batch_size, 0)):
        skipped += batch.skipped
        if batch.pixels is None:
            continue
        ids = torch.from_numpy(batch.indices)
        negative = shown.negative and as_condition(shown.negative).repeat(len(ids))
        pixels = batch.pixels.to(world.device)
        drawn = fill(gpt, vq, pixels, cells, shown.batch(ids), config.sampling, ids, negative)
        hole = cells.repeat_interleave(vq.config.downsample, 0)
        hole = hole.repeat_interleave(vq.config.downsample, 1)
        seen = batch.pixels.masked_fill(hole[None, :, :, None], HOLE)
        for i, *triple in zip(ids.tolist(), batch.pixels, seen, drawn, strict=True):
            save_png(triple[2].numpy(), _folder(config.out / "png") / f"{i:06d}.png")
            rows += triple
    if not rows:
        raise InputError(f"{config.images}: no picture can be read")
    save_png(image_grid(torch.stack(rows).numpy(), columns=3), config.out / "completions.png")
    index = {"skipped": [list(item) for item in skipped], **shown.settings, **shown.index}
    write_json(config.out / "index.json", {"count": len(rows) // 3, **index})
    print(f"{config.out / 'completions.png'}: original, input, completion; {len(skipped)} skipped")


def _folder(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    return path


@torch.no_grad()
def fill(
    gpt: InferenceEngine,
    vq: VQModel,
    pixels: torch.Tensor,
    cells: torch.Tensor,
    condition: ConditionLike,
    sampling: SamplingConfig,
    sample_ids: torch.Tensor,
    negative: ConditionLike | None,
) -> torch.Tensor:
    """Pixels (n, height, width, 3) uint8 with `cells` (rows, columns) drawn anew, on the CPU."""
    codes = vq.encode(pixels_to_images(pixels))
    known = codes.masked_fill(cells.to(codes.device), -1)
    codes = sample_codes(gpt, condition, sampling, sample_ids, negative, known)
    return decode_pixels(vq, codes).cpu()


def main() -> None:
    """Entry point."""
    config = parse_config(InpaintConfig)
    with distributed(config.device) as world:
        if world.size > 1:
            raise InputError("complete runs in one process")
        inpaint(config, world)


if __name__ == "__main__":
    run_command(main)
