import hashlib
import json

import numpy as np
import pytest
import torch
from helpers.commands import run_module
from helpers.paths import SHARED_DATA
from PIL import Image, ImageFilter
from safetensors.torch import save_file

from core.config import InputError
from core.distributed.world import choose_device
from evaluations.features import dinov2, inception
from evaluations.features.extractors import InceptionExtractor, ProxyExtractor, full_float32
from evaluations.metrics.frechet import Gaussian, frechet_distance

CPU = choose_device("cpu")


def test_the_resize_equals_tensorflow_bit_for_bit(goldens):
    for case in json.loads((goldens / "adm_tf.json").read_text())["resize"]["cases"]:
        height, width = case["h"], case["w"]
        random = np.random.RandomState(height * 1000 + width)
        pixels = random.randint(0, 256, (1, height, width, 3)).astype(np.float32)
        resized = inception.tf1_resize(torch.from_numpy(pixels).movedim(-1, 1), 299).movedim(1, -1)
        digest = hashlib.sha256(resized.contiguous().numpy().tobytes()).hexdigest()
        assert digest == case["sha256_f32"], (height, width)


def recipe_weights(network: torch.nn.Module) -> None:
    """The golden file's weights, from key names and shapes alone."""
    for key, value in sorted(network.state_dict().items()):
        if key.endswith("num_batches_tracked"):
            continue
        folded = 0
        for byte in key.encode():
            folded = (folded * 131 + byte) % 2**32
        random, shape = np.random.RandomState(folded), tuple(value.shape)
        normal = random.standard_normal if not key.endswith("running_var") else random.random_sample
        drawn = normal(shape)
        if key.endswith("conv.weight"):
            drawn = drawn * np.sqrt(2 / np.prod(shape[1:]))
        elif key.endswith("bn.weight"):
            drawn = 1 + 0.1 * drawn
        elif key.endswith("running_var"):
            drawn = 0.5 + drawn
        else:
            drawn = (0.02 if key.startswith("fc") else 0.1) * drawn
        value.copy_(torch.from_numpy(drawn.astype(np.float32)))


@pytest.fixture(scope="module")
def recipe_network():
    network = inception.build_inception().eval().requires_grad_(False)
    recipe_weights(network)
    return network


@pytest.mark.slow
def test_inception_features_equal_the_original(goldens, recipe_network):
    weight = recipe_network.fc.weight
    for case in json.loads((goldens / "inception.json").read_text())["cases"]:
        size = case["size"]
        random = np.random.RandomState(100 + size)
        pixels = torch.from_numpy(random.randint(0, 256, (2, 3, size, size)).astype(np.uint8))
        # No result may depend on what surrounds the extractor.
        with full_float32(CPU):
            pooled, spatial = inception.features(recipe_network, pixels.movedim(1, -1))
        logits = pooled @ weight.T
        assert list(spatial.shape) == case["spatial_shape"]
        for found, name in ((pooled, "pool"), (spatial, "spatial"), (logits, "logits_unbiased")):
            expected = torch.tensor(case[f"{name}_first6"])
            torch.testing.assert_close(found[0, :6], expected, rtol=1e-5, atol=1e-5)
            total = case[f"{name.removesuffix('_unbiased')}_sum"]
            assert found.double().sum().item() == pytest.approx(total, rel=1e-5)


