import itertools
import json

import numpy as np
import pytest
import torch
from helpers.models import small
from torch import nn
from torch.nn import functional as F

from core.config import InputError
from core.data.shards import codes_dtype
from core.distributed.world import World, choose_device
from tokenizer import VQConfig, VQModel
from tokenizer.crops import encode_crops
from tokenizer.losses.config import LossConfig
from tokenizer.losses.objective import adaptive_weight, discriminator_loss, generator_loss
from tokenizer.models.config import DiscriminatorConfig
from tokenizer.models.discriminator import PatchGAN, build_discriminator
from tokenizer.quantizers.base import Quantized, Quantizer
from tokenizer.quantizers.usage import CodebookUsage
from tokenizer.quantizers.vector import VectorQuantizer, entropy_loss, nearest


@pytest.mark.parametrize("name", ["VQ-16", "VQ-8"])
def test_keys_and_shapes_are_those_of_the_released_tokenizers(goldens, name):
    facts = json.loads((goldens / "checkpoint_keys.json").read_text())[name]
    with torch.device("meta"):
        vq = VQModel.from_preset(name)
    assert {k: list(v.shape) for k, v in vq.state_dict().items()} == facts["state_dict"]
    assert sum(p.numel() for p in vq.parameters()) == facts["params"]


@pytest.mark.slow
def test_vq16_equals_the_reference(goldens):
    from helpers.fill import fill_, image

    golden = np.load(goldens / "vq16_256.npz")
    vq = fill_(VQModel.from_preset("VQ-16")).eval()
    with torch.no_grad():
        images = image(seed=1, size=256, batch=2)
        out = vq(images)
        codes = vq.encode(images)
        vectors = vq.quantize.lookup(codes)
        rebuilt = vq.decode(torch.from_numpy(golden["codes"]).long())
    assert torch.equal(out.codes, codes)
    equal = codes.numpy() == golden["codes"]
    assert equal.mean() >= 0.995
    same = np.broadcast_to(equal[:, None], golden["quant"].shape)
    assert np.abs(vectors.numpy() - golden["quant"])[same].max() < 1e-4
    assert np.abs(rebuilt.numpy() - golden["recon"].astype(np.float32)).max() < 2e-3


def test_the_surface_keeps_its_shapes_and_types():
    vq = small()
    with torch.no_grad():
        codes = vq.encode(torch.rand(2, 3, 16, 24) * 2 - 1)
        assert codes.shape == (2, 8, 12)
        assert codes.dtype == torch.int64
        assert vq.decode(codes).shape == (2, 3, 16, 24)
    with pytest.raises(InputError, match="divisible by 2"):
        vq.encode(torch.zeros(1, 3, 15, 16))
    with pytest.raises(InputError, match="VQ-16, VQ-8"):
        VQModel.from_preset("VQ-4")


def test_the_nearest_code_equals_brute_force():
    generator = torch.Generator().manual_seed(0)
    vectors, codebook = (torch.randn(n, 5, generator=generator) for n in (300, 70))
    distance = (vectors[:, None] - codebook).square().sum(-1)
    assert torch.equal(nearest(vectors, codebook), distance.argmin(1))


