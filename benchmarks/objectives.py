r"""Objectives side by side: a small GPT on one tokenizer's codes, equal training compute.

    python -m benchmarks.objectives --codes runs/scenes64_short/codes/train \
        --validation_codes runs/scenes64_short/codes/val --tokenizer runs/scenes64_short/tokenizer \
        --train scenes64/train --validation scenes64/val --out runs/objectives

Each objective gets as many steps as fit into the same process time, by the cost of a step that is
measured first. Run it again to continue: finished runs are kept in results.json, from which
table.md and scores.png are made.
"""

from dataclasses import dataclass, field
from pathlib import Path

from autoregressive.inference.sampling_config import SamplingConfig
from core.config import parse_config, parse_first, run_command
from core.distributed.config import DeviceName, Precision


@dataclass(frozen=True)
class ObjectivesConfig:
    """Which codes and images, and how long each run is.

    Args:
        codes: Codes of the training images.
        validation_codes: Codes for the validation loss.
        tokenizer: The tokenizer of both.
        train: The training images, a folder per class: the reference of the Frechet distance, and
            what the classifier of the agreement learns from.
        validation: Held-out images: the classifier's accuracy, and the distance of real images.
        out: A folder for the runs, results.json, table.md and scores.png.
        real_images: Training images used, spread evenly over all of them.
        num_images: Images that each run samples; equally many held-out images are scored. A
            Frechet distance depends on this number.
        seeds: Runs per objective.
        seconds: Process seconds of training per run, which decide the number of steps.
        batch_size: Images per step.
        sampling: How images are sampled. A guidance_free model gets 1 / cfg_scale as its input.
        precision: Of training: bf16 or fp32.
        device: auto, cpu, cuda or mps.
    """

    codes: Path
    validation_codes: Path
    tokenizer: Path
    train: Path
    validation: Path
    out: Path
    real_images: int = 900
    num_images: int = 180
    seeds: int = 3
    seconds: float = 25.0
    batch_size: int = 32
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(cfg_scale=2.0))
    precision: Precision = "bf16"
    device: DeviceName = "auto"

    def __post_init__(self) -> None:
        if min(self.seeds, self.batch_size) < 1 or self.seconds <= 0:
            raise ValueError("seeds and batch_size must be >= 1, seconds > 0")
        if min(self.real_images, self.num_images) < 2:
            raise ValueError("real_images and num_images must be >= 2")


parse_first(ObjectivesConfig, __name__)

import dataclasses
import shutil
import time

import numpy as np
import torch

from autoregressive.data.config import DataConfig
from autoregressive.models.conditioning import ClassCondition
from autoregressive.models.config import TransformerConfig
from autoregressive.models.pretrained import load_gpt
from autoregressive.objectives.config import NoisyContextOptions, ObjectiveConfig
from autoregressive.objectives.next_token import NextTokenLoss
from autoregressive.sampling.loop import decode_batches, sample_batches
from autoregressive.sampling.pipeline import ImagePipeline
from autoregressive.train import train
from autoregressive.training.config import TrainConfig
from autoregressive.training.validation import open_validation, validation_loss
from benchmarks.support.evidence import Results
from core.data.loader import CenterCrop, OrderedImages, ordered_batches
from core.data.open import open_images
from core.distributed.world import World, distributed
from core.files import read_record, write_json
from core.lock import writer_lock
from core.training.config import OptimizerConfig, ReportConfig, TrainingConfig
from evaluations.features.extractors import EfficientNetExtractor
from evaluations.metrics.class_agreement import AgreementClassifier
from evaluations.metrics.frechet import Gaussian, frechet_distance

SHAPE = TransformerConfig(
    num_layers=3,
    num_heads=4,
    dim=192,
    ffn_multiple=64,
    rope_condition="identity",
    token_dropout=0.0,
    residual_dropout=0.0,
    ffn_dropout=0.0,
)
# The published options, but for the width of the heads of noisy_context: 2048 suits large models.
VARIANTS: dict[str, tuple[TransformerConfig, ObjectiveConfig]] = {
    "plain": (SHAPE, ObjectiveConfig()),
    "qk_norm": (dataclasses.replace(SHAPE, qk_norm=True), ObjectiveConfig()),
    "next_patch": (SHAPE, ObjectiveConfig("next_patch")),
    "noisy_context": (
        SHAPE,
        ObjectiveConfig("noisy_context", noisy_context=NoisyContextOptions(hidden=384)),
    ),
    "random_order": (SHAPE, ObjectiveConfig("random_order")),
    "guidance_free": (SHAPE, ObjectiveConfig("guidance_free")),
}
SCORES = {
    "validation_loss": "validation loss, nats per code",
    "efficientnet_lite0_fd": "FD, EfficientNet-lite0 (NOT FID)",
    "agreement": "class agreement",
}
COSTS = {"steps": "steps", "process_seconds": "process seconds"}
CALIBRATION = (16, 64)  # steps of the two short trainings whose difference is the cost of a step
FEATURE_BATCH = 60


