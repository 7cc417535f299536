"""From features to scores: a scorer holds the extractor and the reference, for any number of runs.

scorer = open_scorer(config.metrics, "generation", world)
evaluator = scorer.evaluator(world)           # update it with images, from files or while sampling
score(scorer, evaluator.merge(world)).values  # {"gfid": 2.19, ...}
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, get_args

import torch

from core.config import InputError
from core.distributed.world import DeviceName, World
from evaluations.evaluator import Evaluator, FeatureStatistics, extract_features
from evaluations.features.extractors import ExtractorConfig, FeatureExtractor, full_float32
from evaluations.image_source import check_reading, open_image_source
from evaluations.metrics.frechet import frechet_at_infinity, frechet_distance, influence
from evaluations.metrics.inception_score import inception_scores
from evaluations.metrics.kid import kernel_distance
from evaluations.metrics.precision_recall import (
    COVERAGE_NEIGHBOURS,
    Arithmetic,
    density_coverage,
    precision_recall,
)
from evaluations.reference_stats import Kind, ReferenceStats, load_reference


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


class Scorer(NamedTuple):
    """An extractor and a reference.

    reference_features: (n, dim), of the reference's images; None if it has too few images.
    """

    extractor: FeatureExtractor
    reference: ReferenceStats
    reference_features: torch.Tensor | None
    kind: Kind
    extended: bool
    batch_size: int

    def evaluator(self, world: World) -> Evaluator:
        """A new evaluator, for one set of images to be scored."""
        return Evaluator(self.extractor, world.device, self.batch_size)

    @property
    def distance(self) -> str:
        """The name of the Frechet distance: gfid or rfid on FID's network, another name if not."""
        if self.extractor.metric != "fid":
            return self.extractor.metric
        return "gfid" if self.kind == "generation" else "rfid"


class Scores(NamedTuple):
    """Scores by name, and the influence (n,) of each sample on the distance, or None."""

    values: dict[str, float]
    influence: torch.Tensor | None


def open_scorer(config: MetricsConfig, kind: Kind, world: World) -> Scorer:
    """Load extractor and reference; all ranks together extract the features of its images.

    Raises InputError if the reference or the weights are missing or do not fit.
    """
    if config.reference is None:
        raise InputError(
            "metrics.reference: give an npz to compare with (see evaluations.reference)"
        )
    extractor = config.build_extractor(world)
    reference = load_reference(config.reference, extractor, kind)
    features = None
    if reference.image_size:
        images = open_image_source(reference.path, reference.image_size)
        if images.count > COVERAGE_NEIGHBOURS:
            features = extract_features(extractor, images, world, config.batch_size).features
    return Scorer(extractor, reference, features, kind, config.extended, config.batch_size)


def scorer_from_originals(
    config: MetricsConfig,
    extractor: FeatureExtractor,
    source: Path,
    originals: FeatureStatistics,
) -> Scorer:
    """A scorer of reconstructions whose reference is the original images."""
    spatial = originals.spatial.gaussian() if originals.spatial else None
    reference = ReferenceStats(source, "", originals.gaussian(), spatial, None)
    kind: Kind = "reconstruction"
    return Scorer(
        extractor, reference, originals.features, kind, config.extended, config.batch_size
    )


def check_size(size: tuple[int, int], source: Path, reference: ReferenceStats) -> None:
    """Raise InputError unless images of this height and width are as large as the reference's."""
    if reference.image_size and size != reference.image_size:
        raise InputError(
            f"{source}: images of {size[0]} x {size[1]}, those of {reference.path} are "
            f"{reference.image_size[0]} x {reference.image_size[1]}"
        )


def check_count(count: int) -> None:
    """Raise InputError for too few images to have a covariance."""
    if count < 2:
        raise InputError(f"metrics: scores need at least 2 images, there are {count}")


def score(scorer: Scorer, statistics: FeatureStatistics) -> Scores:
    """All scores that the statistics allow. If the network is not FID's, names have a prefix.

    Raises InputError for fewer than two images.
    """
    check_count(len(statistics.ids))
    device = statistics.pooled.total.device
    reference = scorer.reference.pooled.to(device)
    values = {scorer.distance: frechet_distance(statistics.gaussian(), reference)}
    if statistics.spatial and scorer.reference.spatial:
        spatial = scorer.reference.spatial.to(device)
        name = "sfid" if scorer.extractor.metric == "fid" else "spatial_fd"
        values[name] = frechet_distance(statistics.spatial.gaussian(), spatial)
    change = None
    if statistics.features is not None:
        rows = statistics.features.to(device)
        with full_float32(device):
            if scorer.extractor.classifier is not None:
                values |= inception_scores(rows @ scorer.extractor.classifier.to(device).T)
            if scorer.reference_features is not None and len(rows) > COVERAGE_NEIGHBOURS:
                values |= _against_images(
                    rows, scorer.reference_features.to(device), scorer.extended
                )
        if scorer.extended:
            values["distance_at_infinite_n"] = frechet_at_infinity(rows, reference)
        if scorer.extended and len(rows) > rows.shape[1]:
            change = influence(rows, reference).cpu()
            values["standard_error"] = float(change.std() / len(change) ** 0.5)
    if scorer.extractor.metric != "fid":
        prefix = scorer.extractor.metric.replace("_fd", "").replace("fd_", "")
        values = {k if prefix in k else f"{prefix}_{k}": v for k, v in values.items()}
    return Scores(values, change)


def _against_images(rows: torch.Tensor, real: torch.Tensor, extended: bool) -> dict[str, float]:
    """The scores that need features of single reference images."""
    adm, exact = (precision_recall(rows, real, name) for name in get_args(Arithmetic))
    values = {
        "precision": adm.precision,
        "recall": adm.recall,
        "precision_fp32": exact.precision,
        "recall_fp32": exact.recall,
    }
    if extended:
        values |= density_coverage(rows, real)._asdict()
        values["kid"] = kernel_distance(rows, real)
    return values
