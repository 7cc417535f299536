"""Train the tokenizer on images.

Run the same command again to continue: the result is the same bit for bit.

python -m tokenizer.train --config configs/tokenizer/vq16.yaml --data imagenet/train \
    --out runs/vq16
torchrun --nproc-per-node 8 -m tokenizer.train ...
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from core.config import parse_config, run_command
from core.data.images import check_image_size, image_to_pixels, pixels_to_images, random_crop
from core.data.loader import TrainingImages, check_num_workers, training_batches
from core.data.open import Images, open_images
from core.data.order import check_batch_size, local_positions
from core.data.skip_log import SkipLog, Skipped
from core.distributed.parallel import ParallelConfig, no_sync, prepare
from core.distributed.world import World, distributed
from core.lock import writer_lock
from core.rng import seed_step
from core.training.config import TrainingConfig
from core.training.ema import EMA
from core.training.memory_plan import Plan, approve, plan_model
from core.training.optimizer import OptimizerConfig, Stepper, build_adamw, learning_rate
from core.training.run import ReportConfig
from core.training.session import Session
from core.weights import find_weights, load_weights
from evaluations.metrics.perceptual import PerceptualDistance
from tokenizer.losses import (
    LossConfig,
    adaptive_weight,
    build_perceptual,
    discriminator_loss,
    generator_loss,
    tokenizer_losses,
)
from tokenizer.models.config import VQConfig
from tokenizer.models.discriminator import DiscriminatorConfig, build_discriminator
from tokenizer.models.layers import ResnetBlock
from tokenizer.models.pretrained import load_tokenizer
from tokenizer.models.released_layouts import read_discriminator
from tokenizer.models.vq_model import VQModel
from tokenizer.validation import Totals, load_images, reconstruct


@dataclass(frozen=True)
class TrainConfig:
    """A training run of the tokenizer.

    Args:
        data: Training images: a folder of class folders, a flat folder, or a list file.
        out: The run's folder.
        validation: Images to reconstruct during training; null for the training images.
        validation_images: How many of them to use for PSNR; the first 16 are drawn.
        image_size: Height and width of the crops.
        crop_scale: Smallest random crop, as a fraction of the resized short side.
        init_from: Start from these weights (a file, folder or Hub id) with fresh optimizers; null
            for random weights.
        init_discriminator: Start the discriminator from these weights: a released training file, a
            released name, or training/discriminator.safetensors of a checkpoint; null for random
            weights.
        training: Length, batch size, precision and seed. With bf16, the nearest-code search stays
            in float32.
        model: Shape of the tokenizer.
        discriminator: Shape of the discriminator.
        loss: The terms of the loss and their weights.
        optimizer: The tokenizer's optimizer.
        discriminator_optimizer: The discriminator's optimizer.
        parallel: Compile and activation checkpointing.
        report: How often to report, evaluate and save.
        num_workers: Data loader processes per rank.
        dry_run: Print the configuration, its size and memory without activations, and stop.
    """

    data: Path
    out: Path
    validation: Path | None = None
    validation_images: int = 256
    image_size: tuple[int, int] = (256, 256)
    crop_scale: float = 0.8
    init_from: str | None = None
    init_discriminator: str | None = None
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(400360, 128))
    model: VQConfig = field(default_factory=VQConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    discriminator_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    num_workers: int = 8
    dry_run: bool = False

    def __post_init__(self) -> None:
        if self.parallel.strategy != "ddp":
            raise ValueError("parallel.strategy: the tokenizer trains only under ddp")
        check_image_size(*self.image_size)
        check_num_workers(self.num_workers)
        if self.validation_images < 1:
            raise ValueError("validation_images must be >= 1")
        if not 0 < self.crop_scale <= 1:
            raise ValueError("crop_scale must be in (0, 1]")
        if any(side < 1 or side % self.model.downsample for side in self.image_size):
            raise ValueError(
                f"image_size {self.image_size} must be divisible by {self.model.downsample}"
            )


@dataclass(frozen=True)
class RandomCrop:
    """A training crop as pixels (height, width, 3) uint8."""

    height: int
    width: int
    scale: float

    def __call__(self, image: Image.Image, random: np.random.Generator) -> np.ndarray:
        """Crop and flip with `random`."""
        return image_to_pixels(random_crop(image, self.height, self.width, random, self.scale))


class TrainingModels(NamedTuple):
    """Generator (VQ model) and discriminator with their optimizers, the EMA, and the perceptual
    distance.
    """

    vq: VQModel
    discriminator: nn.Module
    parallel_vq: nn.Module  # the same parameters, wrapped for training
    parallel_discriminator: nn.Module
    ema: EMA[VQModel] | None
    stepper: Stepper
    discriminator_stepper: Stepper
    perceptual: PerceptualDistance | None

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
        }

    def check(self) -> int:
        """The number of steps skipped by both optimizers; see Stepper.check."""
        return self.stepper.check() + self.discriminator_stepper.check()


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
    )


def train(config: TrainConfig, world: World) -> None:
    """Train to num_steps, from the newest checkpoint in the run's folder."""
    check_batch_size(config.training.batch_size, config.training.gradient_accumulation, world)
    images_on_disk = open_images(config.data)
    validation = load_images(
        config.validation or config.data, config.validation_images, config.image_size
    )
    plan = plan_training(config, len(images_on_disk))
    if not approve(plan, config, config.parallel, world, config.dry_run):
        return
    models = build_models(config, world)
    session = Session(config, config.model, world, models.checkpointed, unit="image")
    batches = open_batches(config, images_on_disk, world, session.samples)
    skips = SkipLog(config.out / f"skipped_rank{world.rank}.txt")
    totals = Totals(config.model.vocab_size, world)
    if session.step == 0 and session.evaluation_due:
        evaluate(session, models.ema_vq, validation)

    for step in session.steps():
        # One optimizer step of the tokenizer and, from its start step, of the discriminator.
        seed_step(config.training.seed, step, world.rank)
        adversarial = config.loss.adversarial_at(step)
        for i in range(config.training.gradient_accumulation):
            with session.waiting_for_data():
                pixels, skipped = next(batches)
            skips.add(skipped)
            images = pixels_to_images(pixels.to(world.device, non_blocking=True))
            with contextlib.ExitStack() as stack:
                if i + 1 < config.training.gradient_accumulation:
                    stack.enter_context(no_sync(models.parallel_vq))
                    stack.enter_context(no_sync(models.parallel_discriminator))
                losses, codes = accumulate(models, images, config, world, adversarial)
            totals.add(losses, codes)
        session.wait_for_copy()
        totals.grad_norm = models.stepper.step(step, config.training.num_steps)
        if adversarial:
            models.discriminator_stepper.step(step, config.training.num_steps)
        if models.ema:
            models.ema.update(models.vq)
        session.advance(config.training.batch_size)

        # At intervals: report, evaluate, save.
        if session.report_due:
            skipped_steps = models.check()
            metrics = totals.take()
            metrics["lr"] = learning_rate(step, config.optimizer, config.training.num_steps)
            metrics["epoch"] = session.samples / len(images_on_disk)
            if skipped_steps:
                metrics["skipped_steps"] = skipped_steps
            if skipped_images := sum(world.gather(len(skips))):
                metrics["skipped_images"] = skipped_images
            session.log(metrics)
        if session.evaluation_due:
            evaluate(session, models.ema_vq, validation)
        session.save_if_due(check=models.check)
    session.finish()
    if world.is_main and skips:
        print(f"{skips.summary()}: {skips.path}")