class SampleScores:
    """Scores generated images against real ones. floor: the scores of held-out real images."""

    def __init__(self, config: ObjectivesConfig, world: World) -> None:
        self.extractor = EfficientNetExtractor(world.device)
        features, classes = self._real(config.train, config.real_images, config.out)
        self.reference = Gaussian.of_rows(torch.from_numpy(features))
        self.classifier = AgreementClassifier(features, classes)
        held_out = self._real(config.validation, config.num_images, config.out)
        self.floor = self.scores(*held_out)

    def scores(self, features: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
        """Features (n, dim) and classes (n,) -> Frechet distance and agreement."""
        distance = frechet_distance(Gaussian.of_rows(torch.from_numpy(features)), self.reference)
        agreement = self.classifier.agreement(features, wanted)
        return {self.extractor.metric: distance, "agreement": agreement}

    def features(self, pixels: torch.Tensor) -> np.ndarray:
        """Pixels (n, h, w, 3) uint8 -> features (n, dim)."""
        parts = [self.extractor(part).pooled.cpu() for part in pixels.split(FEATURE_BATCH)]
        return torch.cat(parts).numpy()

    def _real(self, folder: Path, count: int, out: Path) -> tuple[np.ndarray, np.ndarray]:
        """Features and classes of images spread over a folder; kept in `out`."""
        images = open_images(folder)
        path = out / f"real_{images.fingerprint}_{count}.npz"
        if path.is_file():
            with np.load(path, allow_pickle=False) as file:
                return file["features"], file["classes"]
        chosen = np.linspace(0, len(images) - 1, min(count, len(images))).astype(int).tolist()
        dataset = OrderedImages(images, CenterCrop(*images.load(0).size[::-1]))
        features, classes = [], []
        for batch in ordered_batches(dataset, chosen, FEATURE_BATCH, num_workers=0):
            if batch.pixels is not None:
                features.append(self.features(batch.pixels))
                classes += [int(images.labels[i]) for i in batch.indices]
        found = np.concatenate(features), np.array(classes)
        np.savez(path, features=found[0], classes=found[1])
        return found


def compare(config: ObjectivesConfig, world: World) -> None:
    """Train every objective with every seed, and write table and plot after each run."""
    names = ("real_images", "num_images", "seconds", "batch_size", "precision")
    settings = {name: getattr(config, name) for name in names}
    settings["sampling"] = dataclasses.asdict(config.sampling)
    config.out.mkdir(parents=True, exist_ok=True)
    results = Results(config.out / "results.json", settings)
    measured = SampleScores(config, world)
    cost = step_costs(config, world)
    for seed in range(config.seeds):
        for name in VARIANTS:
            if results.has(name, seed):
                continue
            run = training_run(config, name, seed, max(1, round(config.seconds / cost[name])))
            start = time.process_time()
            train(run, world)
            row = {"variant": name, "seed": seed, "steps": run.training.num_steps}
            row["process_seconds"] = time.process_time() - start
            results.add(row | scores(config, run, measured, world))
            table = results.write(SCORES, COSTS, measured.floor)
            print(f"\n{table}\n{results.path.with_name('table.md')}")


def step_costs(config: ObjectivesConfig, world: World) -> dict[str, float]:
    """Process seconds of a step of each variant, the least of two measurements; kept in `out`."""
    path = config.out / "step_costs.json"
    if path.is_file():
        return read_record(path, dict.fromkeys(VARIANTS, float))
    measured: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(2):
        for name in VARIANTS:
            seconds = []
            for steps in CALIBRATION:
                run = training_run(config, name, 0, steps)
                run = dataclasses.replace(run, out=config.out / "calibration")
                start = time.process_time()
                train(run, world)
                seconds.append(time.process_time() - start)
                shutil.rmtree(run.out)
            measured[name].append((seconds[1] - seconds[0]) / (CALIBRATION[1] - CALIBRATION[0]))
    found = {name: min(costs) for name, costs in measured.items()}
    write_json(path, found)
    return found


def training_run(config: ObjectivesConfig, name: str, seed: int, steps: int) -> TrainConfig:
    """The run of one variant with one seed. It is not evaluated, so that its time is training."""
    model, objective = VARIANTS[name]
    return TrainConfig(
        out=config.out / f"{name}_{seed}",
        data=DataConfig(codes=(config.codes,)),
        validation=(config.validation_codes,),
        validation_samples=None,
        training=TrainingConfig(
            steps,
            config.batch_size,
            ema_decay=0.98,
            precision=config.precision,
            seed=seed,
            device=config.device,
        ),
        model=model,
        objective=objective,
        optimizer=OptimizerConfig(lr=2e-3, schedule="cosine", warmup_steps=20),
        report=ReportConfig(
            report_every=max(1, steps // 4), sample_every=None, save_every=steps, keep_last=1
        ),
    )


def scores(
    config: ObjectivesConfig, run: TrainConfig, measured: SampleScores, world: World
) -> dict[str, float]:
    """The validation loss of raster next-token prediction, and the scores of sampled images."""
    gpt = load_gpt(str(run.out))[0].to(world.device).eval()
    validation = open_validation(run, gpt.config, world)
    assert validation is not None
    loss = float(validation_loss(NextTokenLoss(gpt, run.loss_chunk), validation, run, world))
    pipeline = ImagePipeline.from_pretrained(
        str(run.out), str(config.tokenizer), device=config.device, dtype=torch.float32
    )
    sampling = dataclasses.replace(config.sampling, seed=run.training.seed)
    if gpt.config.guidance_input:
        strength = 1 / (sampling.cfg_scale or 1)
        sampling = dataclasses.replace(sampling, cfg_scale=None, guidance=strength)
    ids = torch.arange(config.num_images)
    classes = ids % gpt.config.num_classes
    batches = sample_batches(
        pipeline, lambda part: ClassCondition(classes[part]), ids, FEATURE_BATCH, sampling
    )
    pixels = torch.cat([batch.pixels for batch in decode_batches(pipeline, batches)])
    return {"validation_loss": loss, **measured.scores(measured.features(pixels), classes.numpy())}


def main() -> None:
    """Entry point."""
    config = parse_config(ObjectivesConfig)
    with distributed(config.device) as world, writer_lock(config.out, world):
        compare(config, world)


if __name__ == "__main__":
    run_command(main)
