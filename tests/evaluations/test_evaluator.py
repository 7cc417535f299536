from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.clusters import run_in_processes

from core.distributed.world import World, choose_device
from evaluations.evaluator import Evaluator, FeatureStatistics
from evaluations.features.extractors import Features, ProxyExtractor
from evaluations.metrics.frechet import Gaussian, frechet_distance

CPU = choose_device("cpu")
COUNT = 37  # divides by neither 2 nor 4


def exact_extractor() -> SimpleNamespace:
    """An extractor whose features do not depend on how images are batched, unlike a network's."""

    class Extractor(SimpleNamespace):
        def __call__(self, pixels: torch.Tensor) -> Features:
            flat = pixels.flatten(1).float()
            return Features(flat[:, :8], flat[:, 8:13])

    return Extractor(metric="fid", dim=8, spatial_dim=5, classifier=None, weights_sha256="")


def images() -> torch.Tensor:
    random = np.random.default_rng(0)
    return torch.from_numpy(random.integers(0, 256, (COUNT, 4, 4, 3), dtype=np.uint8))


def padded_share(rank: int, size: int) -> list[int]:
    """As torch's DistributedSampler: every rank equally many, the first ones again at the end."""
    padded = [*range(COUNT), *range(-COUNT % size)]
    return padded[rank::size]


def evaluate(
    ids: list[int], world: World, keep_features: bool = True, batch: int = 5
) -> FeatureStatistics:
    evaluator = Evaluator(exact_extractor(), CPU, 7, keep_features)
    for start in range(0, len(ids), batch):
        part = torch.tensor(ids[start : start + batch])
        evaluator.update(images()[part], part)
    return evaluator.merge(world)


def check_against_one_process(found: FeatureStatistics) -> None:
    whole = images().flatten(1).float()
    assert found.ids.tolist() == list(range(COUNT))
    assert found.pooled.count == found.spatial.count == COUNT
    assert torch.equal(found.features, whole[:, :8])
    for sums, rows in ((found.pooled, whole[:, :8]), (found.spatial, whole[:, 8:13])):
        exact = Gaussian.of_rows(rows)
        assert abs(frechet_distance(sums.gaussian(), exact)) < 1e-9
        assert (sums.gaussian().mean - exact.mean).abs().max() < 1e-9


def run_rank(rank: int, size: int) -> None:
    world = World(rank, size, CPU)
    check_against_one_process(evaluate(padded_share(rank, size), world))
    blocks = np.array_split(np.arange(COUNT), size)[rank].tolist()
    assert evaluate(blocks, world, keep_features=False).pooled.count == COUNT
    with pytest.raises(ValueError, match="several ranks"):
        evaluate(padded_share(rank, size), world, keep_features=False)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_agree_with_one_process_and_count_padded_images_once(size, tmp_path):
    run_in_processes(run_rank, size, tmp_path, size)


def test_one_process_counts_a_repeated_image_once(world):
    check_against_one_process(evaluate([*range(COUNT), 3, 3, *range(COUNT)], world))


def test_scores_do_not_depend_on_the_order_of_the_images(world):
    order = np.random.default_rng(0).permutation(COUNT).tolist()
    check_against_one_process(evaluate(order, world, batch=4))


def test_images_streamed_as_they_come_equal_those_of_a_file(world):
    extractor = ProxyExtractor(CPU)
    one, two = Evaluator(extractor, CPU, 6), Evaluator(extractor, CPU, 6)
    for ids in torch.arange(COUNT).split(10):
        one.update(images()[ids], ids)
        two.update(images()[ids].clone(), ids.numpy())
    first, second = one.merge(world), two.merge(world)
    assert torch.equal(first.pooled.outer, second.pooled.outer)
    assert torch.equal(first.features, second.features)
    # Merging is a snapshot: evaluation may go on.
    assert torch.equal(one.merge(world).pooled.outer, first.pooled.outer)
