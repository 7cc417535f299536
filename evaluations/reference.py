"""Build a reference file from real images: the statistics that samples are compared with.

python -m evaluations.reference --images imagenet/train --out references/imagenet256.npz
torchrun --nproc-per-node 8 -m evaluations.reference ...
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from core.config import config_values, parse_config, run_command
from core.data.npz import save_npz
from core.distributed.world import World, distributed
from core.files import write_json
from core.weights import file_sha256
from evaluations.evaluator import collect
from evaluations.features.extractors import ExtractorConfig, note_of
from evaluations.image_source import ImageSourceConfig, open_image_source
from evaluations.reference_stats import Kind, statistics_arrays


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig(ExtractorConfig, ImageSourceConfig):
    """Which images.

    Args:
        images: A folder of class folders, a flat folder, a list file, or an npz with arr_0.
        out: The npz to write, with a .json of the same name that says how it was made.
        kind: generation (gFID: training images) or reconstruction (rFID: validation images).
        pictures: How many images to keep in arr_0, for precision, recall and KID (ADM: 10,000).
        seed: Draws those images.
    """

    images: Path
    out: Path
    kind: Kind = "generation"
    pictures: int = 10_000
    seed: int = 0

    def __post_init__(self) -> None:
        ExtractorConfig.__post_init__(self)
        ImageSourceConfig.__post_init__(self)
        if self.pictures < 0:
            raise ValueError(f"pictures is {self.pictures}, must be >= 0")
        if self.out.suffix != ".npz":
            raise ValueError(f"out is {self.out}, must end in .npz")


def build_reference(config: ReferenceConfig, world: World) -> None:
    """Look at every image once and write the statistics, in ADM's keys, and their protocol."""
    detector = config.build_detector(world)
    pictures = open_image_source(config.images, config.image_size)
    looked = (config.batch_size, config.num_workers)
    collected = collect(detector, pictures, world, *looked, keep_rows=False)
    skipped = [item for rank in world.gather(pictures.skipped) for item in rank]
    if not world.is_main:
        return
    spatial = collected.spatial.gaussian() if collected.spatial else None
    arrays = statistics_arrays(collected.pooled.gaussian(), spatial)
    order = np.random.default_rng(config.seed).permutation(collected.ids.numpy())
    chosen = np.sort(order[: config.pictures])
    config.out.parent.mkdir(parents=True, exist_ok=True)
    # A second reading: 10,000 pictures need not fit in memory.
    batches = pictures.batches(chosen, *looked)
    save_npz(config.out, len(chosen), (pixels.numpy() for _, pixels in batches), **arrays)
    protocol = {
        "kind": config.kind,
        "detector": config.detector,
        "note": note_of(detector),
        "weights_sha256": detector.weights_sha256,
        "n": collected.pooled.count,
        "image_size": list(pictures.size),
        "skipped": [list(item) for item in skipped],
        "sha256": file_sha256(config.out),
        "settings": config_values(config),
    }
    write_json(config.out.with_suffix(".json"), protocol)
    print(f"{config.out}: statistics of {collected.pooled.count} images ({config.detector})")


def main() -> None:
    """Entry point."""
    config = parse_config(ReferenceConfig)
    with distributed(config.device) as world:
        build_reference(config, world)


if __name__ == "__main__":
    run_command(main)
