"""From features to scores: one judge, holding detector and reference, for any number of runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, get_args

import torch

from core.config import InputError
from core.distributed import DeviceName, World
from evaluations.detectors import Detector, DetectorName, build_detector, full_float32
from evaluations.evaluator import Collected, collect
from evaluations.frechet import frechet_at_infinity, frechet_distance, influence
from evaluations.inception_score import inception_scores
from evaluations.neighbours import (
    COVERAGE_NEIGHBOURS,
    Arithmetic,
    density_coverage,
    kernel_distance,
    precision_recall,
)
from evaluations.pictures import open_pictures
from evaluations.reference_file import Kind, Reference, load_reference


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """What to compare with, and how.

    Args:
        reference: An npz with mu and sigma: ADM's, or one of evaluations.reference.
        out: The folder to write to.
        kind: generation (gFID) or reconstruction (rFID); the reference must be made for it.
        image_size: Height and width of the centre crop, for folders of images.
        detector: inception (FID), or without weights proxy or random_inception (both NOT FID).
        inception_weights: The file pt_inception-2015-12-05-6726825d.pth; by default the cache's.
        extended: Also KID, density, coverage, the distance's error bar and limit at infinite n.
        batch_size: Images at a time on each process.
        num_workers: Loader processes per rank, for folders of images.
        device: auto, cpu, cuda or mps.
    """

    reference: Path
    out: Path
    kind: Kind = "generation"
    image_size: tuple[int, int] = (256, 256)
    detector: DetectorName = "inception"
    inception_weights: Path | None = None
    extended: bool = True
    batch_size: int = 64
    num_workers: int = 8
    device: DeviceName = "auto"

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.num_workers < 0:
            raise ValueError("batch_size must be >= 1 and num_workers >= 0")


class Judge(NamedTuple):
    """A detector, a reference, and the features (n, dim) of the reference's own images."""

    detector: Detector
    reference: Reference
    real: torch.Tensor | None
    kind: Kind
    extended: bool

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


def open_judge(config: ScoringConfig, world: World) -> Judge:
    """Load detector and reference; all ranks look at the reference's images together."""
    detector = build_detector(config.detector, config.inception_weights, world.device)
    reference = load_reference(config.reference, detector, config.kind)
    real = None
    if reference.image_size:
        pictures = open_pictures(reference.path, reference.image_size)
        if pictures.count > COVERAGE_NEIGHBOURS:
            real = collect(detector, pictures, world, config.batch_size, config.num_workers).rows
    return Judge(detector, reference, real, config.kind, config.extended)


def check_size(size: tuple[int, int], source: Path, reference: Reference) -> None:
    """Raise InputError for pictures of another size than the reference's."""
    if reference.image_size and size != reference.image_size:
        raise InputError(
            f"{source}: pictures of {size[0]} x {size[1]}, those of {reference.path} are "
            f"{reference.image_size[0]} x {reference.image_size[1]}"
        )


def score(judge: Judge, collected: Collected) -> Scores:
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
    prefix = "" if judge.detector.metric == "fid" else judge.detector.metric.removesuffix("fd")
    named = {k if k.startswith(prefix) else prefix + k: v for k, v in values.items()}
    return Scores(named, change)


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
