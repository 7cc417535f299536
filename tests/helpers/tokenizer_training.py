"""Short training runs of the tokenizer: images, flags, and the command in this process."""

from pathlib import Path

import numpy as np
from PIL import Image

from core.config import parse_config
from core.distributed.world import World
from tokenizer.train import TrainConfig, train

STEPS = 8
MODEL = ("--model.base_channels", 32, "--model.channel_multipliers", "[1,1]")
SMALL = (*MODEL, "--model.num_res_blocks", 1, "--model.z_channels", 16, "--model.vocab_size", 32)


def write_images(folder: Path, count: int = 12) -> Path:
    """Write images of 24 x 20 pixels in three class folders -> the folder."""
    random = np.random.default_rng(0)
    for i in range(count):
        path = folder / f"class{i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = random.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        Image.fromarray(small).resize((24, 20), Image.Resampling.BICUBIC).save(path)
    return folder


def flags(data: Path, out: Path, *more: object) -> list[object]:
    """Flags of tokenizer.train for a tiny model and 8 steps, reported and saved often."""
    common = ("--data", data, "--out", out, "--image_size", "[16,16]", "--num_workers", 0)
    run = (
        "--training.device",
        "cpu",
        "--training.precision",
        "fp32",
        "--training.num_steps",
        STEPS,
        "--training.batch_size",
        4,
    )
    often = ("--report.report_every", 1, "--report.save_every", 2, "--validation_images", 4)
    return [*common, *run, *often, "--loss.perceptual_weight", 0, *SMALL, *more]


def train_here(arguments: list[object], world: World) -> None:
    """As the command does, in this process."""
    train(parse_config(TrainConfig, [str(argument) for argument in arguments]), world)
