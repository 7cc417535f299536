"""One pass over pictures: feature statistics and logits; and reference files in ADM's keys."""

import os
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from core.config import InputError
from evaluations.detectors import Detector
from evaluations.frechet import FeatureSums, Gaussian
from evaluations.pictures import Pictures


class Collected(NamedTuple):
    """Sums over the features, and all logits (n, classes) float32 where the detector has any."""

    sums: FeatureSums
    logits: np.ndarray | None


def collect(detector: Detector, pictures: Pictures, device: torch.device) -> Collected:
    """Show every picture to the detector once; raises InputError for fewer than two pictures."""
    sums, logits = FeatureSums.empty(detector.dim, device), []
    for pixels in tqdm(pictures.batches, unit="batch"):
        features = detector(pixels)
        sums.add(features.pooled)
        if features.logits is not None:
            logits.append(features.logits.cpu().numpy())
    if sums.count < 2:
        raise InputError(f"only {sums.count} pictures could be read; two are needed at least")
    return Collected(sums, np.concatenate(logits) if logits else None)


def save_reference(path: Path, gaussian: Gaussian) -> None:
    """Write mean and covariance as ADM's `mu` and `sigma`, whole or not at all."""
    aside = path.with_name(f".{path.name}.tmp")
    with aside.open("wb") as file:
        np.savez(file, mu=gaussian.mean.cpu().numpy(), sigma=gaussian.covariance.cpu().numpy())
    os.replace(aside, path)


def load_reference(path: Path, dim: int) -> Gaussian:
    """Read `mu` and `sigma` (dim, dim) of a reference file; raises InputError for any other."""
    try:
        with np.load(path, allow_pickle=False) as file:
            mean, covariance = (torch.from_numpy(file[key]).double() for key in ("mu", "sigma"))
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not a reference file with mu and sigma ({error})") from error
    if mean.shape != (dim,) or covariance.shape != (dim, dim):
        raise InputError(
            f"{path}: statistics of {len(mean)} features, this detector has {dim}; a reference "
            "belongs to the detector that it was built with"
        )
    return Gaussian(mean, covariance)
