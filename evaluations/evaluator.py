"""Streaming evaluation: feed uint8 batches with their ids, on any rank; merge; score.

evaluator = Evaluator(detector, world.device, batch_size)
evaluator.update(pixels, ids)          # as they are sampled: no picture needs a file
collected = evaluator.merge(world)     # exact, whichever rank saw which picture
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


class Collected(NamedTuple):
    """What was seen by all ranks: sums, ids (n,) ascending, and pooled features (n, dim) by id."""

    pooled: FeatureSums
    spatial: FeatureSums | None
    ids: torch.Tensor
    rows: torch.Tensor | None

    def gaussian(self) -> Gaussian:
        """Mean and covariance of the pooled features; exact where they are few."""
        if self.rows is not None and len(self.rows) <= self.rows.shape[1]:
            return Gaussian.of_rows(self.rows.to(self.pooled.total.device))
        return self.pooled.gaussian()


class Evaluator:
    """Adds up features in float64 (66 MB for FID and sFID, however many pictures).

    A picture counts once, by its id: repeats on this rank are dropped when they come, repeats on
    other ranks (a sampler's padding) when merging, which needs their features. `keep_rows` keeps
    those, in float32 on the CPU (16 kB a picture); all scores but FID and sFID need them too.
    The detector sees `batch_size` pictures at a time, however they come: so pictures that are
    streamed get the very features of those read from a file.
    """

    def __init__(
        self,
        detector: FeatureExtractor,
        device: torch.device,
        batch_size: int,
        keep_rows: bool = True,
    ) -> None:
        # Apple's MPS has no float64.
        device = torch.device("cpu") if device.type == "mps" else device
        self.detector, self.batch_size, self.keep_rows = detector, batch_size, keep_rows
        self._waiting: list[torch.Tensor] = []
        dims = (detector.dim, *([detector.spatial_dim] if detector.spatial_dim else []))
        self._sums = [FeatureSums.empty(dim, device) for dim in dims]
        self._rows: list[list[torch.Tensor]] = [[torch.empty(0, dim)] for dim in dims]
        self._ids: list[int] = []
        self._seen: set[int] = set()

    def update(self, pixels: torch.Tensor, ids: torch.Tensor | np.ndarray) -> None:
        """Pixels (n, h, w, 3) uint8 and their global ids (n,)."""
        fresh = []
        for place, picture in enumerate(ids.tolist()):
            if picture not in self._seen:
                self._seen.add(picture)
                self._ids.append(picture)
                fresh.append(place)
        if not fresh:
            return
        self._waiting.append(pixels[fresh])
        if sum(map(len, self._waiting)) >= self.batch_size:
            *full, rest = torch.cat(self._waiting).split(self.batch_size)
            if len(rest) == self.batch_size:
                full, rest = [*full, rest], rest[:0]
            for batch in full:
                self._look(batch)
            self._waiting = [rest] if len(rest) else []

    def _look(self, pixels: torch.Tensor) -> None:
        found = [part for part in self.detector(pixels) if part is not None]
        for sums, rows, part in zip(self._sums, self._rows, found, strict=True):
            sums.add(part)
            if self.keep_rows:
                rows.append(part.float().cpu())

    def merge(self, world: World) -> Collected:
        """What all ranks have seen; all of them call it.

        Raises ValueError for a picture seen by several ranks where rows are not kept.
        """
        if self._waiting:
            self._look(torch.cat(self._waiting))
            self._waiting = []
        ids = torch.tensor(self._ids, dtype=torch.int64)
        everyone = world.gather(ids)
        repeated = _seen_before(everyone, world.rank)
        distinct = torch.cat(everyone).unique()
        if len(distinct) < sum(map(len, everyone)) and not self.keep_rows:
            raise ValueError("pictures were seen by several ranks: share them out, or keep_rows")
        rows = [torch.cat(parts) for parts in self._rows]
        sums = []
        for own, part in zip(self._sums, rows, strict=True):
            own = copy.deepcopy(own)
            if repeated.any():
                own.add(part[repeated], sign=-1)
            sums.append(own.merge(world))
        merged = None
        if self.keep_rows:
            parts = world.gather(rows[0][~repeated])
            order = torch.cat([i[~_seen_before(everyone, r)] for r, i in enumerate(everyone)])
            merged = torch.cat(parts)[order.argsort()]
        return Collected(sums[0], sums[1] if len(sums) > 1 else None, distinct, merged)


def _seen_before(ids: list[torch.Tensor], rank: int) -> torch.Tensor:
    """Which of a rank's ids an earlier rank has, (n,) bool."""
    return torch.isin(ids[rank], torch.cat([*ids[:rank], ids[rank][:0]]))


def collect(
    detector: FeatureExtractor,
    pictures: ImageSource,
    world: World,
    batch_size: int,
    num_workers: int = 0,
    keep_rows: bool = True,
) -> Collected:
    """Show every picture to the detector once, shared out over the ranks.

    Raises InputError where fewer than two pictures can be read.
    """
    evaluator = Evaluator(detector, world.device, batch_size, keep_rows)
    mine = np.array_split(np.arange(pictures.count), world.size)[world.rank]
    with tqdm(total=len(mine), unit="picture", disable=not world.is_main) as bar:
        for ids, pixels in pictures.batches(mine, batch_size, num_workers):
            evaluator.update(pixels, ids)
            bar.update(len(ids))
    collected = evaluator.merge(world)
    if len(collected.ids) < 2:
        raise InputError(
            f"{pictures.source}: only {len(collected.ids)} pictures can be read; two are needed"
        )
    return collected
