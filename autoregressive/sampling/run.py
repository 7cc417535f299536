"""A sample run: all images of a run in shards, each rank its own, scored while they are sampled.

Run again, it continues after the last finished shard. autoregressive.sample and
autoregressive.reproduce call it.
"""

import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from autoregressive.sampling.conditions import Conditions, open_conditions
from autoregressive.sampling.config import (
    SampleRunConfig,
)
from autoregressive.sampling.loop import CodeBatch, decode_batches, sample_batches
from autoregressive.sampling.pipeline import ImagePipeline, load_pipeline, prepare_pipeline
from autoregressive.sampling.png_layouts import check_layout, has_pngs, write_pngs
from core.config import config_values, save_config
from core.data.grids import image_grid
from core.data.images import save_png
from core.data.npz import save_npz
from core.data.shards import ShardReader, ShardWriter, codes_dtype
from core.distributed.world import World
from evaluations.evaluator import Evaluator
from evaluations.report import Scored, publish
from evaluations.scorer import check_count, check_size, open_scorer


def sample(config: SampleRunConfig, world: World) -> None:
    """Sample all images, each rank its own shards, then write npz, png, image grid and index."""
    pipeline = load_pipeline(config)
    gpt_config = pipeline.gpt.config
    config.sampling.check_grid(gpt_config.num_codes)
    config.sampling.check_order(gpt_config.parallel_regions)
    conditions = open_conditions(
        config.conditions, config.num_images, gpt_config, config.sampling.seed, world
    )
    check_layout(config.layout, conditions.prompts)
    if config.metrics.reference:
        check_count(conditions.count)
    scorer = open_scorer(config.metrics, "generation", world) if config.metrics.reference else None
    if scorer:
        size = (config.resize, config.resize) if config.resize else pipeline.image_size
        check_size(size, Path(config.gpt), scorer.reference)
    evaluator = scorer.evaluator(world) if scorer else None
    # Keys and values stay those of folders that older versions began, which must continue.
    settings = {**pipeline.settings, **config.compute.settings, **conditions.settings}
    settings |= {"resize": config.resize or 0, "npz": config.npz}
    settings |= {
        "sampling": config.sampling.settings(gpt_config.condition, gpt_config.guidance_input)
    }
    writer = ShardWriter(config.out, conditions.count, config.shard_size, settings, world)
    todo = writer.begin()
    finished = writer.finished()
    if not scorer:  # only those whose png files were not asked for, or are missing
        finished = [shard for shard in finished if lacks_pngs(config, writer, shard, conditions)]
    if world.is_main:
        save_config(config, config.out / "config.yaml")
        if not (config.out / "index.json").exists():  # an npz would be left from other samples
            (config.out / "samples.npz").unlink(missing_ok=True)
    batches = math.ceil(conditions.count / config.batch_size / world.size)
    prepare_pipeline(config, pipeline, batches, world)
    write_shards(config, pipeline, conditions, writer, todo, finished, evaluator)
    writer.finish(conditions.index)
    if world.is_main:
        write_outputs(config, pipeline, conditions)
    if scorer and evaluator:
        scored = Scored(evaluator.merge(world), conditions.labels, (), [])
        publish(scorer, scored, config.out, config_values(config), world)


