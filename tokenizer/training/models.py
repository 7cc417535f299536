"""The models of a training run of the tokenizer, with their optimizers."""

import dataclasses
from typing import NamedTuple

import torch
from torch import nn

from core.distributed.parallel import prepare
from core.distributed.world import World
from core.training.ema import EMA
from core.training.optimizer import Stepper, build_adamw
from core.weights import find_weights, load_weights
from evaluations.features.semantic import SemanticEncoder
from evaluations.metrics.perceptual import PerceptualDistance
from tokenizer.losses.distillation import Projector, build_encoder
from tokenizer.losses.lecam import LeCam
from tokenizer.losses.objective import build_perceptual
from tokenizer.models.discriminator import build_discriminator
from tokenizer.models.layers import ResnetBlock
from tokenizer.models.pretrained import load_tokenizer
from tokenizer.models.released_layouts import read_discriminator
from tokenizer.models.vq_model import VQModel
from tokenizer.training.config import TrainConfig


class Distillation(NamedTuple):
    """The frozen encoder, and the projector with its optimizer."""

    encoder: SemanticEncoder
    projector: Projector
    parallel_projector: nn.Module  # the same parameters, wrapped for training
    stepper: Stepper


class TrainingModels(NamedTuple):
    """Generator (VQ model) and discriminator with their optimizers, and the parts of the loss."""

    vq: VQModel
    discriminator: nn.Module
    parallel_vq: nn.Module  # the same parameters, wrapped for training
    parallel_discriminator: nn.Module
    ema: EMA[VQModel] | None
    stepper: Stepper
    discriminator_stepper: Stepper
    perceptual: PerceptualDistance | None
    lecam: LeCam | None
    distillation: Distillation | None

    @property
    def ema_vq(self) -> VQModel:
        """The model to validate: the EMA, or the VQ model itself without EMA."""
        return self.ema.model if self.ema else self.vq

    @property
    def checkpointed(self) -> dict[str, nn.Module | torch.optim.Optimizer | None]:
        """The parts of a checkpoint."""
        return {
            "model": self.vq,
            "ema": self.ema.model if self.ema else None,
            "discriminator": self.discriminator,
            "optimizer": self.stepper.optimizer,
            "discriminator_optimizer": self.discriminator_stepper.optimizer,
            "lecam": self.lecam,
            "projector": self.distillation.projector if self.distillation else None,
            "projector_optimizer": self.distillation.stepper.optimizer
            if self.distillation
            else None,
        }

    def check(self) -> int:
        """The number of steps skipped by the optimizers; see Stepper.check."""
        return sum(stepper.check() for stepper in self.steppers)

    @property
    def steppers(self) -> list[Stepper]:
        """All optimizers."""
        more = [self.distillation.stepper] if self.distillation else []
        return [self.stepper, self.discriminator_stepper, *more]


def build_models(config: TrainConfig, world: World) -> TrainingModels:
    """Build the models on world.device with their initial weights, and the optimizers."""
    perceptual = build_perceptual(config.loss)
    torch.manual_seed(config.training.seed)
    vq = VQModel(config.model)
    if config.init_from:
        start = load_tokenizer(config.init_from)
        load_weights(vq, start.vq.state_dict(), config.init_from)
    vq = vq.to(world.device)
    discriminator = build_discriminator(config.discriminator, config.image_size)
    if config.init_discriminator:
        path = find_weights(config.init_discriminator, "model.safetensors")
        load_weights(discriminator, read_discriminator(path), path)
    discriminator = discriminator.to(world.device)
    ema = EMA(vq, decay) if (decay := config.training.ema_decay) is not None else None
    # The optimizers name their parameters, so they come before the wrappers.
    optimizer = build_adamw(vq, config.optimizer)
    discriminator_optimizer = build_adamw(discriminator, config.discriminator_optimizer)
    # Recomputing a BatchNorm would count its batch twice; and the adaptive weight runs the
    # discriminator's backward pass twice, which compiled graphs refuse.
    plain = dataclasses.replace(config.parallel, activation_checkpointing="none", compile=False)
    return TrainingModels(
        vq,
        discriminator,
        prepare(vq, config.parallel, world, config.training.precision, ResnetBlock),
        prepare(discriminator, plain, world, config.training.precision, nn.Module),
        ema,
        Stepper(optimizer, config.optimizer, world.device),
        Stepper(discriminator_optimizer, config.discriminator_optimizer, world.device),
        perceptual.to(world.device) if perceptual else None,
        LeCam(config.loss.lecam).to(world.device) if config.loss.lecam.weight else None,
        build_distillation(config, world) if config.loss.distillation.weight else None,
    )


def build_distillation(config: TrainConfig, world: World) -> Distillation:
    """The parts of semantic distillation on world.device."""
    options = config.loss.distillation
    encoder = build_encoder(options, world.device)
    projector = Projector(config.model.widths[-1], encoder.dim, options.expansion).to(world.device)
    optimizer = build_adamw(projector, config.optimizer)
    plain = dataclasses.replace(config.parallel, activation_checkpointing="none", compile=False)
    return Distillation(
        encoder,
        projector,
        prepare(projector, plain, world, config.training.precision, nn.Module),
        Stepper(optimizer, config.optimizer, world.device),
    )
