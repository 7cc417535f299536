"""Streaming evaluation: update with uint8 batches and their ids on any rank, merge, score.

evaluator = Evaluator(extractor, world.device, batch_size)
evaluator.update(pixels, ids)           # while sampling: images need not be written to files
statistics = evaluator.merge(world)     # exact, however the images were divided among ranks
"""

import copy
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from core.config import InputError
from core.distributed.world import World
from evaluations.features.extractors import FeatureExtractor
from evaluations.image_source import ImageSource
from evaluations.metrics.frechet import FeatureSums, Gaussian


class FeatureStatistics(NamedTuple):
    """Features of the images of all ranks.

    pooled, spatial: Sums over the images; spatial is None if the extractor has no such features.
    ids: (n,) int64, ascending. features: (n, dim) float32, pooled, in the order of ids; None if the
    evaluator did not keep them.
    """

    pooled: FeatureSums
    spatial: FeatureSums | None
    ids: torch.Tensor
    features: torch.Tensor | None

    def gaussian(self) -> Gaussian:
        """Mean and covariance of the pooled features; more accurate if n <= dim."""
        if self.features is not None and len(self.features) <= self.features.shape[1]:
            return Gaussian.of_rows(self.features.to(self.pooled.total.device))
        return self.pooled.gaussian()


class Evaluator:
    """Accumulates features in float64 (66 MB for FID and sFID, for any number of images).

    Each id counts once. Repeated ids on this rank are ignored; repeats on other ranks (padding of a
    sampler) are removed by `merge`, which needs their features. keep_features stores these in
    float32 on the CPU (16 kB per image); all scores except FID and sFID need them too.
    The extractor always receives `batch_size` images at once, however they arrive, so streamed
    images get exactly the features of images read from a file.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        device: torch.device,
        batch_size: int,
        keep_features: bool = True,
    ) -> None:
        # Apple's MPS has no float64.
        device = torch.device("cpu") if device.type == "mps" else device
        self.extractor, self.batch_size = extractor, batch_size
        self.keep_features = keep_features
        self._waiting: list[torch.Tensor] = []
        dims = (extractor.dim, *([extractor.spatial_dim] if extractor.spatial_dim else []))
        self._sums = [FeatureSums.empty(dim, device) for dim in dims]
        self._features: list[list[torch.Tensor]] = [[torch.empty(0, dim)] for dim in dims]
        self._ids: list[int] = []
        self._seen: set[int] = set()

    def update(self, pixels: torch.Tensor, ids: torch.Tensor | np.ndarray) -> None:
        """Add images: pixels (n, h, w, 3) uint8, and their ids (n,), unique over all ranks."""
        fresh = []
        for row, image_id in enumerate(ids.tolist()):
            if image_id not in self._seen:
                self._seen.add(image_id)
                self._ids.append(image_id)
                fresh.append(row)
        if not fresh:
            return
        self._waiting.append(pixels[fresh])
        if sum(map(len, self._waiting)) >= self.batch_size:
            *full, rest = torch.cat(self._waiting).split(self.batch_size)
            if len(rest) == self.batch_size:
                full, rest = [*full, rest], rest[:0]
            for batch in full:
                self._extract(batch)
            self._waiting = [rest] if len(rest) else []

    def _extract(self, pixels: torch.Tensor) -> None:
        found = [part for part in self.extractor(pixels) if part is not None]
        for sums, rows, part in zip(self._sums, self._features, found, strict=True):
            sums.add(part)
            if self.keep_features:
                rows.append(part.float().cpu())

    def merge(self, world: World) -> FeatureStatistics:
        """The statistics over all ranks. All ranks call it.

        Raises ValueError if several ranks added the same id and features are not kept.
        """
        if self._waiting:
            self._extract(torch.cat(self._waiting))
            self._waiting = []
        ids = torch.tensor(self._ids, dtype=torch.int64)
        everyone = world.gather(ids)
        repeated = _seen_before(everyone, world.rank)
        distinct = torch.cat(everyone).unique()
        if len(distinct) < sum(map(len, everyone)) and not self.keep_features:
            raise ValueError("several ranks added the same image; set keep_features")
        features = [torch.cat(parts) for parts in self._features]
        sums = []
        for own, part in zip(self._sums, features, strict=True):
            own = copy.deepcopy(own)
            if repeated.any():
                own.add(part[repeated], sign=-1)
            sums.append(own.merge(world))
        merged = None
        if self.keep_features:
            parts = world.gather(features[0][~repeated])
            order = torch.cat([i[~_seen_before(everyone, r)] for r, i in enumerate(everyone)])
            merged = torch.cat(parts)[order.argsort()]
        return FeatureStatistics(sums[0], sums[1] if len(sums) > 1 else None, distinct, merged)


def _seen_before(ids: list[torch.Tensor], rank: int) -> torch.Tensor:
    """Which ids of a rank were also added by a lower rank, (n,) bool."""
    return torch.isin(ids[rank], torch.cat([*ids[:rank], ids[rank][:0]]))


def extract_features(
    extractor: FeatureExtractor,
    images: ImageSource,
    world: World,
    batch_size: int,
    num_workers: int = 0,
    keep_features: bool = True,
) -> FeatureStatistics:
    """The feature statistics of all images of a source, divided among the ranks.

    Raises InputError if fewer than two images can be read.
    """
    evaluator = Evaluator(extractor, world.device, batch_size, keep_features)
    mine = np.array_split(np.arange(images.count), world.size)[world.rank]
    with tqdm(total=len(mine), unit="image", disable=not world.is_main) as bar:
        for ids, pixels in images.batches(mine, batch_size, num_workers):
            evaluator.update(pixels, ids)
            bar.update(len(ids))
    statistics = evaluator.merge(world)
    if len(statistics.ids) < 2:
        raise InputError(
            f"{images.source}: only {len(statistics.ids)} images can be read; two are needed"
        )
    return statistics
