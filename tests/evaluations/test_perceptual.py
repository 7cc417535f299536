import pytest
import torch
from torchvision.models import vgg16

from core.config import InputError
from evaluations.metrics.lpips import LPIPS


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    features = vgg16(weights=None).features.state_dict()
    torch.save({f"features.{key}": value for key, value in features.items()}, path)
    return path


def images() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    real = torch.rand(2, 3, 64, 64, generator=generator) * 2 - 1
    return real, (real + 0.3 * torch.randn(real.shape, generator=generator)).clamp(-1, 1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_lpips_equals_the_package_on_the_same_trunk(vgg_file):
    package = pytest.importorskip("lpips").LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
    ours = LPIPS(vgg_file)
    for theirs, own in zip(
        [
            package.net.slice1,
            package.net.slice2,
            package.net.slice3,
            package.net.slice4,
            package.net.slice5,
        ],
        ours.stages,
        strict=True,
    ):
        values = list(own.state_dict().values())
        theirs.load_state_dict(dict(zip(theirs.state_dict(), values, strict=True)))
    real, fake = images()
    with torch.no_grad():
        torch.testing.assert_close(
            ours(real, fake), package(real, fake).flatten(), rtol=1e-4, atol=1e-6
        )


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="another architecture"):
        LPIPS(tmp_path / "other.pth")


def test_only_fake_images_receive_gradients_and_dropout_stays_off(vgg_file):
    lpips = LPIPS(vgg_file).train()
    assert not lpips.training
    assert not [p for p in lpips.parameters() if p.requires_grad]
    real, fake = images()
    fake.requires_grad_()
    assert lpips(real, real).abs().max() < 1e-6
    lpips(real, fake).sum().backward()
    assert fake.grad is not None
    assert fake.grad.abs().max() > 0


def test_missing_weights_name_the_file_and_the_flag(tmp_path):
    with pytest.raises(InputError, match=r"vgg16-397923af\.pth \(vgg_weights\)"):
        LPIPS(tmp_path / "nowhere.pth")