@pytest.mark.slow
def test_inception_features_and_distances_equal_the_pytorch_fid_package(recipe_network):
    package = pytest.importorskip("pytorch_fid.inception")
    fid_score = pytest.importorskip("pytorch_fid.fid_score")
    original, package.fid_inception_v3 = package.fid_inception_v3, lambda: recipe_network
    try:
        network = package.InceptionV3([3], resize_input=False, normalize_input=False).eval()
    finally:
        package.fid_inception_v3 = original
    pixels = torch.randint(0, 256, (16, 64, 64, 3), generator=torch.Generator().manual_seed(0))
    x = (inception.tf1_resize(pixels.movedim(-1, 1).float(), 299) - 128) / 128
    ours, _ = inception.features(recipe_network, pixels.to(torch.uint8))
    theirs = network(x)[0].flatten(1)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    # The distance, where scipy's square root is exact enough: on 6 of the dimensions.
    parts = [part[:, :6].double() for part in (theirs[:8], theirs[8:])]
    moments = [f(part.numpy().T) for part in parts for f in (lambda x: x.mean(1), np.cov)]
    expected = fid_score.calculate_frechet_distance(*moments)
    found = frechet_distance(*(Gaussian.of_rows(part) for part in parts))
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_inception_features_equal_the_torch_fidelity_package(recipe_network, tmp_path):
    package = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    torch.save(recipe_network.state_dict(), tmp_path / "weights.pth")
    layers = ["2048", "logits_unbiased"]
    theirs = package.FeatureExtractorInceptionV3(
        "ours", layers, feature_extractor_weights_path=str(tmp_path / "weights.pth")
    )
    pixels = torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8)
    pooled, _ = inception.features(recipe_network, pixels)
    expected, logits = theirs(pixels.movedim(-1, 1))
    torch.testing.assert_close(pooled, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pooled @ recipe_network.fc.weight.T, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_weights_file_without_counters_is_read_and_an_unknown_one_is_pointed_out(
    recipe_network, tmp_path, caplog
):
    tensors = recipe_network.state_dict()
    published = {k: v for k, v in tensors.items() if not k.endswith("num_batches_tracked")}
    torch.save(published, tmp_path / "weights.pth")
    network, sha256 = inception.load_inception(tmp_path / "weights.pth")
    assert len(sha256) == 64
    assert "is not 6726825d" in caplog.text
    assert all(torch.equal(network.state_dict()[key], value) for key, value in published.items())
    assert InceptionExtractor(tmp_path / "weights.pth", CPU).metric == "unverified_inception_fd"
    del published["fc.weight"]
    torch.save(published, tmp_path / "cut.pth")
    with pytest.raises(InputError, match=r"fc\.weight is missing"):
        inception.load_inception(tmp_path / "cut.pth")


def test_missing_inception_weights_name_the_file_and_the_flag(tmp_path):
    with pytest.raises(InputError, match=r"--metrics.inception_weights.*--metrics.extractor proxy"):
        InceptionExtractor(tmp_path / "nowhere.pth", CPU)


@pytest.mark.slow
@pytest.mark.parametrize("module", ["reference", "score", "sweep", "verify_adm"])
def test_without_weights_or_internet_a_command_ends_with_one_line(tmp_path, monkeypatch, module):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nothing listens there
    flags = {
        "reference": ("--images", tmp_path, "--out", tmp_path / "r.npz"),
        "sweep": ("--runs", f"[{tmp_path}]", "--metrics.reference", "r.npz", "--out", tmp_path),
    }
    other = ("--samples", tmp_path, "--metrics.reference", "r.npz", "--out", tmp_path)
    done = run_module(f"evaluations.{module}", *flags.get(module, other), ok=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    for part in (
        "pt_inception-2015-12-05-6726825d.pth",
        "--metrics.inception_weights",
        "pytorch-fid",
    ):
        assert part in line


def test_dinov2_files_of_any_image_size_are_read_and_a_missing_one_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(dinov2, "ARCHITECTURE", "vit_small_patch14_dinov2")  # the large has 1.2 GB
    tensors = {k: v.clone() for k, v in dinov2.build_dinov2().state_dict().items()}
    small = tensors["pos_embed"]
    torch.save(tensors, tmp_path / "small.pth")
    table = torch.randn(1, 1 + 37 * 37, small.shape[2])
    save_file(
        {**tensors, "pos_embed": table, "mask_token": torch.zeros(1)},
        tmp_path / "published.safetensors",
    )
    network, _ = dinov2.load_dinov2(str(tmp_path / "small.pth"))
    assert torch.equal(network.get_parameter("pos_embed"), small)
    network, sha256 = dinov2.load_dinov2(str(tmp_path / "published.safetensors"))
    assert len(sha256) == 64
    assert torch.equal(network.get_parameter("pos_embed")[:, 0], table[:, 0])
    pixels = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    assert dinov2.features(network, pixels).shape == (2, 384)
    with pytest.raises(InputError, match=r"dinov2_vitl14_pretrain.pth.*--metrics.dinov2_weights"):
        dinov2.load_dinov2(str(tmp_path / "nowhere.pth"))


def test_the_proxy_is_seeded_and_never_called_fid():
    pixels = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    first, second = (ProxyExtractor(CPU) for _ in range(2))
    assert isinstance(first, ProxyExtractor)
    assert first.metric == "proxy_fd"
    features = first(pixels)
    assert features.spatial is None
    assert features.pooled.shape == (4, first.dim)
    assert torch.equal(features.pooled, second(pixels).pooled)


def test_the_extractor_runs_in_float32_whatever_surrounds_it():
    extractor = ProxyExtractor(CPU)
    pixels = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    plain = extractor(pixels).pooled
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(extractor(pixels).pooled, plain)
    torch.set_float32_matmul_precision("medium")
    try:
        with full_float32(CPU):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.slow
def test_the_proxy_distance_rises_with_blur_noise_and_lost_classes():
    folder = SHARED_DATA / "cifar10" / "train"
    if not folder.is_dir():
        pytest.skip("the CIFAR-10 images are not here")
    images = [Image.open(path).convert("RGB") for path in sorted(folder.glob("*/*.jpg"))[::2]]
    pixels = np.stack([np.asarray(image) for image in images])
    extractor = ProxyExtractor(CPU)

    def look(pixels: np.ndarray) -> Gaussian:
        return Gaussian.of_rows(extractor(torch.from_numpy(pixels)).pooled)

    blurred = [
        np.stack([np.asarray(image.filter(ImageFilter.GaussianBlur(radius))) for image in images])
        for radius in (0.5, 1, 2, 3)
    ]
    noise = np.random.default_rng(0).standard_normal(pixels.shape)
    noised = [(pixels + noise * s).clip(0, 255).astype(np.uint8) for s in (4, 8, 16, 32, 64)]
    # The folder is in the order of its ten classes.
    dropped = [pixels[: len(pixels) * kept // 10] for kept in (9, 5, 2, 1)]
    real = look(pixels)
    assert abs(frechet_distance(real, real)) < 1e-6
    for series in (blurred, noised, dropped):
        distances = [frechet_distance(look(images), real) for images in series]
        assert distances == sorted(distances)
        assert distances[0] > 1e-4
