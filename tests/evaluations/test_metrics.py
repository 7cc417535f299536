import json

import numpy as np
import pytest
import torch

from core.distributed.world import choose_device
from evaluations.metrics.frechet import (
    FeatureSums,
    Gaussian,
    frechet_at_infinity,
    frechet_distance,
    influence,
)
from evaluations.metrics.inception_score import inception_score, inception_scores
from evaluations.metrics.kid import kernel_distance
from evaluations.metrics.precision_recall import (
    density_coverage,
    precision_recall,
    squared_distances,
)
from evaluations.metrics.psnr_ssim import psnr, ssim, ssim_reference_inflated

CPU = choose_device("cpu")


def golden_features(count, dim, seed, shift, scale):
    base = np.random.RandomState(7).standard_normal((dim, dim)) / np.sqrt(dim)
    spectrum = np.arange(1, dim + 1) ** -0.5
    z = np.random.RandomState(seed).standard_normal((count, dim)) * spectrum
    features = np.maximum(0.3 + 3 * scale * (z @ base) + shift, 0)
    return torch.from_numpy(features.astype(np.float32))


def streamed(features: torch.Tensor, batch: int = 64) -> Gaussian:
    sums = FeatureSums.empty(features.shape[1], CPU)
    for part in features.split(batch):
        sums.add(part)
    return sums.gaussian()


def golden_cases(goldens):
    for case in json.loads((goldens / "adm_tf.json").read_text())["cases"]:
        reference = golden_features(case["n_ref"], case["d"], case["ref_seed"], 0, 1)
        shift, scale = case["shift"], case["scale"]
        yield (
            case,
            golden_features(case["n_sample"], case["d"], case["sample_seed"], shift, scale),
            reference,
        )


def test_the_frechet_distance_equals_adm(goldens):
    for case, samples, reference in golden_cases(goldens):
        found = frechet_distance(streamed(samples), streamed(reference))
        # Float32 means inside ADM differ from ours by a few 1e-7.
        assert found == pytest.approx(case["fid"], rel=1e-6)


def test_precision_and_recall_in_float16_equal_adm(goldens):
    for case, samples, reference in golden_cases(goldens):
        found = precision_recall(samples, reference, "adm16")
        assert found.precision == pytest.approx(case["precision_fp16"], abs=0.005)
        assert found.recall == pytest.approx(case["recall_fp16"], abs=0.005)


def golden_logits() -> torch.Tensor:
    random = np.random.RandomState(3)
    logits = random.standard_normal((3000, 1008)).astype(np.float32)
    logits[np.arange(3000), random.randint(0, 1008, 3000)] += 8
    return torch.from_numpy(logits)


def test_the_inception_score_equals_adm(goldens):
    golden = json.loads((goldens / "adm_tf.json").read_text())["is"]
    logits = golden_logits()
    assert inception_scores(logits)["inception_score_adm"] == pytest.approx(
        golden["split5000"], rel=1e-5
    )
    assert inception_score(logits.split(300)) == pytest.approx(golden["split300"], rel=1e-5)


def test_classes_in_order_lower_only_the_unshuffled_inception_score():
    labels = np.sort(np.arange(12_000) % 10)
    scores = inception_scores(8 * torch.eye(10)[labels])
    assert scores["inception_score_adm"] < 6
    assert scores["inception_score"] > 9
    assert scores["inception_score_fidelity"] > 9


def test_streamed_statistics_equal_those_of_the_whole():
    features = torch.from_numpy(np.random.default_rng(0).standard_normal((300, 20)))
    found, exact = streamed(features.float(), batch=7), features.float().double().numpy()
    assert np.abs(found.mean.numpy() - exact.mean(0)).max() < 1e-12
    assert np.abs(found.covariance.numpy() - np.cov(exact.T)).max() < 1e-12
    whole = Gaussian.of_rows(features.float())
    assert torch.allclose(found.covariance, whole.covariance, rtol=0, atol=1e-12)


@pytest.mark.parametrize("count", [2, 5, 39, 40, 41, 50])
def test_few_samples_and_dead_features_give_a_real_distance(count):
    random = np.random.default_rng(0)
    features, others = (
        torch.from_numpy(random.standard_normal((n, 40)) + 0.5) for n in (count, 400)
    )
    features[:, 3] = 0
    others[:, 3:5] = 0
    known, sums = Gaussian.of_rows(features), streamed(features)
    for ours in (known, sums):
        distance = frechet_distance(ours, streamed(others))
        difference = (ours.mean - streamed(others).mean).square().sum()
        traces = ours.covariance.trace() + streamed(others).covariance.trace()
        # The trace of the root as the nuclear norm of the centred cross-Gram matrix.
        gram = (features - features.mean(0)) @ (others - others.mean(0)).T
        root = np.linalg.norm(gram.numpy(), "nuc") / ((count - 1) * (len(others) - 1)) ** 0.5
        assert distance == pytest.approx(float(difference + traces) - 2 * root, rel=1e-6)
        assert abs(frechet_distance(ours, ours)) < 1e-6
    assert frechet_distance(known, known) == pytest.approx(frechet_distance(sums, sums), abs=1e-6)


