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
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from core.config import parse_config, run_command
from core.data.images import image_to_pixels, pixels_to_images, random_crop
from core.data.loader import TrainingImages, training_batches
from core.data.open import open_images
from core.data.order import check_batch_size, local_positions
from core.data.skip_log import SkipLog
from core.distributed.parallel import ParallelConfig, no_sync, prepare
from core.distributed.preemption import Preemption
from core.distributed.world import DeviceName, Precision, World, distributed
from core.rng import seed_step
from core.training.checkpoint import Checkpointer
from core.training.ema import EMA
from core.training.memory_plan import check_fits, plan_model, print_plan
from core.training.optimizer import OptimizerConfig, Stepper, build_adamw, learning_rate
from core.training.run import ReportConfig, Run, begin_run
from core.weights import load_weights
from evaluations.metrics.lpips import LPIPS
from tokenizer.losses import (
    LossConfig,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    tokenizer_losses,
)
from tokenizer.models.config import VQConfig
from tokenizer.models.discriminator import DiscriminatorConfig, build_discriminator
from tokenizer.models.layers import ResnetBlock
from tokenizer.models.pretrained import load_tokenizer
from tokenizer.models.vq_model import VQModel
from tokenizer.validation import Totals, load_pictures, reconstruct


@dataclass(frozen=True)
class TrainConfig:
    """A training of the tokenizer.

    Args:
        data: Training images: a folder of class folders, a flat folder, or a list file.
        out: The run's folder.
        validation: Images to reconstruct while training; empty takes the training images.
        validation_images: How many of them, for PSNR; the first 16 are drawn.
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
        dry_run: Print the configuration, its size and memory without activations, and stop.
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
    dry_run: bool = False

    def __post_init__(self) -> None:
        if self.parallel.strategy != "ddp":
            raise ValueError("parallel.strategy: the tokenizer is small, it trains under ddp alone")
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


class Nets(NamedTuple):
    """The two players, each with its optimiser, and the judge of perception."""

    vq: VQModel
    discriminator: nn.Module
    parallel_vq: nn.Module  # the same parameters, wrapped for training
    parallel_discriminator: nn.Module
    ema: EMA[VQModel] | None
    stepper: Stepper
    discriminator_stepper: Stepper
    lpips: LPIPS | None


def build(config: TrainConfig, world: World) -> Nets:
    """Everything that learns, on world.device, with its initial weights."""
    lpips = LPIPS(config.loss.vgg_weights) if config.loss.perceptual_weight else None
    torch.manual_seed(config.seed)
    vq = VQModel(config.model)
    if config.init_from:
        start = load_tokenizer(config.init_from)
        load_weights(vq, start.vq.state_dict(), config.init_from)
    vq = vq.to(world.device)
    discriminator = build_discriminator(config.discriminator, config.image_size).to(world.device)
    ema = EMA(vq, config.ema_decay) if config.ema_decay else None
    # The optimisers name their parameters, so they come before the wrappers.
    optimizer = build_adamw(vq, config.optimizer)
    discriminator_optimizer = build_adamw(discriminator, config.discriminator_optimizer)
    # Recomputing a BatchNorm would count its batch twice; and the adaptive weight runs the
    # discriminator's backward pass twice, which compiled graphs refuse.
    plain = dataclasses.replace(config.parallel, activation_checkpointing="none", compile=False)
    return Nets(
        vq,
        discriminator,
        prepare(vq, config.parallel, world, config.precision, ResnetBlock),
        prepare(discriminator, plain, world, config.precision, nn.Module),
        ema,
        Stepper(optimizer, config.optimizer, world.device),
        Stepper(discriminator_optimizer, config.discriminator_optimizer, world.device),
        lpips.to(world.device) if lpips else None,
    )


def train(config: TrainConfig, world: World) -> None:
    """Train to num_steps, from the newest checkpoint in the run's folder."""
    check_batch_size(config.batch_size, config.gradient_accumulation, world)
    images_on_disk = open_images(config.data)
    pictures = load_pictures(
        config.validation or config.data, config.validation_images, config.image_size
    )
    with torch.device("meta"):
        players = nn.ModuleList(
            [VQModel(config.model), build_discriminator(config.discriminator, config.image_size)]
        )
    plan = plan_model(
        players,
        ResnetBlock,
        config.ema_decay > 0,
        0.0,
        len(images_on_disk),
        config.batch_size,
        config.num_steps,
    )
    if config.dry_run:
        print_plan(plan, config, config.parallel, world)
    check_fits(plan, config.parallel, world)
    if config.dry_run:
        return
    nets = build(config, world)
    averaged = nets.ema.model if nets.ema else nets.vq
    begin_run(config.out, world)
    checkpoints = Checkpointer(
        config.out / "checkpoints",
        config.model,
        world,
        config.report.keep_last,
        config.report.keep_every,
        model=nets.vq,
        ema=nets.ema.model if nets.ema else None,
        discriminator=nets.discriminator,
        optimizer=nets.stepper.optimizer,
        discriminator_optimizer=nets.discriminator_stepper.optimizer,
    )
    state = checkpoints.restore_latest()
    first_step, samples = state["step"], state.get("samples", 0)
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
    interruption = Preemption(world)

    for step in range(first_step, config.num_steps):
        # One optimizer step of the tokenizer and, from its start step, of the discriminator.
        run.begin_step(step)
        seed_step(config.seed, step, world.rank)
        adversarial = config.loss.adversarial_at(step)
        for i in range(config.gradient_accumulation):
            with run.waiting():
                pixels, skipped = next(batches)
            skips.add(skipped)
            images = pixels_to_images(pixels.to(world.device, non_blocking=True))
            with contextlib.ExitStack() as stack:
                if i + 1 < config.gradient_accumulation:
                    stack.enter_context(no_sync(nets.parallel_vq))
                    stack.enter_context(no_sync(nets.parallel_discriminator))
                losses, codes = accumulate(nets, images, config, world, adversarial)
            totals.add(losses, codes)
        checkpoints.wait_for_copy()
        totals.grad_norm = nets.stepper.step(step, config.num_steps)
        if adversarial:
            nets.discriminator_stepper.step(step, config.num_steps)
        if nets.ema:
            nets.ema.update(nets.vq)
        samples += config.batch_size
        run.progress(config.batch_size)

        # Once in a while: report, sample, save.
        done = step + 1
        if config.report.reports(done, config.num_steps):
            skipped_steps = nets.stepper.check() + nets.discriminator_stepper.check()
            metrics = totals.take()
            metrics["lr"] = learning_rate(step, config.optimizer, config.num_steps)
            metrics["epoch"] = samples / len(images_on_disk)
            if skipped_steps:
                metrics["skipped_steps"] = skipped_steps
            if skipped_pictures := sum(world.gather(len(skips))):
                metrics["skipped_pictures"] = skipped_pictures
            run.log(done, metrics)
        if config.report.samples(done, config.num_steps) and world.is_main:
            grid, scores = reconstruct(averaged, pictures, world)
            run.log(done, scores)
            run.draw(done, grid)
        stopping = interruption.requested() and done < config.num_steps
        if stopping or config.report.saves(done, config.num_steps):
            nets.stepper.check()
            nets.discriminator_stepper.check()
            checkpoints.save(done, samples=samples)
        if stopping:
            checkpoints.finish()
            interruption.leave(done)
    checkpoints.finish()
    run.finish()
    if world.is_main and skips:
        print(f"{skips.summary()}: {skips.path}")


