"""Sample images from a decoder and a tokenizer, and score them; run it again and it continues.

    python -m autoregressive.sample --gpt weights/t2i_512 --tokenizer weights/vq16_t2i \
        --prompts prompts.txt --out samples/prompts
    python -m autoregressive.sample --gpt runs/gpt_b --tokenizer weights/vq16 --out samples/b \
        --num_images 50000 --sampling.cfg_scale 2.0 --npz false \
        --judge.reference VIRTUAL_imagenet256_labeled.npz
    torchrun --nproc-per-node 8 -m autoregressive.sample ...
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from autoregressive.conditions import Classes, ConditionConfig, Prompts, open_conditions
from autoregressive.inference.engine import InferenceEngine
from autoregressive.inference.generate import sample_codes
from autoregressive.inference.sampling_config import SamplingConfig
from autoregressive.models.conditioning import ConditionLike, as_condition
from autoregressive.pipeline import (
    DecodeOverlap,
    PipelineConfig,
    decode_pixels,
    load_pair,
    make_ready,
)
from autoregressive.png_layouts import Layout, write_pngs
from core.config import config_values, parse_config, run_command, save_config
from core.data.grids import image_grid
from core.data.images import save_png
from core.data.npz import save_npz
from core.data.shards import ShardReader, ShardWriter, codes_dtype
from core.distributed.world import World, distributed
from evaluations.report import Scored, publish
from evaluations.scorer import MetricsConfig, Scorer, check_size, open_scorer, score
from tokenizer.models.vq_model import VQModel


@dataclass(frozen=True, kw_only=True)
class SampleConfig(PipelineConfig, ConditionConfig):
    """What to sample, and where to.

    Args:
        out: The folder to write samples.png, samples.npz and index.json to.
        sampling: Guidance, filters and seed.
        resize: Resize to resize x resize before rounding (bicubic, no antialiasing: how the
            reference evaluates 384 px models at 256); 0 to keep the size.
        batch_size: Images at a time on each process; does not change any image.
        shard_size: Images a shard: what a killed run loses at most, on each process.
        npz: Write samples.npz, arr_0 uint8 (n, height, width, 3) and the labels in arr_1. Without
            it only the codes are kept, 512 bytes an image of 16 x 16 codes.
        png: Also write png files, as `layout` says.
        layout: flat: png/000000.png, as scorers of COCO-30k and PartiPrompts read. geneval:
            png/00000/metadata.jsonl and png/00000/samples/0000.png. dpg: all images of a prompt in
            one picture, png/NAME.png (DPG-Bench: images_per_prompt 4).
        judge: With a reference, score the images as they are sampled and write scores.json.
        grid_rows: Classes (or rows of images) of samples.png.
        grid_columns: Images a row of samples.png.
    """

    out: Path
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    resize: int = 0
    batch_size: int = 32
    shard_size: int = 500
    npz: bool = True
    png: bool = False
    layout: Layout = "flat"
    judge: MetricsConfig = field(default_factory=MetricsConfig)
    grid_rows: int = 10
    grid_columns: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.batch_size, self.shard_size) < 1:
            raise ValueError("batch_size and shard_size must be >= 1")
        if min(self.grid_rows, self.grid_columns) < 1 or self.resize < 0:
            raise ValueError("grid_rows and grid_columns must be >= 1, resize >= 0")
        if self.layout != "flat" and not self.png:
            raise ValueError(f"layout {self.layout} is of png files: give png true")
        if self.layout == "dpg" and self.shard_size % self.images_per_prompt:
            raise ValueError("layout dpg: shard_size must be a multiple of images_per_prompt")


def score_samples(
    gpt: InferenceEngine,
    vq: VQModel,
    conditions: Callable[[np.ndarray], ConditionLike],
    count: int,
    sampling: SamplingConfig,
    judge: Scorer,
    world: World,
) -> dict[str, float]:
    """Sample images 0 .. count-1 under conditions(ids) and score them (empty off rank 0)."""
    evaluator = judge.evaluator(world)
    # Equally many on each rank, so that sharded weights are gathered in step; the judge counts
    # the repeated ones once.
    ids = np.arange(math.ceil(count / world.size) * world.size) % count
    for part in torch.from_numpy(ids[world.rank :: world.size]).split(judge.batch_size):
        condition = conditions(part.numpy())
        codes = sample_codes(gpt, condition, sampling, part)
        evaluator.update(decode_pixels(vq, codes), part)
    collected = evaluator.merge(world)
    return score(judge, collected).values if world.is_main else {}


def sample(config: SampleConfig, world: World) -> None:
    """Sample all images, this rank's shards on this rank, then write npz, png, grid and index."""
    pair = load_pair(config)
    shown = open_conditions(config, pair.gpt.config, config.sampling.seed, world)
    judge = open_scorer(config.judge, "generation", world) if config.judge.reference else None
    if judge:
        height, width = (pair.vq.config.downsample * side for side in pair.gpt.config.grid)
        size = (config.resize, config.resize) if config.resize else (height, width)
        check_size(size, Path(config.gpt), judge.reference)
    evaluator = judge.evaluator(world) if judge else None
    settings = {**pair.settings, "resize": config.resize, "npz": config.npz}
    settings |= {
        "sampling": config.sampling.settings(
            pair.gpt.config.condition, pair.gpt.config.guidance_input
        ),
        **shown.settings,
    }
    writer = ShardWriter(config.out, shown.count, config.shard_size, settings, world)
    finished = writer.finished() if judge else []
    todo = writer.begin()
    if world.is_main:
        save_config(config, config.out / "config.yaml")
    batches = math.ceil(shown.count / config.batch_size / world.size)
    decoder, vq = make_ready(config, pair, batches, world)
    total = sum(len(writer.items(shard)) for shard in (*todo, *finished))
    beside = DecodeOverlap(world.device)
    with (
        tqdm(total=total * world.size, unit="image", disable=not world.is_main) as bar,
        ThreadPoolExecutor(1) as background,  # writes a shard while the next is drawn
    ):
        written: Future[None] | None = None
        for shard in sorted((*todo, *finished)):
            ids = torch.tensor(writer.items(shard))
            if shard in finished:
                # The images of an earlier run, for the scores.
                drawn = _read_codes(writer, shard, ids, config.batch_size, world)
            else:
                drawn = _draw_codes(decoder, shown, ids, config.batch_size, config.sampling)
            kept: dict[str, list[np.ndarray]] = {"codes": [], "pixels": []}
            for part, codes in beside.one_behind(drawn):
                with beside.working():
                    pixels = decode_pixels(vq, codes, config.resize)
                    if evaluator:
                        evaluator.update(pixels, part)
                    kept["codes"].append(
                        codes.cpu().numpy().astype(codes_dtype(vq.config.vocab_size))
                    )
                    kept["pixels"].append(pixels.cpu().numpy())
                bar.update(len(part) * world.size)
            if written:
                written.result()
            if shard in todo:
                written = background.submit(write_shard, config, writer, shard, kept, shown)
        if written:
            written.result()
    if world.is_main and config.sampling.speculation_window > 1 and decoder.steps_taken:
        share = (decoder.config.num_codes - 1) * _batches_of(writer, todo, config.batch_size)
        print(f"speculative: {share / decoder.steps_taken:.2f} codes a step of each batch")
    writer.finish(shown.index)
    if world.is_main:
        _write_outputs(config, vq, shown)
    if judge and evaluator:
        scored = Scored(evaluator.merge(world), shown.labels, (), [])
        publish(judge, scored, config.out, config_values(config), world)


