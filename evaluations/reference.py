"""Build a reference file from real images: statistics to compare samples with.

python -m evaluations.reference --images imagenet/train --out references/imagenet256.npz
torchrun --nproc-per-node 8 -m evaluations.reference ...
"""

from dataclasses import dataclass, field
from pathlib import Path

from core.config import config_values, parse_config, parse_first, run_command
from core.distributed.config import DeviceName
from evaluations.features.config import ExtractorConfig
from evaluations.metrics.config import Kind, check_reading


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """Which images, and which network.

    Args:
        images: A folder of class folders, a flat folder, a list file, tars, or an npz with arr_0.
        out: The npz to write. A .json of the same name describes its origin.
        metrics: The feature extractor.
        kind: generation (gFID: training images) or reconstruction (rFID: validation images).
        kept_images: Number of images to keep in arr_0, for precision, recall and KID (ADM: 10,000).
        seed: Selects the images to keep.
        image_size: Height and width of the centre crop of image files; an npz is not cropped.
        num_workers: Loader processes per rank, for image files.
        device: auto, cpu, cuda or mps.
    """

    images: Path
    out: Path
    metrics: ExtractorConfig = field(default_factory=ExtractorConfig)
    kind: Kind = "generation"
    kept_images: int = 10_000
    seed: int = 0
    image_size: tuple[int, int] = (256, 256)
    num_workers: int = 8
    device: DeviceName = "auto"

    def __post_init__(self) -> None:
        check_reading(self.image_size, self.num_workers)
        if min(self.kept_images, self.seed) < 0:
            raise ValueError("kept_images and seed must be >= 0")
        if self.out.suffix != ".npz":
            raise ValueError(f"out is {self.out}, must end in .npz")


parse_first(ReferenceConfig, __name__)

import numpy as np

from core.data.npz import save_npz
from core.distributed.world import World, distributed
from core.files import write_json
from core.lock import writer_lock
from core.weights import file_sha256
from evaluations.evaluator import extract_features
from evaluations.features.extractors import build_extractor, note_of
from evaluations.image_source import open_image_source
from evaluations.reference_stats import statistics_arrays


def build_reference(config: ReferenceConfig, world: World) -> None:
    """Write the statistics of all images with ADM's keys, and the JSON that describes them."""
    extractor = build_extractor(config.metrics, world)
    images = open_image_source(config.images, config.image_size)
    reading = (config.metrics.batch_size, config.num_workers)
    statistics = extract_features(extractor, images, world, *reading, keep_features=False)
    skipped = [item for rank in world.gather(images.skipped) for item in rank]
    if not world.is_main:
        return
    spatial = statistics.spatial.gaussian() if statistics.spatial else None
    arrays = statistics_arrays(statistics.pooled.gaussian(), spatial)
    order = np.random.default_rng(config.seed).permutation(statistics.ids.numpy())
    chosen = np.sort(order[: config.kept_images])
    config.out.parent.mkdir(parents=True, exist_ok=True)
    # Read them a second time: 10,000 images need not fit in memory.
    batches = images.batches(chosen, *reading)
    save_npz(config.out, len(chosen), (pixels.numpy() for _, pixels in batches), **arrays)
    protocol = {
        "kind": config.kind,
        "extractor": config.metrics.extractor,
        "note": note_of(extractor),
        "weights_sha256": extractor.weights_sha256,
        "n": statistics.pooled.count,
        "image_size": list(images.size),
        "skipped": [list(item) for item in skipped],
        "sha256": file_sha256(config.out),
        "settings": config_values(config),
    }
    write_json(config.out.with_suffix(".json"), protocol)
    name = config.metrics.extractor
    print(f"{config.out}: statistics of {statistics.pooled.count} images ({name})")


def main() -> None:
    """Entry point."""
    config = parse_config(ReferenceConfig)
    folder, file = config.out.parent, config.out.name
    with distributed(config.device) as world, writer_lock(folder, world, file=file):
        build_reference(config, world)


if __name__ == "__main__":
    run_command(main)
