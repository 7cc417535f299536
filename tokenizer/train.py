"""Train the tokenizer on images; run it again and it continues, bit for bit.

python -m tokenizer.train --config configs/tokenizer/vq16.yaml --data imagenet/train \
    --out runs/vq16
torchrun --nproc-per-node 8 -m tokenizer.train ...
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from core.checkpoint import Checkpointer
from core.config import parse_config, run_command
from core.datasets import (
    SkipLog,
    TrainingImages,
    check_batch_size,
    find_images,
    local_positions,
    training_batches,
)
from core.distributed import DeviceName, Precision, World, distributed
from core.ema import EMA
from core.images import (
    image_to_pixels,
    pixels_to_images,
    random_crop,
)
from core.optim import OptimizerConfig, Stepper, build_adamw, learning_rate
from core.parallel import ParallelConfig, no_sync, prepare
from core.randomness import seed_step
from core.run import ReportConfig, Run, begin_run
from core.weights import load_weights
from evaluations.lpips import LPIPS
from tokenizer.discriminator import DiscriminatorConfig, build_discriminator
from tokenizer.losses import (
    LossConfig,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    reconstruction_loss,
)
from tokenizer.model import ResnetBlock, VQConfig, VQModel
from tokenizer.monitoring import Totals, load_pictures, reconstruct
from tokenizer.pretrained import load_tokenizer


@dataclass(frozen=True)
class TrainConfig:
    """A training of the tokenizer.

    Args:
        data: Training images: a folder of class folders, a flat folder, or a list file.
        out: The run's folder.
        validation: Images to reconstruct while training; empty takes the training images.
        validation_images: How many of them, for PSNR and usage; the first 16 are drawn.
        image_size: Height and width of the crops.
        crop_scale: The least share of the resized short side that a random crop keeps.
        init_from: Start from these weights (a file, folder or Hub id) with fresh optimisers.
        model: The tokenizer's shape.
        discriminator: The discriminator's shape.
        loss: Weights of the objective.
        optimizer: The tokenizer's optimiser.
        discriminator_optimizer: The discriminator's optimiser.
        parallel: Compile and activation checkpointing.
        report: How often to report, sample and save.
        num_steps: Optimizer steps.
        batch_size: Images per optimizer step, over all processes and accumulation steps.
        gradient_accumulation: Micro-batches per optimizer step.
        ema_decay: Decay of the averaged weights; 0 for none.
        precision: bf16 autocast (the code search stays in float32), or fp32.
        seed: Decides the initial weights, the data order and the crops.
        num_workers: Loader processes per rank.
        device: auto, cpu, cuda or mps.
    """

    data: Path
    out: Path
    validation: Path | None = None
    validation_images: int = 256
    image_size: tuple[int, int] = (256, 256)
    crop_scale: float = 0.8
    init_from: str = ""
    model: VQConfig = field(default_factory=VQConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    discriminator_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    num_steps: int = 400360
    batch_size: int = 128
    gradient_accumulation: int = 1
    ema_decay: float = 0.0
    precision: Precision = "bf16"
    seed: int = 0
    num_workers: int = 8
    device: DeviceName = "auto"

    def __post_init__(self) -> None:
        if min(self.num_steps, self.gradient_accumulation, self.validation_images) < 1:
            raise ValueError("num_steps, gradient_accumulation, validation_images must be >= 1")
        if not 0 < self.crop_scale <= 1 or not 0 <= self.ema_decay < 1:
            raise ValueError("crop_scale must be in (0, 1], ema_decay in [0, 1)")
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


def train(config: TrainConfig, world: World) -> None:
    """Train to num_steps, from the newest checkpoint in the run's folder."""
    check_batch_size(config.batch_size, config.gradient_accumulation, world)
    images_on_disk = find_images(config.data)
    lpips = None
    if config.loss.perceptual_weight:
        lpips = LPIPS(config.loss.vgg_weights).to(world.device)
    pictures = load_pictures(
        config.validation or config.data, config.validation_images, config.image_size
    )
    torch.manual_seed(config.seed)
    vq = VQModel(config.model)
    if config.init_from:
        start = load_tokenizer(config.init_from)
        load_weights(vq, start.vq.state_dict(), config.init_from)
    vq = vq.to(world.device)
    discriminator = build_discriminator(config.discriminator, config.image_size).to(world.device)
    begin_run(config.out, world)
    ema = EMA(vq, config.ema_decay) if config.ema_decay else None
    optimizer = build_adamw(vq, config.optimizer)
    stepper = Stepper(optimizer, config.optimizer, world.device)
    discriminator_optimizer = build_adamw(discriminator, config.discriminator_optimizer)
    discriminator_stepper = Stepper(
        discriminator_optimizer, config.discriminator_optimizer, world.device
    )
    checkpoints = Checkpointer(
        config.out / "checkpoints",
        config.model,
        world,
        config.report.keep_last,
        model=vq,
        ema=ema.model if ema else None,
        discriminator=discriminator,
        optimizer=optimizer,
        discriminator_optimizer=discriminator_optimizer,
    )
    state = checkpoints.restore_latest()
    first_step, samples = state["step"], state.get("samples", 0)
    parallel_vq = prepare(vq, config.parallel, world, ResnetBlock)
    # Recomputing a BatchNorm would count its batch twice.
    unchecked = dataclasses.replace(config.parallel, activation_checkpointing="none")
    parallel_discriminator = prepare(discriminator, unchecked, world, nn.Module)
    crop = RandomCrop(*config.image_size, config.crop_scale)
    batches = training_batches(
        TrainingImages(images_on_disk, crop, config.seed),
        all_positions(samples, config, world),
        config.num_workers,
        pin_memory=world.device.type == "cuda",
    )
    skips = SkipLog(config.out / f"skipped_rank{world.rank}.txt")
    run = Run(config.out, config, config.report, world)
    run.start(first_step, config.num_steps, "image")
    totals = Totals(config.model.vocab_size, world)

    for step in range(first_step, config.num_steps):
        # One optimizer step of the tokenizer and, from its start step, of the discriminator.
        seed_step(config.seed, step, world.rank)
        adversarial = config.loss.adversarial_at(step)
        for i in range(config.gradient_accumulation):
            pixels, skipped = next(batches)
            skips.add(skipped)
            images = pixels_to_images(pixels.to(world.device, non_blocking=True))
            accumulating = i + 1 < config.gradient_accumulation
            with contextlib.ExitStack() as stack:
                if accumulating:
                    stack.enter_context(no_sync(parallel_vq))
                    stack.enter_context(no_sync(parallel_discriminator))
                with world.autocast(config.precision):
                    out = parallel_vq(images)
                    losses = tokenizer_losses(config.loss, images, out.images, out.losses, lpips)
                    if adversarial:
                        game = game_loss(config.loss, discriminator, vq, out.images, losses)
                        losses["generator"] = game
                total = torch.stack(list(losses.values())).sum()
                (total / config.gradient_accumulation).backward()
                if adversarial:
                    with world.autocast(config.precision):
                        real = parallel_discriminator(images)
                        fake = parallel_discriminator(out.images.detach())
                    judged = discriminator_loss(real, fake, config.loss.adversarial)
                    (judged / config.gradient_accumulation).backward()
                    losses["discriminator"] = judged
            totals.add(losses, out.codes)
        totals.grad_norm = stepper.step(step, config.num_steps)
        if adversarial:
            discriminator_stepper.step(step, config.num_steps)
        if ema:
            ema.update(vq)
        samples += config.batch_size
        run.progress(config.batch_size)

        # Once in a while: report, sample, save.
        done = step + 1
        if config.report.reports(done, config.num_steps):
            skipped_steps = stepper.check() + discriminator_stepper.check()
            metrics = totals.take()
            metrics["lr"] = learning_rate(step, config.optimizer, config.num_steps)
            metrics["epoch"] = samples / len(images_on_disk)
            if skipped_steps:
                metrics["skipped_steps"] = skipped_steps
            if skipped_pictures := sum(world.gather(len(skips))):
                metrics["skipped_pictures"] = skipped_pictures
            run.log(done, metrics)
        if config.report.samples(done, config.num_steps) and world.is_main:
            grid, scores = reconstruct(ema.model if ema else vq, pictures, world)
            run.log(done, scores)
            run.draw(done, grid)
        if config.report.saves(done, config.num_steps):
            stepper.check()
            discriminator_stepper.check()
            checkpoints.save(done, samples=samples)
    run.finish()
    if world.is_main and skips:
        print(f"{skips.summary()}: {skips.path}")


