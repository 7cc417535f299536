"""How images are scored, and against which reference."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from core.data.config import check_image_size, check_num_workers
from core.distributed.config import DeviceName
from evaluations.features.config import (
    ExtractorConfig,
)

# Generated images are compared with training images (gFID), reconstructions with validation images
# (rFID). The two numbers must not be confused.
Kind = Literal["generation", "reconstruction"]


def check_reading(image_size: tuple[int, int], num_workers: int) -> None:
    """Raise ValueError for settings with which no image can be read."""
    check_image_size(*image_size)
    check_num_workers(num_workers)


@dataclass(frozen=True, kw_only=True)
class MetricsConfig(ExtractorConfig):
    """The reference to compare with, and the scores.

    Args:
        reference: An npz with mu and sigma: ADM's, or one made by evaluations.reference; null for
            none.
        extended: Also compute KID, density, coverage, the standard error of the distance and its
            extrapolation to infinitely many samples.
    """

    reference: Path | None = None
    extended: bool = True


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """How images are read and scored.

    Args:
        metrics: The reference, the feature extractor and the scores.
        kind: generation (gFID) or reconstruction (rFID); the reference must be of the same kind.
        image_size: Height and width of the centre crop of image files; an npz is not cropped.
        num_workers: Loader processes per rank, for image files.
        device: auto, cpu, cuda or mps.
    """

    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    kind: Kind = "generation"
    image_size: tuple[int, int] = (256, 256)
    num_workers: int = 8
    device: DeviceName = "auto"

    def __post_init__(self) -> None:
        check_reading(self.image_size, self.num_workers)
