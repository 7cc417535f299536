r"""Whole images from one engine without HTTP; benchmarks.serving starts it in each environment.

    python -m benchmarks.serving_offline --serve.gpt runs/demo/gpt \
        --serve.tokenizer runs/demo/tokenizer --images 16

The last line is JSON: the images per second, codes and pixels, and the seconds of a whole image.
"""

from dataclasses import dataclass

from autoregressive.serving.config import ServeConfig
from core.config import parse_config, parse_first, run_command


@dataclass(frozen=True, kw_only=True)
class OfflineConfig:
    """What to sample.

    Args:
        serve: The models and the engine, as autoregressive.serve takes them; a class model.
        images: Number of images, all asked for at once.
        reference: Sample with the published algorithm, in one batch, instead.
    """

    serve: ServeConfig
    images: int = 16
    reference: bool = False

    def __post_init__(self) -> None:
        if self.images < 1:
            raise ValueError("images must be >= 1")


parse_first(OfflineConfig, __name__)

import asyncio
import json
import statistics
import time
from contextlib import aclosing

import torch

from autoregressive.inference.sampling_config import SamplingConfig
from autoregressive.sampling.pipeline import ImagePipeline
from autoregressive.serve import open_engine
from autoregressive.serving.http.image_engine import ImageEngine, ImageTask
from benchmarks.support import reference_sampler
from core.distributed.world import choose_device


def measure(config: OfflineConfig) -> dict[str, float]:
    """Images per second, and the median and 99th percentile of the seconds until an image."""
    pipeline = ImagePipeline.from_pretrained(config.serve.gpt, config.serve.tokenizer)
    if config.reference:
        return numbers(*_reference(config, pipeline))
    with open_engine(config.serve, pipeline) as engine:
        return numbers(*asyncio.run(_engine(engine, config.images)))


def numbers(seconds: float, latencies: list[float]) -> dict[str, float]:
    """Number of images, images per second, p50 and p99 of the latencies in seconds."""
    percentiles = statistics.quantiles(latencies * 2, n=100, method="inclusive")
    return {
        "images": len(latencies),
        "images_per_second": len(latencies) / seconds,
        "p50": percentiles[49],
        "p99": percentiles[98],
    }


async def _engine(engine: ImageEngine, count: int) -> tuple[float, list[float]]:
    await engine.start()
    classes, height = engine.gpt.num_classes, engine.gpt.grid[0]
    latencies: list[float] = []
    begin = 0.0
    for number in (1, count):  # the first warms up
        latencies.clear()
        tasks = [ImageTask(i % classes, SamplingConfig(seed=i)) for i in range(number)]
        begin = time.perf_counter()
        async with aclosing(engine.images(tasks)) as images:
            async for image in images:
                if image.rows == height:
                    latencies.append(time.perf_counter() - begin)
    seconds = time.perf_counter() - begin
    await engine.stop()
    return seconds, latencies


def _reference(config: OfflineConfig, pipeline: ImagePipeline) -> tuple[float, list[float]]:
    device = choose_device(config.serve.compute.device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.serve.compute.precision]
    gpt, vq = pipeline.gpt.to(device, dtype), pipeline.vq.to(device)
    sampling = SamplingConfig().resolved("class")
    labels = torch.arange(config.images, device=device) % gpt.config.num_classes
    begin = time.perf_counter()
    with torch.inference_mode():
        vq.decode(reference_sampler.generate(gpt, labels, sampling)).cpu()
    seconds = time.perf_counter() - begin
    return seconds, [seconds] * config.images


def main() -> None:
    """Entry point."""
    print(json.dumps(measure(parse_config(OfflineConfig))))


if __name__ == "__main__":
    run_command(main)
