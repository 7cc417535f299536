"""The tokenizer on a CUDA device that does not exist: no host sync, nothing on a wrong device."""

import pytest
import torch
from helpers.fake_cuda import CUDA, HOST_READ, MIXED_DEVICES, fake_tensors, to_fake
from helpers.models import small
from torch._subclasses.fake_tensor import DataDependentOutputException

from core.data.images import pixels_to_images
from core.distributed.world import World
from tokenizer.losses.config import LossConfig
from tokenizer.losses.objective import discriminator_loss, generator_loss, tokenizer_losses
from tokenizer.models.config import DiscriminatorConfig
from tokenizer.models.discriminator import build_discriminator
from tokenizer.models.vq_model import VQModel

KINDS = {
    "vq": {},
    "entropy": {"entropy_weight": 0.1},
    "ibq": {"quantizer": "ibq", "l2_normalize": False},
}


def round_trip(vq: VQModel, dtype: torch.dtype) -> None:
    with fake_tensors(), torch.no_grad():
        to_fake(vq.to(dtype))
        images = torch.zeros(2, 3, 32, 32, device=CUDA)
        codes = vq.encode(images)
        assert (codes.shape, codes.dtype, codes.device) == ((2, 16, 16), torch.int64, CUDA)
        decoded = vq.decode(codes)
        assert (decoded.shape, decoded.dtype, decoded.device) == (images.shape, dtype, CUDA)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_encode_and_decode(kind, dtype):
    round_trip(small(**KINDS[kind]), dtype)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_forward_pass_of_both_losses_of_training_under_autocast(kind, precision):
    """Forward only: the backward pass of fake CUDA tensors needs a driver."""
    vq, world = small(**KINDS[kind]).train(), World(0, 1, CUDA)
    discriminator = build_discriminator(DiscriminatorConfig(), (32, 32))
    config = LossConfig(perceptual_weight=0)
    with fake_tensors():
        to_fake(vq), to_fake(discriminator)
        images = pixels_to_images(torch.zeros(2, 32, 32, 3, dtype=torch.uint8, device=CUDA))
        with world.autocast(precision):
            out = vq(images)
            losses = tokenizer_losses(config, images, out.images, out.losses, None)
            losses["generator"] = generator_loss(discriminator(out.images), config.adversarial)
            real, fake = discriminator(images), discriminator(out.images.detach())
        losses["discriminator"] = discriminator_loss(real, fake, config.adversarial)
        assert {loss.device for loss in losses.values()} == {CUDA}


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (lambda x: x * x.mean().item(), HOST_READ),
        (lambda x: x + torch.ones(x.shape[-1]), MIXED_DEVICES),
    ],
)
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_planted_host_read_or_cpu_tensor_fails(part, plant, message):
    vq = small()
    vq.get_submodule(part).register_forward_hook(lambda module, inputs, output: plant(output))
    with pytest.raises((RuntimeError, DataDependentOutputException), match=message):
        round_trip(vq, torch.float32)