def test_the_code_search_ignores_autocast():
    vq = VectorQuantizer(64, 4, True, 0.25, 0.0)
    z = torch.randn(2, 4, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = vq(z)
    assert torch.equal(inside.codes, vq(z).codes)
    assert inside.vectors.dtype == torch.float32


def test_quantiser_losses_and_straight_through_gradient():
    vq = VectorQuantizer(16, 4, True, 0.25, 0.0)
    z = torch.randn(2, 4, 3, 3, requires_grad=True)
    out = vq(z)
    unit, chosen = F.normalize(z, dim=1), vq.lookup(out.codes)
    error = (unit - chosen).square().mean().item()
    assert out.losses.keys() == {"codebook", "commitment"}
    assert out.losses["codebook"].item() == pytest.approx(error, rel=1e-4)
    assert out.losses["commitment"].item() == pytest.approx(0.25 * error, rel=1e-4)
    torch.testing.assert_close(out.vectors, chosen)
    weights = torch.randn_like(chosen)
    (gradient,) = torch.autograd.grad((out.vectors * weights).sum(), z)
    (expected,) = torch.autograd.grad((F.normalize(z, dim=1) * weights).sum(), z)
    torch.testing.assert_close(gradient, expected)


def test_the_entropy_loss_rewards_sure_and_varied_codes():
    codebook = F.normalize(torch.randn(8, 4), dim=-1)
    varied, constant = codebook[torch.arange(64) % 8], codebook[torch.zeros(64, dtype=torch.long)]
    assert entropy_loss(varied, codebook) < entropy_loss(constant, codebook) - 1
    assert "entropy" in VectorQuantizer(8, 4, True, 0.25, 0.1)(torch.randn(1, 4, 2, 2)).losses


def test_usage_and_perplexity_over_a_data_set():
    usage = CodebookUsage(10, torch.device("cpu"))
    for codes in ([0, 1], [2, 3], [0, 1], [2, 3]):
        usage.update(torch.tensor(codes))
    result = usage.result(World(0, 1, choose_device("cpu")))
    assert result["codebook_usage"] == pytest.approx(0.4)
    assert result["perplexity"] == pytest.approx(4.0)


def test_adversarial_losses_equal_their_definitions():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.25, 1.0])
    hinge = 0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1.25 + 2) / 3)
    assert discriminator_loss(real, fake, "hinge").item() == pytest.approx(hinge)
    targets = torch.cat([torch.ones(3), torch.zeros(3)])
    entropy = F.binary_cross_entropy_with_logits(torch.cat([real, fake]), targets)
    for kind in ("vanilla", "non_saturating"):
        assert discriminator_loss(real, fake, kind).item() == pytest.approx(entropy.item())
    for kind in ("hinge", "vanilla"):
        assert generator_loss(fake, kind).item() == pytest.approx(-fake.mean().item())
    wanted = F.binary_cross_entropy_with_logits(fake, torch.ones(3))
    assert generator_loss(fake, "non_saturating").item() == pytest.approx(wanted.item())


def test_a_good_discriminator_has_the_lower_loss():
    high, low = torch.full((4,), 3.0), torch.full((4,), -3.0)
    for kind in ("hinge", "vanilla", "non_saturating"):
        assert discriminator_loss(high, low, kind) < discriminator_loss(low, high, kind)
        assert generator_loss(high, kind) < generator_loss(low, kind)


def test_the_adaptive_weight_is_the_ratio_of_gradients():
    last = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    weight = adaptive_weight((last**2).sum() / 2, (2 * last).sum(), last)
    assert weight.item() == pytest.approx(5 / (8**0.5 + 1e-4), rel=1e-5)
    assert adaptive_weight((last * 1e9).sum(), (last * 1e-9).sum(), last).item() == 1e4


def test_the_patchgan_is_the_reference_s():
    net = PatchGAN()
    assert sum(p.numel() for p in net.parameters()) == 2_765_633
    assert {key.split(".")[1] for key in net.state_dict()} == {
        "0",
        "2",
        "3",
        "5",
        "6",
        "8",
        "9",
        "11",
    }
    assert net(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 30, 30)


def test_the_stylegan_discriminator_takes_any_power_of_two():
    for kind in ("stylegan", "stylegan_reference"):
        config = DiscriminatorConfig(kind=kind, max_channels=32)
        for side in (8, 64):
            net = build_discriminator(config, (side, side))
            assert net(torch.randn(2, 3, side, side)).shape == (2, 1)
        with pytest.raises(InputError, match=f"{kind} needs .* power of two"):
            build_discriminator(config, (48, 48))


