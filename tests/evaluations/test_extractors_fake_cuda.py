"""Feature extractors on a CUDA device that does not exist: no host sync, no tensor left behind."""

import pytest
import torch
from helpers.fake_cuda import CUDA, HOST_READ, MIXED_DEVICES, fake_tensors, to_fake
from torch._subclasses.fake_tensor import DataDependentOutputException

from evaluations.features import dinov2, inception
from evaluations.features.extractors import DinoV2Extractor, InceptionExtractor, ProxyExtractor
from evaluations.metrics.psnr_ssim import psnr, ssim


def network_of(name: str) -> torch.nn.Module:
    with torch.device("meta"):
        return (
            inception.build_inception() if name == "inception" else dinov2.build_dinov2()
        ).eval()


def extract(name: str, network: torch.nn.Module, pixels: torch.Tensor) -> None:
    """The extractor as it is built for a card, around a network without weights."""
    kind = InceptionExtractor if name == "inception" else DinoV2Extractor
    extractor = object.__new__(kind)
    extractor.network, extractor.device = to_fake(network), CUDA
    pooled, spatial = extractor(pixels)
    assert (pooled.shape, pooled.dtype, pooled.device) == ((2, kind.dim), torch.float32, CUDA)
    assert spatial is None or spatial.shape == (2, kind.spatial_dim)


@pytest.mark.parametrize("side", [224, 256])
@pytest.mark.parametrize("name", ["inception", "dinov2"])
def test_the_networks_of_the_metrics(name, side):
    network = network_of(name)
    with fake_tensors():
        extract(name, network, torch.zeros(2, side, side, 3, dtype=torch.uint8, device=CUDA))


def test_the_proxy_copies_pixels_of_the_host_to_its_device():
    with fake_tensors():
        extractor = ProxyExtractor(CUDA)
        pooled, _ = extractor(torch.zeros(2, 32, 32, 3, dtype=torch.uint8))
        assert pooled.device == CUDA


def test_psnr_and_ssim():
    with fake_tensors():
        pixels = torch.zeros(2, 32, 32, 3, dtype=torch.uint8, device=CUDA)
        assert {metric(pixels, pixels).device for metric in (psnr, ssim)} == {CUDA}


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (lambda x: x * x.mean().item(), HOST_READ),
        (lambda x: x + torch.ones(x.shape[-1]), MIXED_DEVICES),
    ],
)
def test_a_planted_host_read_or_cpu_tensor_fails(plant, message):
    network = network_of("dinov2")
    network.register_forward_hook(lambda module, inputs, output: plant(output))
    with (
        pytest.raises((RuntimeError, DataDependentOutputException), match=message),
        fake_tensors(),
    ):
        extract("dinov2", network, torch.zeros(2, 224, 224, 3, dtype=torch.uint8, device=CUDA))
