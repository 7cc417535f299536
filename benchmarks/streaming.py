"""Images scored as they are sampled, against files between every two stages.

python -m benchmarks.streaming --gpt runs/demo/gpt --tokenizer runs/demo/tokenizer \
    --metrics.reference runs/demo/real.npz --metrics.extractor proxy

The other ways: `files` draws with our sampler, writes a png an image in the loop, reads them all
back into an npz and scores that; `naive` does the same with the reference's sampling loop. All in
one process, models loaded, on the same images; seconds of the process on a CPU.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from autoregressive.inference.engine import InferenceEngine
from autoregressive.inference.generate import generate
from autoregressive.inference.sampling_config import SamplingConfig
from autoregressive.pipeline import PipelineConfig, decode_pixels, load_pair, make_ready
from autoregressive.sample import score_samples
from benchmarks import reference_sampler
from benchmarks.sampling import seconds
from core.config import parse_config, run_command
from core.data.images import save_png
from core.data.npz import save_npz
from core.distributed.world import World, distributed
from evaluations.evaluator import extract_features
from evaluations.image_source import open_image_source
from evaluations.scorer import MetricsConfig, Scorer, open_scorer, score
from tokenizer.models.vq_model import VQModel


@dataclass(frozen=True, kw_only=True)
class StreamingConfig(PipelineConfig):
    """What to sample and score, for a decoder under classes.

    Args:
        num_images: How many images, of all classes in turn.
        metrics: The reference, and how to compare with it; its batch size is the sampler's too.
        sampling: Guidance, filters and seed.
        threads: Of a CPU.
    """

    num_images: int = 2000
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    threads: int = 1


def by_files(
    draw: Callable[[torch.Tensor], torch.Tensor],
    vq: VQModel,
    count: int,
    scorer: Scorer,
    world: World,
) -> dict[str, float]:
    """Pictures to png files, those to an npz, that to scores."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for ids in torch.arange(count).split(scorer.batch_size):
            for i, picture in zip(ids.tolist(), decode_pixels(vq, draw(ids)).cpu(), strict=True):
                save_png(picture.numpy(), folder / f"{i:06d}.png")
        save_npz(folder / "samples.npz", count, _read(folder, count, scorer.batch_size))
        pictures = open_image_source(folder / "samples.npz", (1, 1))
        return score(
            scorer, extract_features(scorer.extractor, pictures, world, scorer.batch_size)
        ).values


def _read(folder: Path, count: int, size: int) -> Iterator[np.ndarray]:
    for ids in np.array_split(np.arange(count), -(-count // size)):
        yield np.stack([np.asarray(Image.open(folder / f"{i:06d}.png")) for i in ids])


def measure(config: StreamingConfig, world: World) -> None:
    """Print the seconds of each way and the ratios, as JSON on the last line."""
    torch.set_num_threads(config.threads)
    pair = load_pair(config)
    gpt, classes = pair.gpt.to(world.device), pair.gpt.config.num_classes
    scorer = open_scorer(config.metrics, "generation", world)
    decoder, vq = make_ready(config, pair, 1, world)
    sampling = config.sampling.resolved("class")

    def ours(ids: torch.Tensor) -> torch.Tensor:
        return generate(decoder, ids % classes, **vars(sampling), sample_ids=ids)

    def reference(ids: torch.Tensor) -> torch.Tensor:
        return reference_sampler.generate(gpt, (ids % classes).to(world.device), sampling)

    def stream(decoder: InferenceEngine, count: int) -> dict[str, float]:
        labels = lambda ids: torch.from_numpy(ids % classes)  # noqa: E731
        return score_samples(decoder, vq, labels, count, sampling, scorer, world)

    ways: dict[str, Callable[[int], dict[str, float]]] = {
        "streaming": lambda count: stream(decoder, count),
        "files": lambda count: by_files(ours, vq, count, scorer, world),
        "naive": lambda count: by_files(reference, vq, count, scorer, world),
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
    with distributed(config.device) as world:
        measure(config, world)


if __name__ == "__main__":
    run_command(main)
