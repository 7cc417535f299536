r"""Images scored as they are sampled, against files between every two stages.

python -m benchmarks.streaming --gpt runs/demo/gpt --tokenizer runs/demo/tokenizer \
    --metrics.reference runs/demo/real.npz --metrics.extractor proxy

Compared with two ways that use files: `files` samples with our engine, writes one png per image,
packs them into an npz and scores it; `reference` does the same with the published sampling loop.
All run in one process with loaded models, on the same images; on a CPU, process time is measured.
"""

from dataclasses import dataclass, field

from autoregressive.inference.sampling_config import ComputeConfig, SamplingConfig
from core.config import parse_config, parse_first, run_command
from evaluations.metrics.config import MetricsConfig


@dataclass(frozen=True, kw_only=True)
class StreamingConfig:
    """Settings of benchmarks.streaming, for a class model.

    Args:
        gpt: The GPT: a run or checkpoint folder, a released file, or a Hub id.
        tokenizer: The tokenizer: a run or checkpoint folder, a released file, or a Hub id.
        compute: Device and precision.
        num_images: Number of images, of all classes in turn.
        metrics: The reference; its batch size is also that of sampling.
        sampling: Guidance, filters and seed.
        threads: CPU threads.
    """

    gpt: str
    tokenizer: str
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    num_images: int = 2000
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    threads: int = 1


parse_first(StreamingConfig, __name__)

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from autoregressive.sampling.loop import score_samples
from autoregressive.sampling.pipeline import ImagePipeline
from benchmarks.sampling import seconds
from benchmarks.support import reference_sampler
from core.data.images import save_png
from core.data.npz import save_npz
from core.distributed.world import World, distributed
from evaluations.evaluator import extract_features
from evaluations.image_source import open_image_source
from evaluations.scorer import Scorer, open_scorer, score


def by_files(
    draw: Callable[[torch.Tensor], torch.Tensor],
    pipeline: ImagePipeline,
    count: int,
    scorer: Scorer,
    world: World,
) -> dict[str, float]:
    """Images to png files, png files to an npz, the npz to scores."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for ids in torch.arange(count).split(scorer.batch_size):
            for i, image in zip(ids.tolist(), pipeline.decode(draw(ids)).cpu(), strict=True):
                save_png(image.numpy(), folder / f"{i:06d}.png")
        save_npz(folder / "samples.npz", count, _read(folder, count, scorer.batch_size))
        images = open_image_source(folder / "samples.npz", (1, 1))
        return score(
            scorer, extract_features(scorer.extractor, images, world, scorer.batch_size)
        ).values


def _read(folder: Path, count: int, size: int) -> Iterator[np.ndarray]:
    for ids in np.array_split(np.arange(count), -(-count // size)):
        yield np.stack([np.asarray(Image.open(folder / f"{i:06d}.png")) for i in ids])


def measure(config: StreamingConfig, world: World) -> None:
    """Print the seconds of each way and the ratios, as JSON on the last line."""
    torch.set_num_threads(config.threads)
    pipeline = ImagePipeline.from_pretrained(config.gpt, config.tokenizer)
    classes = pipeline.gpt.config.num_classes
    scorer = open_scorer(config.metrics, "generation", world)
    pipeline.prepare(**config.compute.arguments(), device=world.device)
    gpt = pipeline.gpt.to(world.device)
    sampling = config.sampling.resolved("class")

    def ours(ids: torch.Tensor) -> torch.Tensor:
        return pipeline.sample(ids % classes, sampling, ids)

    def reference(ids: torch.Tensor) -> torch.Tensor:
        return reference_sampler.generate(gpt, (ids % classes).to(world.device), sampling)

    def stream(count: int) -> dict[str, float]:
        return score_samples(pipeline, lambda ids: ids % classes, count, sampling, scorer, world)

    ways: dict[str, Callable[[int], dict[str, float]]] = {
        "streaming": stream,
        "files": lambda count: by_files(ours, pipeline, count, scorer, world),
        "reference": lambda count: by_files(reference, pipeline, count, scorer, world),
    }
    taken, distances = {}, {}
    for name, way in ways.items():
        way(2 * scorer.batch_size)  # warms up
        taken[name] = seconds(
            lambda way=way, name=name: distances.update({name: way(config.num_images)}),
            world.device,
        )
        distance = distances[name][scorer.distance]
        print(f"{name:<10} {taken[name]:8.2f} s  {scorer.distance} {distance:.6f}")
    ratios = {f"{name}_over_streaming": taken[name] / taken["streaming"] for name in taken}
    print(json.dumps({"images": config.num_images, "seconds": taken, **ratios}))


def main() -> None:
    """Entry point."""
    config = parse_config(StreamingConfig)
    with distributed(config.compute.device) as world:
        measure(config, world)


if __name__ == "__main__":
    run_command(main)
