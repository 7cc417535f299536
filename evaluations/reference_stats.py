"""Reference files: an npz with ADM's keys and, beside ours, a JSON that describes its origin.

mu, sigma (FID), mu_s, sigma_s (sFID): statistics of all images. arr_0: some of the images, for
scores that compare single images. ADM's published files are read without conversion.
"""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from core.config import InputError
from core.data.arrays import npz_header, npz_names, read_npz_array
from core.data.npz import npz_images_shape
from core.download import WebFile
from core.files import read_record
from core.weights import file_sha256
from evaluations.features.extractors import FeatureExtractor
from evaluations.metrics.frechet import Gaussian

# Generated images are compared with training images (gFID), reconstructions with validation images
# (rFID). The two numbers must not be confused.
Kind = Literal["generation", "reconstruction"]

# ADM's reference batch (Dhariwal and Nichol 2021), with which published FIDs compare.
REFERENCE_URLS = {
    "VIRTUAL_imagenet256_labeled.npz": "https://openaipublic.blob.core.windows.net/diffusion/"
    "jul-2021/ref_batches/imagenet/256/VIRTUAL_imagenet256_labeled.npz"
}


def reference_file(name: str) -> WebFile | None:
    """A published reference and its place in torch.hub's folder; None for an unknown name."""
    place = Path(torch.hub.get_dir()) / "references" / name
    return WebFile(REFERENCE_URLS[name], place) if name in REFERENCE_URLS else None


class ReferenceStats(NamedTuple):
    """The statistics of a reference file.

    image_size: Height and width of its images (arr_0), None if it has none.
    """

    path: Path
    sha256: str
    pooled: Gaussian
    spatial: Gaussian | None
    image_size: tuple[int, int] | None


def statistics_arrays(pooled: Gaussian, spatial: Gaussian | None) -> dict[str, np.ndarray]:
    """The statistics with ADM's keys."""
    named = {"mu": pooled.mean, "sigma": pooled.covariance}
    if spatial is not None:
        named |= {"mu_s": spatial.mean, "sigma_s": spatial.covariance}
    return {key: value.cpu().numpy() for key, value in named.items()}


def load_reference(path: Path, extractor: FeatureExtractor, kind: Kind) -> ReferenceStats:
    """Read a reference; raises InputError if it is damaged or of another kind or extractor."""
    protocol: dict[str, Any] = {}
    if path.with_suffix(".json").is_file():
        protocol = read_record(path.with_suffix(".json"), {})
    made_for = protocol.get("kind", "generation")
    if made_for != kind:
        raise InputError(f"{path}: a reference for {made_for}, not for {kind} (gFID is not rFID)")
    made_by = protocol.get("weights_sha256", extractor.weights_sha256)
    if made_by != extractor.weights_sha256:
        raise InputError(f"{path}: belongs to the extractor that it was built with ({made_by})")
    names = npz_names(path)
    if not {"mu", "sigma"} <= set(names):
        raise InputError(f"{path}: not a reference file with mu and sigma")
    pooled = _gaussian(path, "mu", "sigma", extractor.dim)
    spatial = None
    if extractor.spatial_dim and "mu_s" in names:
        spatial = _gaussian(path, "mu_s", "sigma_s", extractor.spatial_dim)
    size = npz_images_shape(path)[1:3] if "arr_0" in names else None
    sha256 = file_sha256(path)
    if protocol.get("sha256", sha256) != sha256:
        raise InputError(f"{path}: has changed since {path.with_suffix('.json').name} was written")
    return ReferenceStats(path, sha256, pooled, spatial, size)


def _gaussian(path: Path, mean_key: str, key: str, dim: int) -> Gaussian:
    """Mean and covariance in an npz, converted to float64."""
    found = npz_header(path, mean_key)[0], npz_header(path, key)[0]
    if found != ((dim,), (dim, dim)):
        raise InputError(
            f"{path}: {mean_key} is {found[0]} and {key} {found[1]}, expected {(dim,)} and "
            f"{(dim, dim)}; a reference belongs to the extractor that it was built with"
        )
    mean, covariance = (
        torch.from_numpy(read_npz_array(path, name, shape, "f")).double()
        for name, shape in ((mean_key, found[0]), (key, found[1]))
    )
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise InputError(f"{path}: {mean_key} or {key} is not finite")
    return Gaussian(mean, covariance)