def evaluate(session: Session, vq: VQModel, validation: torch.Tensor) -> None:
    """Report the PSNR of the validation images and draw them; only rank 0 does so."""
    if session.world.is_main:
        grid, scores = reconstruct(vq, validation, session.world)
        session.log(scores)
        session.draw(grid)


def plan_training(config: TrainConfig, num_images: int) -> Plan:
    """The memory that the run needs, counted on models on the meta device; no activations."""
    with torch.device("meta"):
        discriminator = build_discriminator(config.discriminator, config.image_size)
        both = nn.ModuleList([VQModel(config.model), discriminator])
    training = config.training
    return plan_model(
        both,
        ResnetBlock,
        training.ema_decay is not None,
        0.0,
        num_images,
        training.batch_size,
        training.num_steps,
    )


def open_batches(
    config: TrainConfig, images: Images, world: World, samples: int
) -> Iterator[tuple[torch.Tensor, list[Skipped]]]:
    """This rank's micro-batches of training crops, after `samples` samples."""
    crop = RandomCrop(*config.image_size, config.crop_scale)
    return training_batches(
        TrainingImages(images, crop, config.training.seed),
        all_positions(samples, config, world),
        config.num_workers,
        pin_memory=world.device.type == "cuda",
    )


def accumulate(
    models: TrainingModels,
    images: torch.Tensor,
    config: TrainConfig,
    world: World,
    adversarial: bool,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Add the gradients of one micro-batch (b, 3, H, W) -> losses by name, and the codes."""
    reported = {}
    with world.autocast(config.training.precision):
        out = models.parallel_vq(images)
        losses = tokenizer_losses(config.loss, images, out.images, out.losses, models.perceptual)
        if adversarial:
            generator_term = generator_loss(
                frozen(models.discriminator, out.images), config.loss.generator_kind
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
        discriminator_term = discriminator_loss(real, fake, config.loss.adversarial)
        if config.loss.scale_discriminator:
            discriminator_term = config.loss.adversarial_weight * discriminator_term
        (discriminator_term / config.training.gradient_accumulation).backward()
        reported["discriminator"] = discriminator_term
    return losses | reported, out.codes


def frozen(discriminator: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Logits of `images`, with gradients for the images but not for the discriminator."""
    discriminator.requires_grad_(False)
    logits = discriminator(images)
    discriminator.requires_grad_(True)
    return logits


def all_positions(first: int, config: TrainConfig, world: World) -> Iterator[np.ndarray]:
    """This rank's micro-batches of the endless order, from position `first` on."""
    while True:
        yield from local_positions(
            first, config.training.batch_size, config.training.gradient_accumulation, world
        )
        first += config.training.batch_size


def main() -> None:
    """Entry point."""
    config = parse_config(TrainConfig)
    with (
        distributed(config.training.device, config.parallel.timeout_minutes) as world,
        writer_lock(config.out, world, needed=not config.dry_run),
    ):
        train(config, world)


if __name__ == "__main__":
    run_command(main)
