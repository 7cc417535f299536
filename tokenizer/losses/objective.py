"""The tokenizer's objective: reconstruction, perception, and the adversarial game."""

import torch
from torch import nn
from torch.nn import functional as F

from evaluations.metrics.efficientnet_distance import EfficientNetDistance
from evaluations.metrics.lpips import LPIPS
from evaluations.metrics.perceptual import PerceptualDistance
from tokenizer.losses.config import AdversarialLoss, LossConfig


def seen_logits(config: LossConfig, logits: torch.Tensor) -> torch.Tensor:
    """Logits (b, ...) of a discriminator -> what the adversarial losses see."""
    return logits if config.logits == "patches" else logits.flatten(1).mean(1)


def build_perceptual(config: LossConfig) -> PerceptualDistance | None:
    """The perceptual distance with its weights on the CPU; None if its weight is 0."""
    if not config.perceptual_weight:
        return None
    match config.perceptual:
        case "lpips":
            return LPIPS(config.vgg_weights)
        case "efficientnet_lite0":
            return EfficientNetDistance()


def tokenizer_losses(
    config: LossConfig,
    images: torch.Tensor,
    reconstructions: torch.Tensor,
    quantizer_losses: dict[str, torch.Tensor],
    perceptual: nn.Module | None,
) -> dict[str, torch.Tensor]:
    """The weighted terms of the objective but for the adversarial one, scalars in float32.

    images and reconstructions: (b, 3, H, W) in about [-1, 1]. perceptual gives their distance (b,).
    """
    compare = F.mse_loss if config.reconstruction == "l2" else F.l1_loss
    pixel = compare(reconstructions.float(), images.float())
    losses = {"reconstruction": config.reconstruction_weight * pixel}
    if perceptual:
        distance = perceptual(images, reconstructions).mean()
        losses["perceptual"] = config.perceptual_weight * distance
    for name, value in quantizer_losses.items():
        losses[name] = config.codebook_weight * value
    return losses


def generator_loss(fake_logits: torch.Tensor, kind: AdversarialLoss) -> torch.Tensor:
    """What the tokenizer minimises, from the discriminator's logits of its reconstructions.

    hinge and vanilla use -mean D(x), as the reference; non_saturating -mean log sigmoid(D(x)).
    """
    if kind == "non_saturating":
        return F.softplus(-fake_logits.float()).mean()
    return -fake_logits.float().mean()


def discriminator_loss(
    real_logits: torch.Tensor, fake_logits: torch.Tensor, kind: AdversarialLoss
) -> torch.Tensor:
    """What the discriminator minimises, from its logits of originals and reconstructions.

    vanilla and non_saturating are both cross-entropy: they differ in the generator's loss.
    """
    real, fake = real_logits.float(), fake_logits.float()
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def adaptive_weight(
    reconstruction: torch.Tensor, adversarial: torch.Tensor, last_layer: torch.Tensor
) -> torch.Tensor:
    """||d reconstruction|| / (||d adversarial|| + 1e-4) at `last_layer`, in [0, 1e4], detached.

    Esser et al. 2021, equation 7.
    """
    wanted = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)[0]
    found = torch.autograd.grad(adversarial, last_layer, retain_graph=True)[0]
    return (wanted.norm() / (found.norm() + 1e-4)).clamp(0.0, 1e4).detach()
