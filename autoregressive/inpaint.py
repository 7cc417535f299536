r"""Inpaint images: keep the top rows, or replace a rectangle; with classes or prompts.

    python -m autoregressive.inpaint --gpt runs/gpt_b --tokenizer weights/vq16 --images photos \
        --keep_rows 8 --conditions.classes 207 --out inpainted

Inpainting follows raster order: masked tokens are conditioned on what is above and to their left
only. Image content below and to the right of the region stays, but visible seams are expected.
"""

from dataclasses import dataclass, field
from pathlib import Path

from autoregressive.inference.sampling_config import SamplingConfig
from autoregressive.sampling.config import ConditionConfig, PipelineConfig
from core.config import InputError, parse_config, parse_first, run_command, save_config


@dataclass(frozen=True, kw_only=True)
class InpaintConfig(PipelineConfig):
    """Settings of autoregressive.inpaint.

    Args:
        images: The images: a folder or a list file.
        num_images: Use the first num_images of them; null for all.
        out: Output folder: completions.png, png/ and index.json.
        keep_rows: Keep this many rows of grid positions from the top and sample the others.
        region: Instead of keep_rows: sample the grid positions in this rectangle, [top, left,
            bottom, right]; bottom and right are exclusive.
        conditions: The classes or prompts.
        sampling: Guidance, filters and seed.
        batch_size: Images per batch.
    """

    images: Path
    out: Path
    num_images: int | None = None
    keep_rows: int | None = None
    region: tuple[int, int, int, int] | None = None
    conditions: ConditionConfig = field(default_factory=ConditionConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.batch_size < 1 or (self.num_images is not None and self.num_images < 1):
            raise ValueError("batch_size and num_images must be >= 1")
        if (self.keep_rows is None) == (self.region is None):
            raise ValueError("give either keep_rows or region")


parse_first(InpaintConfig, __name__)

import math

import torch
from tqdm import tqdm

from autoregressive.models.conditioning import Condition
from autoregressive.sampling.conditions import open_conditions
from autoregressive.sampling.pipeline import ImagePipeline, load_pipeline, prepare_pipeline
from core.data.grids import image_grid
from core.data.images import pixels_to_images, save_png
from core.data.loader import CenterCrop, OrderedImages, ordered_batches
from core.data.open import open_images
from core.distributed.world import World, distributed
from core.files import write_json
from core.lock import writer_lock

MASK_GREY = 128  # grey level of masked pixels in the middle column of completions.png


def positions_to_inpaint(config: InpaintConfig, grid: tuple[int, int]) -> torch.Tensor:
    """A mask (rows, columns) bool, True at the grid positions to sample."""
    rows, columns = grid
    top, left, bottom, right = config.region or (config.keep_rows or 0, 0, rows, columns)
    if not (0 <= top < bottom <= rows and 0 <= left < right <= columns):
        name = "region" if config.region else "keep_rows"
        raise InputError(f"{name}: not inside the grid of {rows} x {columns} codes")
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


def inpaint(config: InpaintConfig, world: World) -> None:
    """Inpaint every image and write the results."""
    pipeline = load_pipeline(config)
    gpt_config, downsample = pipeline.gpt.config, pipeline.vq.config.downsample
    config.sampling.check_grid(gpt_config.num_codes)
    mask = positions_to_inpaint(config, gpt_config.grid)
    images = open_images(config.images)
    count = min(config.num_images or len(images), len(images))
    conditions = open_conditions(config.conditions, count, gpt_config, config.sampling.seed, world)
    if conditions.count < count:
        raise InputError(
            f"{conditions.count} prompts for {count} images: give one prompt per image, or set "
            "conditions.images_per_prompt"
        )
    batches = math.ceil(count / config.batch_size)
    prepare_pipeline(config, pipeline, batches, world)
    (config.out / "png").mkdir(parents=True, exist_ok=True)
    save_config(config, config.out / "config.yaml")
    dataset = OrderedImages(images, CenterCrop(*pipeline.image_size))
    pixel_mask = mask.repeat_interleave(downsample, 0).repeat_interleave(downsample, 1)
    triples, skipped = [], []
    loader = ordered_batches(dataset, list(range(count)), config.batch_size, 0)
    for batch in tqdm(loader, total=batches, unit="batch"):
        skipped += batch.skipped
        if batch.pixels is None:
            continue
        ids = torch.from_numpy(batch.indices)
        away = conditions.negative and conditions.negative.repeat(len(ids))
        results = inpaint_batch(
            pipeline, batch.pixels.to(world.device), mask, conditions[ids], config, ids, away
        )
        masked = batch.pixels.masked_fill(pixel_mask[None, :, :, None], MASK_GREY)
        for i, *triple in zip(ids.tolist(), batch.pixels, masked, results, strict=True):
            save_png(triple[2].numpy(), config.out / "png" / f"{i:06d}.png")
            triples += triple
    if not triples:
        raise InputError(f"{config.images}: no image can be read")
    save_png(image_grid(torch.stack(triples).numpy(), columns=3), config.out / "completions.png")
    index = {"skipped": [list(item) for item in skipped], **conditions.settings, **conditions.index}
    write_json(config.out / "index.json", {"count": len(triples) // 3, **index})
    print(f"{config.out / 'completions.png'}: original, masked, inpainted; {len(skipped)} skipped")


def inpaint_batch(
    pipeline: ImagePipeline,
    pixels: torch.Tensor,
    mask: torch.Tensor,
    condition: Condition,
    config: InpaintConfig,
    sample_ids: torch.Tensor,
    negative: Condition | None,
) -> torch.Tensor:
    """Pixels (n, height, width, 3) uint8, mask (rows, columns) bool -> new pixels, on the CPU."""
    codes = pipeline.encode(pixels_to_images(pixels))
    forced = codes.masked_fill(mask.to(codes.device), -1)
    codes = pipeline.sample(condition, config.sampling, sample_ids, negative, forced)
    return pipeline.decode(codes).cpu()


def main() -> None:
    """Entry point."""
    config = parse_config(InpaintConfig)
    with distributed(config.compute.device) as world, writer_lock(config.out, world):
        if world.size > 1:
            raise InputError("autoregressive.inpaint runs in a single process")
        inpaint(config, world)


if __name__ == "__main__":
    run_command(main)