def _batches_of(writer: ShardWriter, shards: list[int], batch_size: int) -> int:
    return sum(math.ceil(len(writer.items(shard)) / batch_size) for shard in shards)


def _draw_codes(
    decoder: InferenceEngine,
    shown: Classes | Prompts,
    ids: torch.Tensor,
    batch_size: int,
    sampling: SamplingConfig,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Draw images ids (n,) int64 -> (ids, codes) by batch."""
    for part in ids.split(batch_size):
        negative = shown.negative and as_condition(shown.negative).repeat(len(part))
        yield part, sample_codes(decoder, shown.batch(part), sampling, part, negative)


def _read_codes(
    writer: ShardWriter, shard: int, ids: torch.Tensor, batch_size: int, world: World
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The codes of a finished shard -> (ids, codes) by batch."""
    codes = torch.from_numpy(writer.read(shard, "codes").astype(np.int64))
    for part, known in zip(ids.split(batch_size), codes.split(batch_size), strict=True):
        yield part, known.to(world.device)


def write_shard(
    config: SampleConfig,
    writer: ShardWriter,
    shard: int,
    kept: dict[str, list[np.ndarray]],
    shown: Classes | Prompts,
) -> None:
    """A shard's codes, and its pixels where a file of them is wanted."""
    arrays = {name: np.concatenate(parts) for name, parts in kept.items()}
    if config.png:
        prompts = shown if isinstance(shown, Prompts) else None
        write_pngs(
            config.out / "png", config.layout, writer.items(shard), arrays["pixels"], prompts
        )
    if not config.npz:
        del arrays["pixels"]
    writer.write(shard, arrays)


def _write_outputs(config: SampleConfig, vq: VQModel, shown: Classes | Prompts) -> None:
    """The grid, and the npz streamed from the shards."""
    rows, columns = config.grid_rows, config.grid_columns
    ids = np.arange(min(shown.count, rows * columns))
    if isinstance(shown, Classes):
        ids = grid_ids(shown.labels, rows, columns)
    codes = torch.from_numpy(ShardReader(config.out, "codes")[ids].astype(np.int64))
    device = vq.quant_conv.weight.device
    parts = [decode_pixels(vq, part.to(device), config.resize) for part in codes.split(32)]
    pixels = torch.cat(parts).cpu().numpy()
    captions = [shown.of(i).text for i in ids.tolist()] if isinstance(shown, Prompts) else None
    save_png(image_grid(pixels, columns, captions), config.out / "samples.png")
    written = [config.out / "samples.png", config.out / "index.json"]
    if config.npz:
        path = config.out / "samples.npz"
        labels = {} if shown.labels is None else {"arr_1": shown.labels}
        save_npz(path, shown.count, _batches(ShardReader(config.out, "pixels")), **labels)
        written.append(path)
    print("\n".join(str(path) for path in written))


def _batches(pixels: ShardReader) -> Iterator[np.ndarray]:
    for start in range(0, len(pixels), 500):
        yield pixels[np.arange(start, min(start + 500, len(pixels)))]


def grid_ids(labels: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Which images to show: a row per class where there are enough of each, else the first ones."""
    classes = list(dict.fromkeys(np.sort(np.unique(labels))[:rows].tolist()))
    by_class = [np.flatnonzero(labels == label)[:columns] for label in classes]
    if all(len(ids) == columns for ids in by_class):
        return np.concatenate(by_class)
    return np.arange(min(len(labels), rows * columns))


def main() -> None:
    """Entry point."""
    config = parse_config(SampleConfig)
    with distributed(config.device) as world:
        sample(config, world)


if __name__ == "__main__":
    run_command(main)
