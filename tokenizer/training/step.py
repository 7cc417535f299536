"""The gradients of one micro-batch of tokenizer.train."""

import torch
from torch import nn

from core.distributed.world import World
from tokenizer.losses.distillation import distillation_loss
from tokenizer.losses.objective import (
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    seen_logits,
    tokenizer_losses,
)
from tokenizer.quantizers.perturbation import LatentPerturbation
from tokenizer.training.config import TrainConfig
from tokenizer.training.models import TrainingModels


def accumulate(
    models: TrainingModels,
    images: torch.Tensor,
    config: TrainConfig,
    world: World,
    adversarial: bool,
    perturbation: LatentPerturbation | None = None,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Add the gradients of one micro-batch (b, 3, H, W) -> losses by name, and the codes."""
    reported = {}
    with world.autocast(config.training.precision):
        out = models.parallel_vq(images, perturbation)
        losses = tokenizer_losses(config.loss, images, out.images, out.losses, models.perceptual)
        if models.distillation:
            grid = (out.features.shape[2], out.features.shape[3])
            projected = models.distillation.parallel_projector(out.features)
            distance = distillation_loss(projected, models.distillation.encoder(images, grid))
            losses["distillation"] = config.loss.distillation.weight * distance
        if adversarial:
            generator_term = generator_loss(
                seen_logits(config.loss, frozen(models.discriminator, out.images)),
                config.loss.generator_kind,
            )
            weight = config.loss.adversarial_weight
            if config.loss.adaptive_weight:
                seen = losses["reconstruction"] + losses.get("perceptual", 0)
                balance = adaptive_weight(seen, generator_term, models.vq.decoder.conv_out.weight)
                reported["adaptive_weight"] = balance
                weight = weight * balance
            losses["generator"] = weight * generator_term
    (torch.stack(list(losses.values())).sum() / config.training.gradient_accumulation).backward()
    if adversarial:
        with world.autocast(config.training.precision):
            real = models.parallel_discriminator(images)
            fake = models.parallel_discriminator(out.images.detach())
        discriminator_term = discriminator_loss(
            seen_logits(config.loss, real), seen_logits(config.loss, fake), config.loss.adversarial
        )
        if config.loss.scale_discriminator:
            discriminator_term = config.loss.adversarial_weight * discriminator_term
        if models.lecam:
            lecam = config.loss.lecam.weight * models.lecam(real, fake, world)
            discriminator_term = discriminator_term + lecam
            reported["lecam"] = lecam.detach()
        (discriminator_term / config.training.gradient_accumulation).backward()
        reported["discriminator"] = discriminator_term
    return losses | reported, out.codes


def frozen(discriminator: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Logits of `images`, with gradients for the images but not for the discriminator."""
    discriminator.requires_grad_(False)
    logits = discriminator(images)
    discriminator.requires_grad_(True)
    return logits
