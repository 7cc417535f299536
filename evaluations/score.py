"""Score generated (or reconstructed) images against a reference file.

python -m evaluations.score --samples samples/gpt_b_256 \
    --metrics.reference VIRTUAL_imagenet256_labeled.npz --out scores/gpt_b_256
torchrun --nproc-per-node 8 -m evaluations.score ...
"""

from dataclasses import dataclass, field
from pathlib import Path

from core.config import config_values, parse_config, run_command
from core.distributed.world import DeviceName, World, distributed
from core.lock import writer_lock
from evaluations.image_source import check_reading, open_image_source
from evaluations.reference_stats import Kind
from evaluations.report import score_source
from evaluations.scorer import MetricsConfig, open_scorer


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Which images to score, and how.

    Args:
        samples: An npz with arr_0 uint8 (n, h, w, 3), a run of autoregressive.sample, or images.
        out: The folder for scores.json and the class report.
        metrics: The reference, the feature extractor and the scores.
        kind: generation (gFID) or reconstruction (rFID); the reference must be of the same kind.
        image_size: Height and width of the centre crop of image files; an npz is not cropped.
        num_workers: Loader processes per rank, for image files.
        device: auto, cpu, cuda or mps.
    """

    samples: Path
    out: Path
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    kind: Kind = "generation"
    image_size: tuple[int, int] = (256, 256)
    num_workers: int = 8
    device: DeviceName = "auto"

    def __post_init__(self) -> None:
        check_reading(self.image_size, self.num_workers)


def score_samples(config: ScoreConfig, world: World) -> dict[str, float]:
    """Score the samples and write the report -> scores by name (rank 0)."""
    scorer = open_scorer(config.metrics, config.kind, world)
    images = open_image_source(config.samples, config.image_size)
    return score_source(
        scorer, images, config.out, config_values(config), config.num_workers, world
    )


def main() -> None:
    """Entry point."""
    config = parse_config(ScoreConfig)
    with distributed(config.device) as world, writer_lock(config.out, world):
        score_samples(config, world)


if __name__ == "__main__":
    run_command(main)