def write_shards(
    config: SampleRunConfig,
    pipeline: ImagePipeline,
    conditions: Conditions,
    writer: ShardWriter,
    todo: list[int],
    finished: list[int],
    evaluator: Evaluator | None,
) -> None:
    """Sample and write the shards `todo`; show the images of all shards to the evaluator."""
    world, engine, size = writer.world, pipeline.engine, config.batch_size
    total = sum(len(writer.items(shard)) for shard in (*todo, *finished))
    with (
        tqdm(total=total * world.size, unit="image", disable=not world.is_main) as bar,
        ThreadPoolExecutor(1) as background,  # writes a shard while the next one is sampled
    ):
        written: Future[None] | None = None
        for shard in sorted((*todo, *finished)):
            ids = torch.tensor(writer.items(shard))
            if shard in finished:
                # The scores or the png files need these images again.
                batches = read_batches(writer, shard, ids, size, engine.device)
            else:
                batches = sample_batches(
                    pipeline,
                    conditions.__getitem__,
                    ids,
                    size,
                    config.sampling,
                    conditions.negative,
                )
            arrays: dict[str, list[np.ndarray]] = {"codes": [], "pixels": []}
            dtype = codes_dtype(pipeline.gpt.config.vocab_size)
            for batch in decode_batches(pipeline, batches, evaluator, config.resize):
                arrays["codes"].append(batch.codes.numpy().astype(dtype))
                arrays["pixels"].append(batch.pixels.numpy())
                bar.update(len(batch.ids) * world.size)
            if written:
                written.result()
            written = background.submit(
                write_shard, config, writer, shard, arrays, conditions, only_pngs=shard in finished
            )
        if written:
            written.result()
    regions = "parallel regions" if engine.config.parallel_regions else ""
    method = regions or config.sampling.several_codes_per_step
    if world.is_main and method and engine.steps_taken:
        batch_count = sum(math.ceil(len(writer.items(shard)) / size) for shard in todo)
        tokens = (engine.config.num_codes - 1) * batch_count
        print(f"{method}: {tokens / engine.steps_taken:.2f} codes per step")


def read_batches(
    writer: ShardWriter, shard: int, ids: torch.Tensor, batch_size: int, device: torch.device
) -> Iterator[CodeBatch]:
    """The codes of a finished shard, in batches."""
    codes = torch.from_numpy(writer.read(shard, "codes").astype(np.int64))
    for part, stored in zip(ids.split(batch_size), codes.split(batch_size), strict=True):
        yield part, stored.to(device)


def write_shard(
    config: SampleRunConfig,
    writer: ShardWriter,
    shard: int,
    parts: dict[str, list[np.ndarray]],
    conditions: Conditions,
    only_pngs: bool,
) -> None:
    """Write a shard's png files if they are missing, then its codes and pixels.

    only_pngs: the shard is finished, so that its codes and pixels are written already.
    """
    arrays = {name: np.concatenate(part) for name, part in parts.items()}
    if lacks_pngs(config, writer, shard, conditions):
        ids, folder = writer.items(shard), config.out / "png"
        write_pngs(folder, config.layout, ids, arrays["pixels"], conditions.prompts)
    if not config.npz:  # only samples.npz needs the pixels
        del arrays["pixels"]
    if not only_pngs:
        writer.write(shard, arrays)


def lacks_pngs(
    config: SampleRunConfig, writer: ShardWriter, shard: int, conditions: Conditions
) -> bool:
    """Whether a shard's png files are asked for and not all there."""
    ids, folder = writer.items(shard), config.out / "png"
    return config.png and not has_pngs(folder, config.layout, ids, conditions.prompts)


def write_outputs(config: SampleRunConfig, pipeline: ImagePipeline, conditions: Conditions) -> None:
    """Write samples.png, and samples.npz from the pixels of all shards."""
    columns = config.grid_columns
    ids, captions = conditions.grid(config.grid_rows, columns)
    codes = torch.from_numpy(ShardReader(config.out, "codes")[ids].astype(np.int64))
    batches = codes.to(pipeline.engine.device).split(32)
    pixels = torch.cat([pipeline.decode(part, config.resize) for part in batches]).cpu().numpy()
    save_png(image_grid(pixels, columns, captions), config.out / "samples.png")
    written = [config.out / "samples.png", config.out / "index.json"]
    if config.npz:
        path = config.out / "samples.npz"
        labels = {} if conditions.labels is None else {"arr_1": conditions.labels}
        save_npz(path, conditions.count, _chunks(ShardReader(config.out, "pixels")), **labels)
        written.append(path)
    print("\n".join(str(path) for path in written))


def _chunks(pixels: ShardReader) -> Iterator[np.ndarray]:
    for start in range(0, len(pixels), 500):
        yield pixels[np.arange(start, min(start + 500, len(pixels)))]
