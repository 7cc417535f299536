"""The tokenizer's objective: reconstruction, perception, and the adversarial game."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from evaluations.metrics.efficientnet_distance import EfficientNetDistance
from evaluations.metrics.lpips import LPIPS
from evaluations.metrics.perceptual import PerceptualDistance
from tokenizer.losses.distillation import DistillationConfig
from tokenizer.losses.lecam import LeCamConfig

AdversarialLoss = Literal["hinge", "vanilla", "non_saturating"]
GeneratorLoss = Literal["hinge", "non_saturating"]
Perceptual = Literal["lpips", "efficientnet_lite0"]


@dataclass(frozen=True)
class LossConfig:
    """Weights of the objective (LlamaGen, section 2.1).

    Args:
        reconstruction: l2 or l1.
        reconstruction_weight: Weight of the pixel loss.
        perceptual: lpips, or the distance of EfficientNet-lite0's features, whose weights come with
            requirements.txt.
        perceptual_weight: Weight of the perceptual distance; 0 goes without, and needs no weights.
        vgg_weights: For lpips: torchvision's vgg16-397923af.pth; null for torchvision's cache or a
            download.
        adversarial: The discriminator's loss.
        generator: The generator's adversarial loss; null to follow `adversarial` (hinge for
            vanilla). The reference's default is hinge whatever the discriminator's loss is.
        logits: What the adversarial losses see: the logit of every patch, or the mean logit of each
            image, as SEED's non-saturating loss.
        adversarial_weight: Weight of the generator's adversarial loss.
        scale_discriminator: Also multiply the discriminator's loss by adversarial_weight, as the
            reference does. Adam hardly sees the scale; gradient clipping and the logged loss do.
        adaptive_weight: Also scale it by the ratio of gradients at the decoder's last layer.
        discriminator_start: Optimizer step, counted from 0, from which the discriminator exists at
            all. The reference counts from 1, so that its discriminator starts one step earlier.
        codebook_weight: Weight of the quantiser's losses.
        lecam: LeCam regularisation of the discriminator.
        distillation: Semantic distillation of the decoder's features.
    """

    reconstruction: Literal["l2", "l1"] = "l2"
    reconstruction_weight: float = 1.0
    perceptual: Perceptual = "lpips"
    perceptual_weight: float = 1.0
    vgg_weights: Path | None = None
    adversarial: AdversarialLoss = "hinge"
    generator: GeneratorLoss | None = None
    logits: Literal["patches", "image_means"] = "patches"
    adversarial_weight: float = 0.5
    scale_discriminator: bool = False
    adaptive_weight: bool = False
    discriminator_start: int = 20000
    codebook_weight: float = 1.0
    lecam: LeCamConfig = field(default_factory=LeCamConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)

    def __post_init__(self) -> None:
        for name in ("reconstruction_weight", "perceptual_weight", "adversarial_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"loss.{name} is {getattr(self, name)}, must be >= 0")
        if self.discriminator_start < 0 or self.codebook_weight < 0:
            raise ValueError("loss.discriminator_start and loss.codebook_weight must be >= 0")
        if self.vgg_weights and self.perceptual != "lpips":
            raise ValueError("loss.vgg_weights is for loss.perceptual lpips; leave it null")
        if self.lecam.weight and not self.adversarial_weight:
            raise ValueError("loss.lecam needs a discriminator: loss.adversarial_weight > 0")
        for name in ("lecam", "distillation"):
            part = getattr(self, name)
            if not part.weight and part != type(part)():
                raise ValueError(f"loss.{name}: these options need loss.{name}.weight > 0")

    @property
    def generator_kind(self) -> AdversarialLoss:
        """The generator's adversarial loss."""
        return self.generator or self.adversarial

    def seen(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (b, ...) of a discriminator -> what the adversarial losses see."""
        return logits if self.logits == "patches" else logits.flatten(1).mean(1)

    def adversarial_at(self, step: int) -> bool:
        """Whether the discriminator takes part in step `step`."""
        return self.adversarial_weight > 0 and step >= self.discriminator_start


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
