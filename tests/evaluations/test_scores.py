import json

import numpy as np
import pytest
import torch
from conftest import run_module
from PIL import Image

from core.config import InputError
from core.images import save_npz
from evaluations.frechet import FeatureSums, Gaussian, frechet_distance
from evaluations.inception_score import inception_score
from evaluations.reconstruction import psnr, ssim, ssim_reference_inflated
from evaluations.statistics import load_reference, save_reference


def golden_features(count, dim, seed, shift, scale):
    base = np.random.RandomState(7).standard_normal((dim, dim)) / np.sqrt(dim)
    spectrum = np.arange(1, dim + 1) ** -0.5
    z = np.random.RandomState(seed).standard_normal((count, dim)) * spectrum
    return np.maximum(0.3 + 3 * scale * (z @ base) + shift, 0).astype(np.float32)


def gaussian(features: np.ndarray, batch: int = 64) -> Gaussian:
    sums = FeatureSums.empty(features.shape[1], torch.device("cpu"))
    for part in torch.from_numpy(features).split(batch):
        sums.add(part)
    return sums.gaussian()


def test_the_frechet_distance_equals_adm(goldens):
    for case in json.loads((goldens / "adm_tf.json").read_text())["cases"]:
        reference = golden_features(case["n_ref"], case["d"], case["ref_seed"], 0, 1)
        shift, scale = case["shift"], case["scale"]
        samples = golden_features(case["n_sample"], case["d"], case["sample_seed"], shift, scale)
        found = frechet_distance(gaussian(samples), gaussian(reference))
        # Float32 means inside ADM differ from ours by a few 1e-7.
        assert found == pytest.approx(case["fid"], rel=1e-6)


def test_the_inception_score_equals_adm_without_a_shuffle(goldens):
    golden = json.loads((goldens / "adm_tf.json").read_text())["is"]
    random = np.random.RandomState(3)
    logits = random.standard_normal((3000, 1008)).astype(np.float32)
    logits[np.arange(3000), random.randint(0, 1008, 3000)] += 8
    # One split holds all images, so the shuffle cannot matter.
    assert inception_score(logits, 5000, seed=0) == pytest.approx(golden["split5000"], rel=1e-5)


def test_class_order_does_not_change_the_inception_score_much():
    logits = 8 * np.eye(10, dtype=np.float32)[np.arange(1000) % 10]
    ordered = np.sort(np.arange(1000) % 10)
    mixed, sorted_ = (inception_score(x, 100, 0) for x in (logits, logits[ordered]))
    assert sorted_ == pytest.approx(mixed, rel=0.05)


def test_streamed_statistics_equal_those_of_the_whole():
    features = np.random.default_rng(0).standard_normal((300, 20)).astype(np.float32)
    found = gaussian(features, batch=7)
    exact = features.astype(np.float64)
    assert np.abs(found.mean.numpy() - exact.mean(0)).max() < 1e-12
    assert np.abs(found.covariance.numpy() - np.cov(exact.T)).max() < 1e-12


@pytest.mark.parametrize("count", [2, 5, 50])
def test_few_samples_and_dead_features_give_a_real_distance(count):
    random = np.random.default_rng(0)
    features, others = random.standard_normal((count, 40)), random.standard_normal((400, 40))
    features[:, 3] = 0
    others[:, 3] = 0
    distance = frechet_distance(gaussian(features), gaussian(others))
    assert np.isfinite(distance)
    assert distance > 0
    assert abs(frechet_distance(gaussian(features), gaussian(features))) < 1e-6


def test_psnr_and_ssim_of_known_pictures():
    grey = torch.full((1, 32, 32, 3), 100, dtype=torch.uint8)
    assert psnr(grey, grey + 10).item() == pytest.approx(10 * np.log10(255**2 / 100))
    assert psnr(grey, grey).item() == 100
    noise = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    for score in (ssim, ssim_reference_inflated):
        assert score(noise, noise).tolist() == pytest.approx([1, 1])
    # Of two flat pictures only the luminance term is left.
    c1 = (0.01 * 255) ** 2
    expected = (2 * 100 * 110 + c1) / (100**2 + 110**2 + c1)
    assert ssim(grey, grey + 10).item() == pytest.approx(expected)


def test_the_reference_definition_inflates_ssim():
    random = torch.Generator().manual_seed(0)
    real = torch.randint(60, 200, (1, 64, 64, 3), generator=random)
    fake = (real + torch.randint(-25, 25, real.shape, generator=random)).clamp(0, 255)
    real, fake = real.to(torch.uint8), fake.to(torch.uint8)
    assert ssim_reference_inflated(real, fake) > ssim(real, fake)


def test_a_reference_of_another_detector_is_refused(tmp_path):
    save_reference(tmp_path / "r.npz", gaussian(np.random.default_rng(0).random((50, 8))))
    assert load_reference(tmp_path / "r.npz", 8).mean.shape == (8,)
    with pytest.raises(InputError, match="belongs to the detector"):
        load_reference(tmp_path / "r.npz", 2048)
    (tmp_path / "text.npz").write_text("no")
    with pytest.raises(InputError, match="not a reference file"):
        load_reference(tmp_path / "text.npz", 8)


def test_the_commands_score_an_npz_and_a_folder_alike(tmp_path):
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (24, 16, 16, 3), dtype=np.uint8)
    for i, picture in enumerate(pixels):
        path = tmp_path / "images" / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(picture).save(path)
    (tmp_path / "images" / "zz.jpg").write_text("not a picture")
    save_npz(tmp_path / "samples.npz", len(pixels), [pixels])
    common = ("--detector", "proxy", "--image_size", "[16,16]", "--num_workers", 0)
    reference = tmp_path / "reference.npz"
    run_module(
        "evaluations.reference", "--images", tmp_path / "images", "--out", reference, *common
    )
    assert json.loads(reference.with_suffix(".json").read_text())["n"] == 24
    for name in ("samples.npz", "images"):
        out = tmp_path / f"scores_{name}"
        flags = ("--samples", tmp_path / name, "--reference", reference, "--out", out)
        done = run_module("evaluations.generation", *flags, *common)
        scores = json.loads((out / "scores.json").read_text())
        assert abs(scores["proxy_fd"]) < 1e-6
        assert "fid" not in scores
        assert "NOT FID" in done.stdout
        assert scores["n"] == 24
        assert len(scores["skipped"]) == (name == "images")
