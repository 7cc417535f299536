"""Build a reference file from real images: the statistics that samples are compared with.

python -m evaluations.reference --images imagenet/train --out references/imagenet256.npz
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from core.config import config_values, parse_config, run_command
from core.distributed import DeviceName, choose_device
from core.shards import write_json
from core.weights import file_sha256
from evaluations.detectors import DetectorName, build_detector
from evaluations.pictures import open_pictures
from evaluations.statistics import collect, save_reference


@dataclass(frozen=True)
class ReferenceConfig:
    """Which images, and how they are looked at.

    Args:
        images: A folder of class folders, a flat folder, a list file, or an npz with arr_0.
        out: The npz to write, with a .json of the same name that says how it was made.
        image_size: Height and width of the centre crop.
        detector: inception (FID), or proxy (NOT FID; needs no weights).
        inception_weights: The file pt_inception-2015-12-05-6726825d.pth; by default the cache's.
        batch_size: Images at a time.
        num_workers: Loader processes.
        device: auto, cpu, cuda or mps.
    """

    images: Path
    out: Path
    image_size: tuple[int, int] = (256, 256)
    detector: DetectorName = "inception"
    inception_weights: Path | None = None
    batch_size: int = 64
    num_workers: int = 8
    device: DeviceName = "auto"


def build_reference(config: ReferenceConfig) -> None:
    """Look at every image once and write the statistics, in ADM's keys, and their protocol."""
    device: torch.device = choose_device(config.device)
    detector = build_detector(config.detector, config.inception_weights, device)
    pictures = open_pictures(
        config.images, config.image_size, config.batch_size, config.num_workers
    )
    collected = collect(detector, pictures, device)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    save_reference(config.out, collected.sums.gaussian())
    protocol = {
        "detector": config.detector,
        "n": collected.sums.count,
        "skipped": [list(item) for item in pictures.skipped],
        "sha256": file_sha256(config.out),
        "settings": config_values(config),
    }
    write_json(config.out.with_suffix(".json"), protocol)
    print(f"{config.out}: statistics of {collected.sums.count} images ({config.detector})")


def main() -> None:
    """Entry point."""
    build_reference(parse_config(ReferenceConfig))


if __name__ == "__main__":
    run_command(main)
