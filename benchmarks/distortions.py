"""Does a distance rise as pictures get worse? Blur, noise and lost classes, on real pictures.

python -m benchmarks.distortions --images cifar10/train --image_size [32,32] --detector proxy \
    --out runs/benchmarks/distortions
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torchvision.transforms.functional import gaussian_blur
from tqdm import tqdm

from core.config import InputError, config_values, parse_config, run_command
from core.distributed.world import World, distributed
from core.files import write_json
from evaluations.evaluator import Collected, Evaluator
from evaluations.features.extractors import ExtractorConfig, FeatureExtractor, note_of
from evaluations.image_source import ImageSourceConfig, open_image_source
from evaluations.metrics.frechet import Gaussian, frechet_distance
from evaluations.report import plot_trade, write_csv

BLUR = (0.5, 1.0, 2.0, 4.0)  # sigma in pixels
NOISE = (4.0, 8.0, 16.0, 32.0)  # standard deviation in grey levels
LOST = (0.2, 0.4, 0.6, 0.8)  # share of the classes that are dropped
NOISE_SEED = 0

Change = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class DistortionsConfig(ExtractorConfig, ImageSourceConfig):
    """Which pictures.

    Args:
        images: A folder of class folders.
        out: The folder to write distortions.csv, distortions.json and a plot per kind to.
        count: At most so many pictures, spread over all classes; 0 for all.
    """

    images: Path
    out: Path
    count: int = 0

    def __post_init__(self) -> None:
        ExtractorConfig.__post_init__(self)
        ImageSourceConfig.__post_init__(self)


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
    """Every distortion against the pictures themselves; raises InputError where one falls."""
    detector = config.build_detector(world)
    pictures = open_image_source(config.images, config.image_size)
    if pictures.labels is None:
        raise InputError(f"{config.images}: a folder of class folders is needed")
    count = min(config.count or pictures.count, pictures.count)
    ids = np.linspace(0, pictures.count - 1, count).astype(int)
    batches = list(pictures.batches(ids, config.batch_size, config.num_workers))
    collected = look(detector, batches, world, lambda pixels: pixels)
    original = collected.gaussian()
    rows = [{"kind": "none", "strength": 0.0, "distance": frechet_distance(original, original)}]
    changes: list[tuple[str, float, Change]] = [
        *(("blur", sigma, functools.partial(blur, sigma=sigma)) for sigma in BLUR),
        *(("noise", level, functools.partial(noise, level=level)) for level in NOISE),
    ]
    for kind, strength, change in tqdm(changes):
        distance = frechet_distance(look(detector, batches, world, change).gaussian(), original)
        rows.append({"kind": kind, "strength": strength, "distance": distance})
    labels = pictures.labels[collected.ids.numpy()]
    for share in LOST:
        distance = without_classes(collected, labels, share)
        rows.append({"kind": "lost classes", "strength": share, "distance": distance})
    report(config, rows, detector)


def look(
    detector: FeatureExtractor,
    batches: list[tuple[np.ndarray, torch.Tensor]],
    world: World,
    change: Change,
) -> Collected:
    """The features of all pictures after a change."""
    evaluator = Evaluator(detector, world.device, len(batches[0][0]))
    for ids, pixels in batches:
        evaluator.update(change(pixels), ids)
    return evaluator.merge(world)


def without_classes(collected: Collected, labels: np.ndarray, share: float) -> float:
    """The distance without a share of the classes.

    Which ones go matters much, so it is the mean over dropping each run of neighbouring classes.
    """
    assert collected.rows is not None
    classes = int(labels.max()) + 1
    lost = round(share * classes)
    distances = []
    for first in range(classes):
        kept = torch.from_numpy((labels - first) % classes >= lost)
        fewer = Gaussian.of_rows(collected.rows[kept])
        distances.append(frechet_distance(fewer, collected.gaussian()))
    return float(np.mean(distances))


def report(
    config: DistortionsConfig, rows: list[dict[str, str | float]], detector: FeatureExtractor
) -> None:
    """Table, plots, and whether each kind rises."""
    config.out.mkdir(parents=True, exist_ok=True)
    write_csv(rows, config.out / "distortions.csv")
    write_json(config.out / "distortions.json", {"rows": rows, "settings": config_values(config)})
    name = f"{detector.metric} ({note_of(detector) or 'FID'})"
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
