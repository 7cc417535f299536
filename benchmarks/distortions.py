r"""Whether a distance rises with blur, noise and lost classes, on real images.

python -m benchmarks.distortions --images cifar10/train --image_size 32 32 \
    --metrics.extractor proxy --out runs/benchmarks/distortions
"""

from dataclasses import dataclass, field
from pathlib import Path

from core.config import InputError, config_values, parse_config, parse_first, run_command
from core.distributed.config import DeviceName
from evaluations.features.config import ExtractorConfig
from evaluations.metrics.config import check_reading


@dataclass(frozen=True, kw_only=True)
class DistortionsConfig:
    """Which images, and which network.

    Args:
        images: A folder of class folders.
        out: The folder for distortions.csv, distortions.json and a plot per kind.
        metrics: The feature extractor.
        num_images: Number of images, spread over all classes; null for all.
        image_size: Height and width of the centre crop.
        num_workers: Loader processes per rank.
        device: auto, cpu, cuda or mps.
    """

    images: Path
    out: Path
    metrics: ExtractorConfig = field(default_factory=ExtractorConfig)
    num_images: int | None = None
    image_size: tuple[int, int] = (256, 256)
    num_workers: int = 8
    device: DeviceName = "auto"

    def __post_init__(self) -> None:
        check_reading(self.image_size, self.num_workers)


parse_first(DistortionsConfig, __name__)

import functools
from collections.abc import Callable

import numpy as np
import torch
from torchvision.transforms.functional import gaussian_blur
from tqdm import tqdm

from core.distributed.world import World, distributed
from core.files import write_json
from evaluations.evaluator import Evaluator, FeatureStatistics
from evaluations.features.extractors import FeatureExtractor, build_extractor, note_of
from evaluations.image_source import open_image_source
from evaluations.metrics.frechet import Gaussian, frechet_distance
from evaluations.report import plot_trade, write_csv

BLUR = (0.5, 1.0, 2.0, 4.0)  # sigma in pixels
NOISE = (4.0, 8.0, 16.0, 32.0)  # standard deviation in grey levels
LOST = (0.2, 0.4, 0.6, 0.8)  # share of the classes that are dropped
NOISE_SEED = 0

Change = Callable[[torch.Tensor], torch.Tensor]


def blur(pixels: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian blur of (n, h, w, 3) uint8."""
    size = 2 * int(np.ceil(3 * sigma)) + 1
    return gaussian_blur(pixels.movedim(-1, 1), [size, size], [sigma, sigma]).movedim(1, -1)


def noise(pixels: torch.Tensor, level: float) -> torch.Tensor:
    """Gaussian noise added to (n, h, w, 3) uint8."""
    generator = torch.Generator().manual_seed(NOISE_SEED)
    added = level * torch.randn(pixels.shape, generator=generator)
    return (pixels + added).round().clamp(0, 255).byte()


def measure(config: DistortionsConfig, world: World) -> None:
    """Measure every distortion; raises InputError if a distance falls as one gets stronger."""
    extractor = build_extractor(config.metrics, world)
    source = open_image_source(config.images, config.image_size)
    if source.labels is None:
        raise InputError(f"{config.images}: a folder of class folders is needed")
    count = min(config.num_images or source.count, source.count)
    ids = np.linspace(0, source.count - 1, count).astype(int)
    batches = list(source.batches(ids, config.metrics.batch_size, config.num_workers))
    statistics = features_after(extractor, batches, world, lambda pixels: pixels)
    original = statistics.gaussian()
    rows = [{"kind": "none", "strength": 0.0, "distance": frechet_distance(original, original)}]
    changes: list[tuple[str, float, Change]] = [
        *(("blur", sigma, functools.partial(blur, sigma=sigma)) for sigma in BLUR),
        *(("noise", level, functools.partial(noise, level=level)) for level in NOISE),
    ]
    for kind, strength, change in tqdm(changes):
        changed = features_after(extractor, batches, world, change)
        distance = frechet_distance(changed.gaussian(), original)
        rows.append({"kind": kind, "strength": strength, "distance": distance})
    labels = source.labels[statistics.ids.numpy()]
    for share in LOST:
        distance = without_classes(statistics, labels, share)
        rows.append({"kind": "lost classes", "strength": share, "distance": distance})
    report(config, rows, extractor)


def features_after(
    extractor: FeatureExtractor,
    batches: list[tuple[np.ndarray, torch.Tensor]],
    world: World,
    change: Change,
) -> FeatureStatistics:
    """The features of all images after a change."""
    evaluator = Evaluator(extractor, world.device, len(batches[0][0]))
    for ids, pixels in batches:
        evaluator.update(change(pixels), ids)
    return evaluator.merge(world)


def without_classes(statistics: FeatureStatistics, labels: np.ndarray, share: float) -> float:
    """The distance without a share of the classes.

    Averages over every run of neighbouring classes, because the choice of classes matters.
    """
    assert statistics.features is not None
    classes = int(labels.max()) + 1
    lost = round(share * classes)
    distances = []
    for first in range(classes):
        kept = torch.from_numpy((labels - first) % classes >= lost)
        fewer = Gaussian.of_rows(statistics.features[kept])
        distances.append(frechet_distance(fewer, statistics.gaussian()))
    return float(np.mean(distances))


def report(
    config: DistortionsConfig, rows: list[dict[str, str | float]], extractor: FeatureExtractor
) -> None:
    """Write the table and the plots; raises InputError if a kind does not rise."""
    config.out.mkdir(parents=True, exist_ok=True)
    write_csv(rows, config.out / "distortions.csv")
    write_json(config.out / "distortions.json", {"rows": rows, "settings": config_values(config)})
    name = f"{extractor.metric} ({note_of(extractor) or 'FID'})"
    for row in rows:
        print(f"{row['kind']:<14}{row['strength']:>6}  {name}: {row['distance']:.6f}")
    falling = []
    for kind in dict.fromkeys(row["kind"] for row in rows[1:]):
        line = [rows[0], *(row for row in rows if row["kind"] == kind)]
        distances = [row["distance"] for row in line]
        falling += [kind] if distances != sorted(distances) else []
        path = config.out / f"{str(kind).replace(' ', '_')}.png"
        points = [{**row, "run": f"{row['strength']}"} for row in line]
        plot_trade(points, "strength", "distance", f"{kind}: {name}", path)
        print(path)
    if falling:
        raise InputError(f"{name} does not rise with {', '.join(map(str, falling))}")


def main() -> None:
    """Entry point."""
    config = parse_config(DistortionsConfig)
    with distributed(config.device) as world:
        measure(config, world)


if __name__ == "__main__":
    run_command(main)