@pytest.mark.slow
def test_2048_dimensions_and_few_samples_give_exact_distances():
    spectrum = torch.arange(1, 2049) ** -0.5
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(3000, 2048, generator=generator) * spectrum
    reference = Gaussian.of_rows(base.relu())
    for count in (2, 300):
        ours = Gaussian.of_rows(base[:count].relu() + 0.1)
        distance = frechet_distance(ours, reference)
        assert 0 < distance < 100
        assert abs(frechet_distance(ours, ours)) < 1e-6


@pytest.fixture(scope="module")
def population():
    """Features to draw (n, 32), and a reference that is not quite their distribution."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(32, 32, generator=generator) / 32**0.5
    reference = Gaussian.of_rows((torch.randn(20_000, 32, generator=generator) @ mix).relu())

    def draw(count: int) -> torch.Tensor:
        return (torch.randn(count, 32, generator=generator) @ mix * 1.1 + 0.05).relu()

    return draw, reference


def test_the_error_bar_is_the_spread_over_resamples(population):
    draw, reference = population
    distances = [frechet_distance(Gaussian.of_rows(draw(2000)), reference) for _ in range(150)]
    bars = [float(influence(draw(2000), reference).std()) / 2000**0.5 for _ in range(5)]
    assert np.mean(bars) == pytest.approx(np.std(distances), rel=0.3)


def test_the_influence_foretells_what_a_class_does_to_the_distance(population):
    draw, reference = population
    rows = draw(4000)
    rows[:100] += 0.1
    change = influence(rows, reference)
    assert abs(float(change.mean())) < 1e-9
    without = frechet_distance(Gaussian.of_rows(rows[100:]), reference)
    fall = frechet_distance(Gaussian.of_rows(rows), reference) - without
    assert float(change[:100].sum()) / 3900 == pytest.approx(fall, rel=0.1)


def test_the_distance_at_infinity_has_less_bias(population):
    draw, reference = population
    exact = frechet_distance(Gaussian.of_rows(draw(200_000)), reference)
    found = np.mean([frechet_at_infinity(draw(1000), reference) for _ in range(5)])
    plain = np.mean([frechet_distance(Gaussian.of_rows(draw(1000)), reference) for _ in range(5)])
    assert abs(found - exact) < abs(plain - exact) / 3


@pytest.mark.slow
def test_neighbour_scores_of_known_sets():
    generator = torch.Generator().manual_seed(0)
    real, same = torch.randn(2, 1500, 8, generator=generator)
    for arithmetic in ("adm16", "fp32"):
        assert min(precision_recall(same, real, arithmetic)) > 0.85
        assert precision_recall(real + 100, real, arithmetic) == (0, 0)
    # Half of the modes: all that is shown is right, half is missing.
    modes = torch.cat([real, real + 50])
    precision, recall = precision_recall(same, modes, "fp32")
    assert precision > 0.85
    assert 0.4 < recall < 0.5
    assert density_coverage(real, real).coverage == 1
    density, coverage = density_coverage(same, modes)
    assert density == pytest.approx(1, abs=0.1)
    assert 0.4 < coverage <= 0.5
    assert abs(kernel_distance(same, real)) < 0.01
    assert kernel_distance(same + 1, real) > 1


def test_float16_distances_fall_back_where_they_overflow():
    rows = torch.full((4, 8), 300.0)
    rows[0] = 0
    assert torch.equal(
        squared_distances(rows, rows, "adm16"), squared_distances(rows, rows, "fp32")
    )


def test_psnr_and_ssim_of_known_images():
    grey = torch.full((1, 32, 32, 3), 100, dtype=torch.uint8)
    assert psnr(grey, grey + 10).item() == pytest.approx(10 * np.log10(255**2 / 100))
    assert psnr(grey, grey).item() == 100
    noise = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    for measure in (ssim, ssim_reference_inflated):
        assert measure(noise, noise).tolist() == pytest.approx([1, 1])
    # Of two flat images only the luminance term is left.
    c1 = (0.01 * 255) ** 2
    expected = (2 * 100 * 110 + c1) / (100**2 + 110**2 + c1)
    assert ssim(grey, grey + 10).item() == pytest.approx(expected)


def test_the_reference_definition_inflates_ssim():
    random = torch.Generator().manual_seed(0)
    real = torch.randint(60, 200, (1, 64, 64, 3), generator=random)
    fake = (real + torch.randint(-25, 25, real.shape, generator=random)).clamp(0, 255)
    real, fake = real.to(torch.uint8), fake.to(torch.uint8)
    assert ssim_reference_inflated(real, fake) > ssim(real, fake)
