"""Build a reference file from real images: the statistics that samples are compared with.

python -m evaluations.reference --images imagenet/train --out references/imagenet256.npz
torchrun --nproc-per-node 8 -m evaluations.reference ...
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from core.config import config_values, parse_config, run_command
from core.distributed import DeviceName, World, distributed
from core.images import save_npz
from core.shards import write_json
from core.weights import file_sha256
from evaluations.detectors import DetectorName, build_detector, note_of
from evaluations.evaluator import collect
from evaluations.pictures import open_pictures
from evaluations.reference_file import Kind, statistics_arrays


@dataclass(frozen=True)
class ReferenceConfig:
    """Which images, and how they are looked at.

    Args:
        images: A folder of class folders, a flat folder, a list file, or an npz with arr_0.
        out: The npz to write, with a .json of the same name that says how it was made.
        kind: generation (gFID: training images) or reconstruction (rFID: validation images).
        image_size: Height and width of the centre crop; an npz is taken as it is.
        pictures: How many images to keep in arr_0, for precision, recall and KID (ADM: 10,000).
        seed: Draws those images.
        detector: inception (FID), or without weights proxy or random_inception (both NOT FID).
        inception_weights: The file pt_inception-2015-12-05-6726825d.pth; by default the cache's.
        batch_size: Images at a time on each process.
        num_workers: Loader processes per rank.
        device: auto, cpu, cuda or mps.
    """

    images: Path
    out: Path
    kind: Kind = "generation"
    image_size: tuple[int, int] = (256, 256)
    pictures: int = 10_000
    seed: int = 0
    detector: DetectorName = "inception"
    inception_weights: Path | None = None
    batch_size: int = 64
    num_workers: int = 8
    device: DeviceName = "auto"

    def __post_init__(self) -> None:
        if self.batch_size < 1 or min(self.num_workers, self.pictures) < 0:
            raise ValueError("batch_size must be >= 1, num_workers and pictures >= 0")
        if self.out.suffix != ".npz":
            raise ValueError(f"out is {self.out}, must end in .npz")


def build_reference(config: ReferenceConfig, world: World) -> None:
    """Look at every image once and write the statistics, in ADM's keys, and their protocol."""
    detector = build_detector(config.detector, config.inception_weights, world.device)
    pictures = open_pictures(config.images, config.image_size)
    collected = collect(
        detector, pictures, world, config.batch_size, config.num_workers, keep_rows=False
    )
    skipped = [item for rank in world.gather(pictures.skipped) for item in rank]
    if not world.is_main:
        return
    spatial = collected.spatial.gaussian() if collected.spatial else None
    arrays = statistics_arrays(collected.pooled.gaussian(), spatial)
    order = np.random.default_rng(config.seed).permutation(collected.ids.numpy())
    chosen = np.sort(order[: config.pictures])
    config.out.parent.mkdir(parents=True, exist_ok=True)
    # A second reading: 10,000 pictures need not fit in memory.
    batches = pictures.batches(chosen, config.batch_size, config.num_workers)
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
