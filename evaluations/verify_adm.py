r"""Check these metrics on ADM's public files: our values beside the published ones, pass or fail.

python -m evaluations.verify_adm --samples admnet_guided_upsampled_imagenet256.npz \
    --metrics.reference VIRTUAL_imagenet256_labeled.npz --out scores/verify
"""

from dataclasses import dataclass, field
from pathlib import Path

from core.config import InputError, config_values, parse_config, parse_first, run_command
from core.distributed.config import DeviceName
from evaluations.metrics.config import MetricsConfig


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """ADM's samples and reference, with the published Inception.

    Args:
        samples: The file admnet_guided_upsampled_imagenet256.npz.
        out: The folder for scores.json.
        metrics: The reference VIRTUAL_imagenet256_labeled.npz, and the Inception.
        device: auto, cpu, cuda or mps.
    """

    samples: Path
    out: Path
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    device: DeviceName = "auto"

    def __post_init__(self) -> None:
        if self.metrics.extractor != "inception":
            raise ValueError("verify_adm needs metrics.extractor inception")


parse_first(VerifyConfig, __name__)

from typing import NamedTuple

from core.distributed.world import World, distributed
from core.lock import writer_lock
from evaluations.image_source import open_image_source
from evaluations.report import score_source
from evaluations.scorer import open_scorer


class Published(NamedTuple):
    """A published value, and the relative deviation that a port to PyTorch may have."""

    value: float
    tolerance: float


# From guided-diffusion's README, for the two files above. Ports of the network to PyTorch deviate
# by at most 6e-4; precision and recall in float16 depend on the order of additions.
PUBLISHED = {
    "inception_score_adm": Published(215.8370, 2e-3),
    "gfid": Published(3.94256, 2e-3),
    "sfid": Published(6.14043, 2e-3),
    "precision": Published(0.8265, 8e-3),
    "recall": Published(0.5309, 8e-3),
}


def verify(config: VerifyConfig, world: World) -> None:
    """Print the table; raises InputError if a value deviates too much from the published one."""
    scorer = open_scorer(config.metrics, "generation", world)
    images = open_image_source(config.samples, (256, 256))
    scores = score_source(scorer, images, config.out, config_values(config), 0, world)
    if world.is_main:
        compare(scores)


def compare(scores: dict[str, float]) -> None:
    """Print our scores beside the published ones; raises InputError if one deviates too much."""
    failed = []
    print(f"\n{'':<20}{'ours':>12}{'published':>12}")
    for name, (value, tolerance) in PUBLISHED.items():
        ours = scores.get(name, float("nan"))
        passed = abs(ours - value) <= tolerance * value
        failed += [] if passed else [name]
        print(f"{name:<20}{ours:>12.5f}{value:>12.5f}  {'pass' if passed else 'FAIL'}")
    if failed:
        raise InputError(f"not the published numbers: {', '.join(failed)}")


def main() -> None:
    """Entry point."""
    config = parse_config(VerifyConfig)
    with distributed(config.device) as world, writer_lock(config.out, world):
        verify(config, world)


if __name__ == "__main__":
    run_command(main)
