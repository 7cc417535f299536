"""What every metric of features must do: finite, blind to the order, worse for worse images.

A new metric takes part with one line in CASES: (generated, real) features (n, dim) -> its value,
and whether a larger one is better. frechet_at_infinity is not here: it extrapolates from random
subsets, and its spread is tested in test_metrics.py.
"""

from collections.abc import Callable

import pytest
import torch

from evaluations.metrics.frechet import Gaussian, frechet_distance
from evaluations.metrics.kid import kernel_distance
from evaluations.metrics.precision_recall import density_coverage, precision_recall

Metric = Callable[[torch.Tensor, torch.Tensor], float]


def gaussian(rows: torch.Tensor) -> Gaussian:
    return Gaussian(rows.double().mean(0), rows.double().T.cov())


CASES: dict[str, tuple[Metric, bool]] = {
    "frechet": (lambda rows, real: frechet_distance(gaussian(rows), gaussian(real)), False),
    "kid": (kernel_distance, False),
    "precision": (lambda rows, real: precision_recall(rows, real, "float32").precision, True),
    "recall": (lambda rows, real: precision_recall(rows, real, "float32").recall, True),
    "density": (lambda rows, real: density_coverage(rows, real).density, True),
    "coverage": (lambda rows, real: density_coverage(rows, real).coverage, True),
}


@pytest.fixture(scope="module")
def features() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    generated, real = (torch.randn(400, 8, generator=generator) for _ in range(2))
    return generated, real


@pytest.fixture(params=CASES)
def metric(request) -> tuple[Metric, bool]:
    return CASES[request.param]


def test_it_is_a_finite_number_that_does_not_depend_on_the_order_of_images(metric, features):
    measure, _ = metric
    generated, real = features
    value = measure(generated, real)
    assert isinstance(value, float) and torch.tensor(value).isfinite()
    order = torch.randperm(400, generator=torch.Generator().manual_seed(1))
    assert measure(generated[order], real[order.flip(0)]) == pytest.approx(value, rel=0.1, abs=0.02)


def test_it_is_worse_for_images_far_from_the_real_ones(metric, features):
    measure, larger_is_better = metric
    generated, real = features
    near, far = measure(generated, real), measure(generated + 2, real)
    assert far < near if larger_is_better else far > near
