"""Score generated (or reconstructed) images against a reference file.

python -m evaluations.score --samples samples/gpt_b_256 \
    --reference VIRTUAL_imagenet256_labeled.npz --out scores/gpt_b_256
torchrun --nproc-per-node 8 -m evaluations.score ...
"""

from dataclasses import dataclass
from pathlib import Path

from core.config import config_values, parse_config, run_command
from core.distributed.world import World, distributed
from evaluations.evaluator import collect
from evaluations.image_source import ImageSourceConfig, open_image_source
from evaluations.reference_stats import Kind
from evaluations.report import Scored, publish
from evaluations.scorer import MetricsConfig, Scorer, check_size, open_scorer


@dataclass(frozen=True, kw_only=True)
class ScoringConfig(MetricsConfig, ImageSourceConfig):
    """What scoring a file or folder needs besides its name.

    Args:
        out: The folder to write to.
        kind: generation (gFID) or reconstruction (rFID); the reference must be made for it.
    """

    out: Path
    kind: Kind = "generation"

    def __post_init__(self) -> None:
        MetricsConfig.__post_init__(self)
        ImageSourceConfig.__post_init__(self)


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(ScoringConfig):
    """Which samples.

    Args:
        samples: An npz with arr_0 uint8 (n, h, w, 3), a run of autoregressive.sample, or images.
    """

    samples: Path


def evaluate(judge: Scorer, config: ScoreConfig, world: World) -> dict[str, float]:
    """Score the samples and write scores.json -> the scores by name."""
    pictures = open_image_source(config.samples, config.image_size)
    check_size(pictures.size, pictures.source, judge.reference)
    collected = collect(judge.detector, pictures, world, config.batch_size, config.num_workers)
    scored = Scored(collected, pictures.labels, pictures.classes, pictures.skipped)
    return publish(judge, scored, config.out, config_values(config), world)


def main() -> None:
    """Entry point."""
    config = parse_config(ScoreConfig)
    with distributed(config.device) as world:
        evaluate(open_scorer(config, config.kind, world), config, world)


if __name__ == "__main__":
    run_command(main)
