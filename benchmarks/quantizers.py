"""Quantizers side by side: a small tokenizer, equal steps and data, the mean and range over seeds.

python -m benchmarks.quantizers --data scenes64/train --validation scenes64/val \
    --out runs/quantizers

Run it again to continue: finished runs are kept. table.md counts only finished runs.
"""

import dataclasses
import json
import statistics
from dataclasses import dataclass
from pathlib import Path

from core.config import parse_config, run_command
from core.distributed.world import DeviceName, Precision, World, distributed
from core.files import write_text
from core.lock import writer_lock
from core.training.config import TrainingConfig
from core.training.optimizer import OptimizerConfig
from core.training.run import ReportConfig
from evaluations.features.extractors import ExtractorConfig
from tokenizer.losses.objective import LossConfig
from tokenizer.models.config import VQConfig
from tokenizer.quantizers.finite_scalar import FiniteScalarOptions
from tokenizer.train import train
from tokenizer.training.config import TrainConfig

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
    "validation_psnr": "PSNR, dB",
    "validation_efficientnet_lite0_fd": "FD, EfficientNet-lite0 (NOT FID)",
    "codebook_usage": "codes in use",
}


@dataclass(frozen=True)
class QuantizersConfig:
    """Which images, and how long each run is.

    Args:
        data: Training images: a folder of class folders, a flat folder, or a list file.
        validation: Images that are reconstructed for the scores.
        out: A folder for the runs and table.md.
        validation_images: How many of them. A Frechet distance depends on this number.
        image_size: Height and width of the crops, divisible by 8.
        seeds: Runs per quantizer.
        num_steps: Optimizer steps of a run.
        batch_size: Images per step.
        precision: bf16 or fp32.
        device: auto, cpu, cuda or mps.
    """

    data: Path
    validation: Path
    out: Path
    validation_images: int = 256
    image_size: tuple[int, int] = (64, 64)
    seeds: int = 3
    num_steps: int = 200
    batch_size: int = 8
    precision: Precision = "bf16"
    device: DeviceName = "auto"

    def __post_init__(self) -> None:
        if min(self.seeds, self.num_steps, self.batch_size) < 1 or self.validation_images < 2:
            raise ValueError("seeds, num_steps and batch_size must be >= 1, validation_images >= 2")


def compare(config: QuantizersConfig, world: World) -> None:
    """Train every quantizer with every seed, and write the table after each run."""
    for seed in range(config.seeds):
        for name in QUANTIZERS:
            run = training_run(config, name, seed)
            if not last_scores(run.out, config.num_steps):
                train(run, world)
            if world.is_main:
                write_text(config.out / "table.md", table(config))
    if world.is_main:
        print(f"\n{table(config)}\n{config.out / 'table.md'}")


def training_run(config: QuantizersConfig, name: str, seed: int) -> TrainConfig:
    """The run of one quantizer with one seed."""
    return TrainConfig(
        data=config.data,
        out=config.out / f"{name}_{seed}",
        validation=config.validation,
        validation_images=config.validation_images,
        rfid=True,
        metrics=ExtractorConfig(extractor="efficientnet_lite0"),
        image_size=config.image_size,
        crop_scale=1.0,
        training=TrainingConfig(
            config.num_steps,
            config.batch_size,
            ema_decay=0.98,
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
            sample_every=config.num_steps,
            save_every=max(1, config.num_steps // 4),
            keep_last=1,
        ),
        num_workers=0,
    )


def last_scores(run: Path, num_steps: int) -> dict[str, float]:
    """The scores after the last step by name; {} if the run is not finished."""
    path, found = run / "metrics.jsonl", {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        values = json.loads(line)
        if values["step"] == num_steps:
            found |= values
    return {name: found[name] for name in SCORES} if SCORES.keys() <= found.keys() else {}


def table(config: QuantizersConfig) -> str:
    """A Markdown table of the mean and the range over seeds, of quantizers with a finished run."""
    lines = [
        f"| quantizer | seeds | {' | '.join(SCORES.values())} |",
        "|---" * (len(SCORES) + 2) + "|",
    ]
    for name in QUANTIZERS:
        runs = [
            last_scores(config.out / f"{name}_{s}", config.num_steps) for s in range(config.seeds)
        ]
        done = [scores for scores in runs if scores]
        if done:
            values = [spread([scores[score] for scores in done]) for score in SCORES]
            lines.append(f"| `{name}` | {len(done)} | {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


def spread(values: list[float]) -> str:
    """The mean and, in brackets, the smallest and the largest value."""
    return f"{statistics.mean(values):.4g} ({min(values):.4g} to {max(values):.4g})"


def main() -> None:
    """Entry point."""
    config = parse_config(QuantizersConfig)
    with distributed(config.device) as world, writer_lock(config.out, world):
        compare(config, world)


if __name__ == "__main__":
    run_command(main)
