"""The terms of the tokenizer's loss and their weights."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from evaluations.features.config import SemanticEncoderName


@dataclass(frozen=True)
class LeCamConfig:
    """LeCam regularisation.

    Args:
        weight: Weight in the discriminator's loss; 0 for none. Published: 0.05 (SEED), 0.001
            (1d-tokenizer, MaskBit).
        compare: logits regularises every logit and updates the running means before their use
            (SEED, XQ-GAN); means regularises the batch's mean logits and updates them after it
            (1d-tokenizer).
        decay: Decay of the running means, per micro-batch.
    """

    weight: float = 0.0
    compare: Literal["logits", "means"] = "logits"
    decay: float = 0.999

    def __post_init__(self) -> None:
        if self.weight < 0 or not 0 < self.decay < 1:
            raise ValueError("loss.lecam: weight must be >= 0, decay in (0, 1)")


@dataclass(frozen=True)
class DistillationConfig:
    """Semantic distillation.

    Args:
        weight: Weight of the loss; 0 for none. Published: 0.5.
        encoder: dinov2 (ViT-B/14, published), or efficientnet_lite0, whose weights come with
            requirements.txt.
        encoder_weights: For dinov2: timm's file; null for the Hub.
        expansion: Width of the projector's two hidden layers, over that of the features.
    """

    weight: float = 0.0
    encoder: SemanticEncoderName = "dinov2"
    encoder_weights: str | None = None
    expansion: int = 4

    def __post_init__(self) -> None:
        if self.weight < 0 or self.expansion < 1:
            raise ValueError("loss.distillation: weight must be >= 0, expansion >= 1")
        if self.encoder_weights and self.encoder != "dinov2":
            raise ValueError("loss.distillation.encoder_weights is for encoder dinov2")


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

    def adversarial_at(self, step: int) -> bool:
        """Whether the discriminator takes part in step `step`."""
        return self.adversarial_weight > 0 and step >= self.discriminator_start