def accumulate(
    nets: Nets, images: torch.Tensor, config: TrainConfig, world: World, adversarial: bool
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Add the gradients of one micro-batch (b, 3, H, W) -> what to show by name, and the codes."""
    shown = {}
    with world.autocast(config.precision):
        out = nets.parallel_vq(images)
        losses = tokenizer_losses(config.loss, images, out.images, out.losses, nets.lpips)
        if adversarial:
            game = generator_loss(frozen(nets.discriminator, out.images), config.loss.adversarial)
            weight = config.loss.adversarial_weight
            if config.loss.adaptive_weight:
                seen = losses["reconstruction"] + losses.get("perceptual", 0)
                balance = adaptive_weight(seen, game, nets.vq.decoder.conv_out.weight)
                shown["adaptive_weight"] = balance
                weight = weight * balance
            losses["generator"] = weight * game
    (torch.stack(list(losses.values())).sum() / config.gradient_accumulation).backward()
    if adversarial:
        with world.autocast(config.precision):
            real = nets.parallel_discriminator(images)
            fake = nets.parallel_discriminator(out.images.detach())
        judged = discriminator_loss(real, fake, config.loss.adversarial)
        (judged / config.gradient_accumulation).backward()
        shown["discriminator"] = judged
    return losses | shown, out.codes


def frozen(discriminator: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The logits of images, with gradients for the images and none for the discriminator."""
    discriminator.requires_grad_(False)
    logits = discriminator(images)
    discriminator.requires_grad_(True)
    return logits


def all_positions(first: int, config: TrainConfig, world: World) -> Iterator[np.ndarray]:
    """This rank's micro-batches of the endless order, from position `first` on."""
    while True:
        yield from local_positions(first, config.batch_size, config.gradient_accumulation, world)
        first += config.batch_size


def main() -> None:
    """Entry point."""
    config = parse_config(TrainConfig)
    with distributed(config.device, config.parallel.timeout_minutes) as world:
        train(config, world)


if __name__ == "__main__":
    run_command(main)