def test_the_reference_s_stylegan_discriminator_has_its_keys_shapes_and_arithmetic():
    net = build_discriminator(DiscriminatorConfig(kind="stylegan_reference"), (256, 256))
    shapes = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    expected = {"blocks.0.weight": (64, 3, 3, 3), "blocks.0.bias": (64,)}
    widths = (64, 128, 256, 512, 512, 512, 512)
    for number, (a, b) in enumerate(itertools.pairwise(widths), 2):
        parts = {"conv_res": (b, a, 1, 1), "net.0": (b, a, 3, 3)}
        parts |= {"net.2": (b, b, 3, 3), "downsample.1": (b, b, 3, 3)}
        for part, shape in parts.items():
            expected |= {f"blocks.{number}.{part}.weight": shape}
            expected |= {f"blocks.{number}.{part}.bias": (b,)}
        expected[f"blocks.{number}.downsample.0.f"] = (3,)
    for part, shape in (
        ("final_conv.0", (512, 512, 3, 3)),
        ("final_linear.0", (512, 8192)),
        ("final_linear.2", (1, 512)),
    ):
        expected |= {f"{part}.weight": shape, f"{part}.bias": shape[:1]}
    assert shapes == expected
    small = build_discriminator(
        DiscriminatorConfig(kind="stylegan_reference", max_channels=8), (8, 8)
    )
    x = torch.randn(2, 8, 8, 8)
    block = small.get_submodule("blocks.2")
    h = x
    for index in (0, 2):
        h = F.leaky_relu(block.get_submodule(f"net.{index}")(h), 0.2)
    blurred = torch.zeros_like(h)
    around = F.pad(h, (1, 1, 1, 1), mode="reflect")
    for (i, row), (j, column) in itertools.product(enumerate((1, 2, 1)), repeat=2):
        blurred += row * column / 16 * around[:, :, i : i + 8, j : j + 8]
    halved = block.get_submodule("downsample.1")(blurred)
    expected_output = (halved + block.get_submodule("conv_res")(x)) / 2**0.5
    torch.testing.assert_close(block(x), expected_output)


def test_the_generator_s_loss_follows_the_discriminator_s_unless_it_is_chosen():
    assert LossConfig().generator_kind == "hinge"
    assert LossConfig(adversarial="non_saturating").generator_kind == "non_saturating"
    chosen = LossConfig(adversarial="non_saturating", generator="hinge")
    assert chosen.generator_kind == "hinge"


def test_impossible_shapes_are_refused_by_name():
    for wrong, name in (
        ({"base_channels": 20}, "base_channels"),
        ({"base_channels": 32, "norm_groups": 5}, "norm_groups"),
        ({"vocab_size": 1}, "vocab_size"),
        ({"dropout": 1.0}, "dropout"),
    ):
        with pytest.raises(ValueError, match=name):
            VQConfig(**wrong)


def test_every_group_norm_has_the_groups_of_the_config_and_the_weights_stay_the_same():
    groups = {m.num_groups for m in small(norm_groups=8).modules() if isinstance(m, nn.GroupNorm)}
    assert groups == {8}
    published = {m.num_groups for m in small().modules() if isinstance(m, nn.GroupNorm)}
    assert published == {32}
    assert small(norm_groups=8).state_dict().keys() == small().state_dict().keys()


class SignQuantizer(Quantizer):
    """One bit per channel: another quantizer, to see that the model only needs the interface."""

    def __init__(self, dim: int) -> None:
        super().__init__(2**dim, dim)
        self.register_buffer("weights", 2 ** torch.arange(dim), persistent=False)

    def forward(self, z: torch.Tensor) -> Quantized:
        codes = ((z > 0).movedim(1, -1) * self.weights).sum(-1)
        return Quantized(codes, z + (z.sign() - z).detach(), {"commitment": z.abs().mean()})

    def lookup(self, codes: torch.Tensor) -> torch.Tensor:
        return ((codes[..., None] // self.weights) % 2 * 2.0 - 1).movedim(-1, 1)


def test_the_model_needs_only_the_interface_of_a_quantizer():
    vq = small(codebook_dim=8)
    vq.quantize = SignQuantizer(8)
    images = torch.rand(1, 3, 8, 8) * 2 - 1
    codes = vq.encode(images)
    assert codes.shape == (1, 4, 4)
    assert codes.max() < vq.quantize.vocab_size == 256
    assert torch.allclose(vq(images).images, vq.decode(codes), atol=1e-6)


def test_the_dtype_of_codes_follows_from_the_vocabulary():
    assert codes_dtype(2**16) == np.uint16
    assert codes_dtype(2**16 + 1) == np.uint32
    vq = small(codebook_dim=8)
    vq.quantize = SignQuantizer(8)
    pixels = torch.zeros(2, 1, 8, 8, 3, dtype=torch.uint8)
    assert encode_crops(vq, pixels, 2).dtype == np.uint16
    vq.quantize.vocab_size = 2**18
    assert encode_crops(vq, pixels, 2).dtype == np.uint32
