"""Check this suite on ADM's public files: our row beside the published row, pass or fail.

python -m evaluations.verify_adm --samples admnet_guided_upsampled_imagenet256.npz \
    --reference VIRTUAL_imagenet256_labeled.npz --out scores/verify
"""

from dataclasses import dataclass
from typing import NamedTuple

from core.config import InputError, parse_config, run_command
from core.distributed.world import World, distributed
from evaluations.score import ScoreConfig, evaluate
from evaluations.scorer import open_scorer


class Published(NamedTuple):
    """A published number, and how far a port to PyTorch may be from it (relative)."""

    value: float
    tolerance: float


# guided-diffusion's README, for the two files above. Ports of the network to PyTorch are off by
# 6e-4 at most; precision and recall in float16 depend on the order of additions.
PUBLISHED = {
    "inception_score_adm": Published(215.8370, 2e-3),
    "gfid": Published(3.94256, 2e-3),
    "sfid": Published(6.14043, 2e-3),
    "precision": Published(0.8265, 8e-3),
    "recall": Published(0.5309, 8e-3),
}


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(ScoreConfig):
    """ADM's samples and reference, with the published Inception.

    Args:
        samples: admnet_guided_upsampled_imagenet256.npz.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.detector != "inception" or self.kind != "generation":
            raise ValueError("verify needs detector inception and kind generation")


def verify(config: VerifyConfig, world: World) -> None:
    """Print the table; raises InputError where a number is too far from the published one."""
    found = evaluate(open_scorer(config, config.kind, world), config, world)
    if not world.is_main:
        return
    failed = []
    print(f"\n{'':<20}{'ours':>12}{'published':>12}")
    for name, (value, tolerance) in PUBLISHED.items():
        ours = found.get(name, float("nan"))
        passed = abs(ours - value) <= tolerance * value
        failed += [] if passed else [name]
        print(f"{name:<20}{ours:>12.5f}{value:>12.5f}  {'pass' if passed else 'FAIL'}")
    if failed:
        raise InputError(f"not the published numbers: {', '.join(failed)}")


def main() -> None:
    """Entry point."""
    config = parse_config(VerifyConfig)
    with distributed(config.device) as world:
        verify(config, world)


if __name__ == "__main__":
    run_command(main)
