"""Score generated images against a reference file.

python -m evaluations.generation --samples samples/gpt_b_256 \
    --reference VIRTUAL_imagenet256_labeled.npz --out scores/gpt_b_256
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from core.config import config_values, parse_config, run_command
from core.distributed import DeviceName, choose_device
from core.shards import write_json
from core.weights import file_sha256
from evaluations.detectors import DetectorName, build_detector
from evaluations.frechet import Gaussian, frechet_distance
from evaluations.inception_score import inception_score
from evaluations.pictures import open_pictures
from evaluations.statistics import collect, load_reference

logger = logging.getLogger(__name__)

FEW_SAMPLES = 10_000  # below, the distance's bias exceeds the differences that papers report


@dataclass(frozen=True)
class GenerationConfig:
    """Which samples against which reference.

    Args:
        samples: An npz with arr_0 uint8 (n, h, w, 3), a run of autoregressive.sample, or images.
        reference: An npz with mu and sigma: ADM's, or one of evaluations.reference.
        out: The folder to write scores.json to.
        image_size: Height and width of the centre crop, for folders of images.
        detector: inception (FID), or proxy (NOT FID; needs no weights).
        inception_weights: The file pt_inception-2015-12-05-6726825d.pth; by default the cache's.
        is_split_size: Images per split of the Inception Score (ADM: 5,000).
        is_seed: Shuffles the images before they are split.
        batch_size: Images at a time.
        num_workers: Loader processes, for folders of images.
        device: auto, cpu, cuda or mps.
    """

    samples: Path
    reference: Path
    out: Path
    image_size: tuple[int, int] = (256, 256)
    detector: DetectorName = "inception"
    inception_weights: Path | None = None
    is_split_size: int = 5000
    is_seed: int = 2020
    batch_size: int = 64
    num_workers: int = 8
    device: DeviceName = "auto"


def evaluate(config: GenerationConfig) -> dict[str, float]:
    """Score the samples, write scores.json -> the scores by name."""
    device = choose_device(config.device)
    detector = build_detector(config.detector, config.inception_weights, device)
    reference = load_reference(config.reference, detector.dim)
    pictures = open_pictures(
        config.samples, config.image_size, config.batch_size, config.num_workers
    )
    collected = collect(detector, pictures, device)
    count = collected.sums.count
    reference = Gaussian(*(part.to(device) for part in reference))
    scores = {detector.metric: frechet_distance(collected.sums.gaussian(), reference)}
    if collected.logits is not None:
        scores["inception_score"] = inception_score(
            collected.logits, config.is_split_size, config.is_seed
        )
    if count < FEW_SAMPLES:
        logger.warning("only %d samples: the distance is biased upwards below 10,000", count)
    config.out.mkdir(parents=True, exist_ok=True)
    result = {
        **scores,
        "n": count,
        "note": "NOT FID: a proxy network" if config.detector == "proxy" else "",
        "reference_sha256": file_sha256(config.reference),
        "skipped": [list(item) for item in pictures.skipped],
        "settings": config_values(config),
    }
    write_json(config.out / "scores.json", result)
    for name, value in scores.items():
        suffix = " (NOT FID)" if config.detector == "proxy" else ""
        print(f"{name}{suffix}: {value:.4f} on {count} images")
    print(config.out / "scores.json")
    return scores


def main() -> None:
    """Entry point."""
    evaluate(parse_config(GenerationConfig))


if __name__ == "__main__":
    run_command(main)
