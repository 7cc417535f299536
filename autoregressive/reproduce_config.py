"""The configuration of autoregressive.reproduce."""

from dataclasses import dataclass, field
from pathlib import Path

from autoregressive.inference.sampling_config import ComputeConfig
from core.data.config import check_num_workers
from evaluations.metrics.config import MetricsConfig


@dataclass(frozen=True, kw_only=True)
class ReproduceConfig:
    """Settings of autoregressive.reproduce.

    Args:
        name: A released model; see --list.
        out: Output folder: report.md, report.json, and the samples or reconstructions.
        list: Print the released models that have published scores, and stop.
        num_images: Images to sample with a GPT; null for the published number. With fewer, the
            report says that it is a smoke run and gives no verdict.
        image_size: Which published row, by the side of its images; null for the first.
        data: For a tokenizer: the validation images that the scores are published on.
        metrics: The feature extractor, and a reference of one's own; without one, the published
            reference is downloaded.
        compute: Device and precision.
        batch_size: Images per batch on each process; does not change any image.
        num_workers: Loader processes per rank, for `data`.
        sigmas: A score passes within this many standard errors of the difference.
    """

    name: str | None = None
    out: Path | None = None
    list: bool = False
    num_images: int | None = None
    image_size: int | None = None
    data: Path | None = None
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    batch_size: int = 32
    num_workers: int = 8
    sigmas: float = 3.0

    def __post_init__(self) -> None:
        if self.num_images is not None and self.num_images < 1:
            raise ValueError("num_images must be >= 1, or null")
        check_num_workers(self.num_workers)
        if self.batch_size < 1 or self.sigmas <= 0:
            raise ValueError("batch_size must be >= 1, sigmas > 0")
