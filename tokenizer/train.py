"""Train the tokenizer on images.

Run the same command again to continue: the result is the same bit for bit.

python -m tokenizer.train --config configs/tokenizer/vq16.yaml --data imagenet/train \
    --out runs/vq16
torchrun --nproc-per-node 8 -m tokenizer.train ...
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import nn

from core.config import parse_config, run_command
from core.data.images import image_to_pixels, pixels_to_images, random_crop
from core.data.loader import TrainingImages, training_batches
from core.data.open import Images, open_images
from core.data.order import check_batch_size, local_positions
from core.data.skip_log import SkipLog, Skipped
from core.distributed.parallel import no_sync
from core.distributed.world import World, distributed
from core.lock import writer_lock
from core.rng import seed_step
from core.training.memory_plan import Plan, approve, plan_model
from core.training.optimizer import learning_rate
from core.training.session import Session
from tokenizer.models.discriminator import build_discriminator
from tokenizer.models.layers import ResnetBlock
from tokenizer.models.vq_model import VQModel
from tokenizer.training.config import TrainConfig
from tokenizer.training.models import build_models
from tokenizer.training.step import accumulate
from tokenizer.training.validation import Totals, Validation, load_images


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
    check_batch_size(config.training.batch_size, config.training.gradient_accumulation, world)
    images_on_disk = open_images(config.data)
    pixels = load_images(
        config.validation or config.data, config.validation_images, config.image_size
    )
    plan = plan_training(config, len(images_on_disk))
    if not approve(plan, config, config.parallel, world, config.dry_run):
        return
    validation = Validation(pixels, config.metrics if config.rfid else None, world)
    models = build_models(config, world)
    trained = dataclasses.replace(config.model, image_size=config.image_size)
    session = Session(config, trained, world, models.checkpointed, unit="image")
    batches = open_batches(config, images_on_disk, world, session.samples)
    skips = SkipLog(config.out / f"skipped_rank{world.rank}.txt")
    totals = Totals(config.model.vocab_size, world)
    if session.step == 0 and session.evaluation_due:
        validation.evaluate(session, models.ema_vq)

    for step in session.steps():
        # One optimizer step of the tokenizer and, from its start step, of the discriminator.
        seed_step(config.training.seed, step, world.rank)
        adversarial = config.loss.adversarial_at(step)
        perturbation = config.perturbation.at(step)
        for i in range(config.training.gradient_accumulation):
            with session.waiting_for_data():
                pixels, skipped = next(batches)
            skips.add(skipped)
            images = pixels_to_images(pixels.to(world.device, non_blocking=True))
            with contextlib.ExitStack() as stack:
                if i + 1 < config.training.gradient_accumulation:
                    stack.enter_context(no_sync(models.parallel_vq))
                    stack.enter_context(no_sync(models.parallel_discriminator))
                    if models.distillation:
                        stack.enter_context(no_sync(models.distillation.parallel_projector))
                losses, codes = accumulate(models, images, config, world, adversarial, perturbation)
            totals.add(losses, codes)
        session.wait_for_copy()
        totals.grad_norm = models.stepper.step(step, config.training.num_steps)
        if adversarial:
            models.discriminator_stepper.step(step, config.training.num_steps)
        if models.distillation:
            models.distillation.stepper.step(step, config.training.num_steps)
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
            validation.evaluate(session, models.ema_vq)
        session.save_if_due(check=models.check, unused=unused_parts(config, session.step))
    session.finish()
    if world.is_main and skips:
        print(f"{skips.summary()}: {skips.path}")


def unused_parts(config: TrainConfig, steps: int) -> tuple[str, ...]:
    """Parts of a checkpoint after `steps` steps that still are as the configuration builds them."""
    if config.init_discriminator or (steps and config.loss.adversarial_at(steps - 1)):
        return ()
    return ("discriminator", "discriminator_optimizer")


def plan_training(config: TrainConfig, num_images: int) -> Plan:
    """The memory that the run needs, counted on models on the meta device; no activations."""
    with torch.device("meta"):
        discriminator = build_discriminator(config.discriminator, config.image_size)
        vq = VQModel(config.model)
    training = config.training
    return plan_model(
        nn.ModuleList([vq, discriminator]),
        ResnetBlock,
        vq if training.ema_decay is not None else None,
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
