r"""Score generated (or reconstructed) images against a reference file.

python -m evaluations.score --samples samples/gpt_b_256 \
    --metrics.reference VIRTUAL_imagenet256_labeled.npz --out scores/gpt_b_256
torchrun --nproc-per-node 8 -m evaluations.score ...
"""

from dataclasses import dataclass
from pathlib import Path

from core.config import config_values, parse_config, parse_first, run_command
from evaluations.metrics.config import ScoringConfig


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(ScoringConfig):
    """Which images to score, and how.

    Args:
        samples: An npz with arr_0 uint8 (n, h, w, 3), a run of autoregressive.sample, or images.
        out: The folder for scores.json and the class report.
    """

    samples: Path
    out: Path


parse_first(ScoreConfig, __name__)

from core.distributed.world import World, distributed
from core.lock import writer_lock
from evaluations.image_source import open_image_source
from evaluations.report import score_source
from evaluations.scorer import open_scorer


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