def all_positions(first: int, config: TrainConfig, world: World) -> Iterator[np.ndarray]:
    """This rank's micro-batches of the endless order, from position `first` on."""
    while True:
        yield from local_positions(first, config.batch_size, config.gradient_accumulation, world)
        first += config.batch_size


def game_loss(
    config: LossConfig,
    discriminator: nn.Module,
    vq: VQModel,
    reconstructions: torch.Tensor,
    losses: dict[str, torch.Tensor],
) -> torch.Tensor:
    """The weighted adversarial loss of the tokenizer; the discriminator gets no gradient."""
    discriminator.requires_grad_(False)
    game = generator_loss(discriminator(reconstructions), config.adversarial)
    discriminator.requires_grad_(True)
    if not config.adaptive_weight:
        return config.adversarial_weight * game
    seen = losses["reconstruction"] + losses.get("perceptual", 0)
    weight = adaptive_weight(seen, game, vq.decoder.conv_out.weight)
    return config.adversarial_weight * weight * game


def tokenizer_losses(
    config: LossConfig,
    images: torch.Tensor,
    reconstructions: torch.Tensor,
    quantizer_losses: dict[str, torch.Tensor],
    lpips: LPIPS | None,
) -> dict[str, torch.Tensor]:
    """The weighted terms of the objective but for the adversarial one, scalars in float32."""
    pixel = reconstruction_loss(reconstructions, images, config.reconstruction)
    losses = {"reconstruction": config.reconstruction_weight * pixel}
    if lpips:
        losses["perceptual"] = config.perceptual_weight * lpips(images, reconstructions).mean()
    for name, value in quantizer_losses.items():
        losses[name] = config.codebook_weight * value
    return losses


def main() -> None:
    """Entry point."""
    config = parse_config(TrainConfig)
    with distributed(config.device) as world:
        train(config, world)


if __name__ == "__main__":
    run_command(main)
