r"""Quantizers side by side: a small tokenizer, equal steps and data, mean and range over seeds.

    python -m benchmarks.quantizers --data scenes64/train --validation scenes64/val \
        --out runs/quantizers

Run it again to continue: finished runs are kept in results.json, from which table.md and
scores.png are made.
"""

from dataclasses import dataclass
from pathlib import Path

from core.config import parse_config, parse_first, run_command
from core.distributed.config import DeviceName, Precision


@dataclass(frozen=True)
class QuantizersConfig:
    """Which images, and how long each run is.

    Args:
        data: Training images: a folder of class folders, a flat folder, or a list file.
        validation: Images that are reconstructed for the scores.
        out: A folder for the runs, results.json, table.md and scores.png.
        validation_images: How many of them. A Frechet distance depends on this number.
        image_size: Height and width of the crops, divisible by 8.
        seeds: Runs per quantizer.
        num_steps: Optimizer steps of a run.
        batch_size: Images per step.
        precision: bf16 or fp32. On CPUs fp32 is faster, because of GroupNorm's backward pass.
        device: auto, cpu, cuda or mps.
    """

    data: Path
    validation: Path
    out: Path
    validation_images: int = 240
    image_size: tuple[int, int] = (64, 64)
    seeds: int = 3
    num_steps: int = 120
    batch_size: int = 4
    precision: Precision = "fp32"
    device: DeviceName = "auto"

    def __post_init__(self) -> None:
        if min(self.seeds, self.num_steps, self.batch_size) < 1 or self.validation_images < 2:
            raise ValueError("seeds, num_steps and batch_size must be >= 1, validation_images >= 2")


parse_first(QuantizersConfig, __name__)

import dataclasses
import time

import torch

from benchmarks.support.evidence import Results
from core.data.images import pixels_to_images
from core.distributed.world import World, distributed
from core.lock import writer_lock
from core.training.config import OptimizerConfig, ReportConfig, TrainingConfig
from evaluations.features.config import ExtractorConfig
from tokenizer.losses.config import LossConfig
from tokenizer.models.config import VQConfig
from tokenizer.models.pretrained import load_tokenizer
from tokenizer.models.vq_model import VQModel
from tokenizer.quantizers.config import FiniteScalarOptions
from tokenizer.quantizers.usage import CodebookUsage
from tokenizer.train import train
from tokenizer.training.config import TrainConfig
from tokenizer.training.validation import Validation, load_images, reconstruct

SHAPE = VQConfig(
    base_channels=32,
    channel_multipliers=(1, 1, 2, 4),
    num_res_blocks=1,
    z_channels=64,
    vocab_size=512,
    l2_normalize=False,
)
# Each with 512 codes and the weights of its publication.
QUANTIZERS = {
    "vq": dataclasses.replace(SHAPE, l2_normalize=True),
    "ibq": dataclasses.replace(SHAPE, quantizer="ibq", codebook_dim=32, entropy_weight=0.05),
    "fsq": dataclasses.replace(
        SHAPE, quantizer="fsq", codebook_dim=3, fsq=FiniteScalarOptions((8, 8, 8))
    ),
    "lfq": dataclasses.replace(SHAPE, quantizer="lfq", codebook_dim=9, entropy_weight=0.1),
}
SCORES = {
    "psnr": "PSNR, dB",
    "efficientnet_lite0_fd": "FD, EfficientNet-lite0 (NOT FID)",
    "codebook_usage": "share of codes in use",
}
COSTS = {"process_seconds": "process seconds"}


def compare(config: QuantizersConfig, world: World) -> None:
    """Train every quantizer with every seed, and write table and plot after each run."""
    names = ("validation_images", "image_size", "num_steps", "batch_size", "precision")
    settings = {name: getattr(config, name) for name in names}
    settings["image_size"] = list(config.image_size)
    results = Results(config.out / "results.json", settings)
    pixels = load_images(config.validation, config.validation_images, config.image_size)
    validation = Validation(pixels, ExtractorConfig(extractor="efficientnet_lite0"), world)
    for seed in range(config.seeds):
        for name in QUANTIZERS:
            if results.has(name, seed):
                continue
            run = training_run(config, name, seed)
            start = time.process_time()
            train(run, world)
            seconds = time.process_time() - start
            vq = load_tokenizer(run.out).vq.for_inference(world.device, torch.float32)
            scores = reconstruction_scores(vq, validation, world)
            results.add({"variant": name, "seed": seed, "process_seconds": seconds, **scores})
            print(f"\n{results.write(SCORES, COSTS)}\n{results.path.with_name('table.md')}")


def training_run(config: QuantizersConfig, name: str, seed: int) -> TrainConfig:
    """The run of one quantizer with one seed. It is not evaluated, so that its time is training."""
    return TrainConfig(
        data=config.data,
        out=config.out / f"{name}_{seed}",
        validation_images=2,
        image_size=config.image_size,
        crop_scale=1.0,
        training=TrainingConfig(
            config.num_steps,
            config.batch_size,
            ema_decay=0.95,
            precision=config.precision,
            seed=seed,
            device=config.device,
        ),
        model=QUANTIZERS[name],
        loss=LossConfig(
            reconstruction="l1",
            perceptual="efficientnet_lite0",
            perceptual_weight=0.5,
            adversarial_weight=0.0,
        ),
        optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.0, schedule="cosine", warmup_steps=20),
        report=ReportConfig(
            report_every=max(1, config.num_steps // 4),
            sample_every=None,
            save_every=config.num_steps,
            keep_last=1,
        ),
        num_workers=0,
    )


def reconstruction_scores(vq: VQModel, validation: Validation, world: World) -> dict[str, float]:
    """PSNR, Frechet distance and the share of codes in use, on the validation images."""
    usage = CodebookUsage(vq.config.vocab_size, world.device)
    with torch.inference_mode():
        for part in validation.pixels.split(16):
            usage.update(vq.encode(pixels_to_images(part.to(world.device))))
    scores = validation.scores(reconstruct(vq, validation.pixels, world))
    scores = {name.removeprefix("validation_"): value for name, value in scores.items()}
    return scores | {"codebook_usage": usage.result(world)["codebook_usage"]}


def main() -> None:
    """Entry point."""
    config = parse_config(QuantizersConfig)
    with distributed(config.device) as world, writer_lock(config.out, world):
        compare(config, world)


if __name__ == "__main__":
    run_command(main)
