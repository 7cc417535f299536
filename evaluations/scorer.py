"""From features to scores: one judge, holding detector and reference, for any number of runs.

judge = open_judge(config, "generation", world)
evaluator = judge.evaluator(world)           # feed it pictures: of files, or as they are sampled
score(judge, evaluator.merge(world)).values  # {"gfid": 2.19, ...}
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, get_args

import torch

from core.config import InputError
from core.distributed.world import World
from evaluations.evaluator import Collected, Evaluator, collect
from evaluations.features.extractors import ExtractorConfig, FeatureExtractor, full_float32
from evaluations.image_source import open_image_source
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
    """What to compare with.

    Args:
        reference: An npz with mu and sigma: ADM's, or one of evaluations.reference.
        extended: Also KID, density, coverage, the distance's error bar and limit at infinite n.
    """

    reference: Path | None = None
    extended: bool = True


class Scorer(NamedTuple):
    """A detector, a reference, and the features (n, dim) of the reference's own images."""

    detector: FeatureExtractor
    reference: ReferenceStats
    real: torch.Tensor | None
    kind: Kind
    extended: bool
    batch_size: int

    def evaluator(self, world: World) -> Evaluator:
        """What adds up the features of the pictures to be scored."""
        return Evaluator(self.detector, world.device, self.batch_size)

    @property
    def distance(self) -> str:
        """What the Frechet distance is called: gfid or rfid for the real thing, else NOT FID."""
        if self.detector.metric != "fid":
            return self.detector.metric
        return "gfid" if self.kind == "generation" else "rfid"


class Scores(NamedTuple):
    """Scores by name, and each sample's influence on the distance (n,) where it is computed."""

    values: dict[str, float]
    influence: torch.Tensor | None


def open_scorer(config: MetricsConfig, kind: Kind, world: World) -> Scorer:
    """Load detector and reference; all ranks look at the reference's images together."""
    if config.reference is None:
        raise InputError("reference: give the npz to compare with (see evaluations.reference)")
    detector = config.build_detector(world)
    reference = load_reference(config.reference, detector, kind)
    real = None
    if reference.image_size:
        pictures = open_image_source(reference.path, reference.image_size)
        if pictures.count > COVERAGE_NEIGHBOURS:
            real = collect(detector, pictures, world, config.batch_size).rows
    return Scorer(detector, reference, real, kind, config.extended, config.batch_size)


def scorer_from_originals(
    config: MetricsConfig, detector: FeatureExtractor, source: Path, originals: Collected
) -> Scorer:
    """A judge of reconstructions whose reference is the originals themselves."""
    spatial = originals.spatial.gaussian() if originals.spatial else None
    reference = ReferenceStats(source, "", originals.gaussian(), spatial, None)
    kind: Kind = "reconstruction"
    real = originals.rows
    return Scorer(detector, reference, real, kind, config.extended, config.batch_size)


def check_size(size: tuple[int, int], source: Path, reference: ReferenceStats) -> None:
    """Raise InputError for pictures of another size than the reference's."""
    if reference.image_size and size != reference.image_size:
        raise InputError(
            f"{source}: pictures of {size[0]} x {size[1]}, those of {reference.path} are "
            f"{reference.image_size[0]} x {reference.image_size[1]}"
        )


def score(judge: Scorer, collected: Collected) -> Scores:
    """Every score that the features allow. Names of other detectors than FID's have a prefix."""
    sums = collected.pooled
    device = sums.total.device
    reference = judge.reference.pooled.to(device)
    values = {judge.distance: frechet_distance(collected.gaussian(), reference)}
    if collected.spatial and judge.reference.spatial:
        spatial = judge.reference.spatial.to(device)
        name = "sfid" if judge.detector.metric == "fid" else "spatial_fd"
        values[name] = frechet_distance(collected.spatial.gaussian(), spatial)
    change = None
    if collected.rows is not None:
        rows = collected.rows.to(device)
        with full_float32(device):
            if judge.detector.classifier is not None:
                values |= inception_scores(rows @ judge.detector.classifier.to(device).T)
            if judge.real is not None and len(rows) > COVERAGE_NEIGHBOURS:
                values |= _against_real(rows, judge.real.to(device), judge.extended)
        if judge.extended:
            values["distance_at_infinite_n"] = frechet_at_infinity(rows, reference)
        if judge.extended and len(rows) > rows.shape[1]:
            change = influence(rows, reference).cpu()
            values["standard_error"] = float(change.std() / len(change) ** 0.5)
    if judge.detector.metric != "fid":
        prefix = judge.detector.metric.replace("_fd", "").replace("fd_", "")
        values = {k if prefix in k else f"{prefix}_{k}": v for k, v in values.items()}
    return Scores(values, change)


def _against_real(rows: torch.Tensor, real: torch.Tensor, extended: bool) -> dict[str, float]:
    """The scores that need the reference's single images."""
    adm, exact = (precision_recall(rows, real, name) for name in get_args(Arithmetic))
    values = {
        "precision": adm.quality,
        "recall": adm.variety,
        "precision_fp32": exact.quality,
        "recall_fp32": exact.variety,
    }
    if extended:
        pair = density_coverage(rows, real)
        values |= {"density": pair.quality, "coverage": pair.variety}
        values["kid"] = kernel_distance(rows, real)
    return values
