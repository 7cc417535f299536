"""Train the decoder on codes, under classes or captions; run again, it continues bit for bit.

    python -m autoregressive.train --config configs/autoregressive/class_256.yaml \
        --config configs/autoregressive/size/b.yaml --data.codes [codes/train] --out runs/gpt_b
    python -m autoregressive.train --config configs/autoregressive/text_256.yaml \
        --data.codes [codes/laion] --data.features features/laion --out runs/t2i_stage1
    torchrun --nproc-per-node 8 -m autoregressive.train ...
"""

import contextlib
import dataclasses
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from autoregressive.conditioning import select
from autoregressive.data import CodeDataset, CodesConfig, LiveConfig, dropped_conditions
from autoregressive.model import GPT, Architecture, Block, GPTConfig
from autoregressive.pretrained import load_gpt
from autoregressive.sample import decode_pixels, score_samples
from autoregressive.sampling import SamplingConfig, generate
from autoregressive.text_data import Dataset, open_data
from core.checkpoint import Checkpointer, inference_files
from core.config import InputError, load_config, parse_config, run_command
from core.datasets import ShuffledOrder, check_batch_size, local_positions
from core.distributed import DeviceName, Precision, World, distributed
from core.ema import EMA
from core.images import image_grid
from core.optim import OptimizerConfig, Stepper, build_adamw, learning_rate
from core.parallel import ParallelConfig, no_sync, prepare
from core.randomness import seed_step
from core.run import ReportConfig, Run, begin_run
from core.weights import load_weights
from evaluations.scoring import JudgeConfig, open_judge
from tokenizer.model import VQModel
from tokenizer.pretrained import load_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(JudgeConfig):
    """Scores of samples, while training; they need a reference.

    Args:
        every: Optimizer steps from one evaluation to the next; 0 for none.
        num_images: Images to sample for it, of all classes in turn.
    """

    every: int = 0
    num_images: int = 5000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 0 or self.num_images < 2:
            raise ValueError("evaluation: every must be >= 0, num_images >= 2")
        if self.every and self.reference is None:
            raise ValueError("evaluation.every needs evaluation.reference")


@dataclass(frozen=True)
class TrainConfig:
    """A training of the decoder.

    Args:
        out: The run's folder.
        init_from: Start from these weights (a run or checkpoint folder, a released file, a Hub
            id) at step 0 with a fresh optimiser; the grid may be another one.
        data: The codes to train on, and the captions' features; vocabulary, grid, classes and
            text encoder come from them.
        validation: Codes for the validation loss; empty for none.
        validation_features: The features of their captions, for a text model.
        validation_samples: At most so many of them; 0 for all.
        model: The decoder's shape.
        optimizer: AdamW and its schedule.
        parallel: Compile and activation checkpointing.
        report: How often to report, sample and save.
        evaluation: Scores of samples, and how often.
        num_steps: Optimizer steps.
        batch_size: Samples per optimizer step, over all processes and accumulation steps.
        gradient_accumulation: Micro-batches per optimizer step.
        condition_dropout: Share of samples that see the null condition.
        ema_decay: Decay of the averaged weights; 0 for none.
        precision: bf16 autocast, or fp32.
        seed: Decides the initial weights, the data order and all dropout.
        device: auto, cpu, cuda or mps.
        sampling: How the sample grids are drawn.
        sample_classes: Their classes, a row each; empty for the first ten.
        sample_prompts: Their prompts, a row each, of a text model; empty for the captions of the
            first ten training images.
        sample_columns: Images a row.
    """

    out: Path
    data: CodesConfig
    validation: tuple[Path, ...] = ()
    validation_features: Path | None = None
    validation_samples: int = 10000
    init_from: str = ""
    model: Architecture = field(default_factory=Architecture)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    num_steps: int = 1501200
    batch_size: int = 256
    gradient_accumulation: int = 1
    condition_dropout: float = 0.1
    ema_decay: float = 0.0
    precision: Precision = "bf16"
    seed: int = 0
    device: DeviceName = "auto"
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    sample_classes: tuple[int, ...] = ()
    sample_prompts: tuple[str, ...] = ()
    sample_columns: int = 8

    def __post_init__(self) -> None:
        if min(self.num_steps, self.gradient_accumulation, self.sample_columns) < 1:
            raise ValueError("num_steps, gradient_accumulation and sample_columns must be >= 1")
        if not 0 <= self.condition_dropout < 1 or not 0 <= self.ema_decay < 1:
            raise ValueError("condition_dropout and ema_decay must be in [0, 1)")


def train(config: TrainConfig, world: World) -> None:
    """Train to num_steps, from the newest checkpoint in the run's folder."""
    check_batch_size(config.batch_size, config.gradient_accumulation, world)
    data = open_data(config.data, world, config.out)
    gpt_config = GPTConfig(**asdict(config.model), **data.model_fields())
    validation = open_validation(config, gpt_config, world)
    check_resumable(config.out, gpt_config)
    begin_run(config.out, world)
    torch.manual_seed(config.seed)
    gpt = GPT(gpt_config)
    if config.init_from:
        start_from(gpt, config.init_from)
    gpt = gpt.to(world.device)
    ema = EMA(gpt, config.ema_decay) if config.ema_decay else None
    optimizer = build_adamw(gpt, config.optimizer)
    stepper = Stepper(optimizer, config.optimizer, world.device)
    checkpoints = Checkpointer(
        config.out / "checkpoints",
        gpt_config,
        world,
        config.report.keep_last,
        model=gpt,
        ema=ema.model if ema else None,
        optimizer=optimizer,
    )
    state = checkpoints.restore_latest()
    first_step, samples = state["step"], state.get("samples", 0)
    parallel = prepare(gpt, config.parallel, world, Block)
    order = ShuffledOrder(len(data), config.seed)
    averaged = ema.model if ema else gpt
    vq = find_tokenizer(data, world)
    pictures = SampleGrid(config, data, gpt_config, vq)
    evaluation = config.evaluation
    judge = open_judge(evaluation, "generation", world) if evaluation.every else None
    if judge and vq is None:
        raise InputError(
            f"evaluation: the tokenizer of {config.data.codes[0]} is gone or has changed"
        )
    run = Run(config.out, config, config.report, world)
    run.start(first_step, config.num_steps, "token")
    loss_sum = torch.zeros((), device=world.device)
    losses = 0

    for step in range(first_step, config.num_steps):
        # One optimizer step.
        seed_step(config.seed, step, world.rank)
        micro_batches = local_positions(
            samples, config.batch_size, config.gradient_accumulation, world
        )
        for i, positions in enumerate(micro_batches):
            codes, condition = data.batch(order[positions], positions, config.seed)
            dropped = dropped_conditions(positions, config.condition_dropout, config.seed)
            codes, condition, dropped = to_device(world.device, codes, condition, dropped)
            accumulating = i + 1 < len(micro_batches)
            with no_sync(parallel) if accumulating else contextlib.nullcontext():
                with world.autocast(config.precision):
                    logits = parallel(codes, condition, dropped)
                loss = F.cross_entropy(logits.flatten(0, 1), codes.flatten())
                (loss / len(micro_batches)).backward()
            loss_sum += loss.detach() / len(micro_batches)
        grad_norm = stepper.step(step, config.num_steps)
        if ema:
            ema.update(gpt)
        samples += config.batch_size
        losses += 1
        run.progress(config.batch_size * gpt_config.num_codes)

        # Once in a while: report, sample, save.
        done = step + 1
        if config.report.reports(done, config.num_steps):
            skipped = stepper.check()
            metrics = {
                "loss": world.sum(loss_sum / losses) / world.size,
                "lr": learning_rate(step, config.optimizer, config.num_steps),
                "grad_norm": grad_norm,
                "epoch": samples / len(data),
            }
            run.log(done, metrics | ({"skipped_steps": skipped} if skipped else {}))
            loss_sum.zero_()
            losses = 0
        if config.report.samples(done, config.num_steps):
            if validation:
                loss = validation_loss(averaged, validation, config, world)
                run.log(done, {"validation_loss": loss})
            if world.is_main and vq:
                run.draw(done, pictures.draw(averaged))
        if judge and vq and done % evaluation.every == 0:
            count = evaluation.num_images
            found = score_samples(
                averaged, vq, data.conditions, count, config.sampling, judge, world
            )
            run.log(done, found)
        if config.report.saves(done, config.num_steps):
            stepper.check()
            checkpoints.save(done, samples=samples)
    run.finish()


def to_device(device: torch.device, *values: Any) -> list[Any]:  # noqa: ANN401 - tensors, tuples
    """Copy without waiting: pinned memory lets the copy overlap with the step before."""
    copies = []
    for value in values:
        if isinstance(value, tuple):
            copies.append(tuple(to_device(device, *value)))
        elif device.type != "cuda":
            copies.append(value.to(device))
        else:
            copies.append(value.pin_memory().to(device, non_blocking=True))
    return copies


def start_from(gpt: GPT, source: str) -> None:
    """Take over the weights of another training; InputError where they do not fit."""
    given = load_gpt(source, grid=gpt.config.grid).gpt
    load_weights(gpt, given.state_dict(), source)
    ours, theirs = gpt.config.text_encoder, given.config.text_encoder
    if ours and theirs and ours != theirs:
        raise InputError(f"init_from {source}: trained with another text encoder")


def check_resumable(out: Path, gpt_config: GPTConfig) -> None:
    """Raise InputError where the folder holds a run on other codes: that is no resume."""
    if not list((out / "checkpoints").glob("step_*/checksums.json")):
        return
    found = load_config(GPTConfig, inference_files(out, "model")[0])
    for name in ("condition", "grid", "vocab_size", "num_classes", "text_dim", "tokenizer_sha256"):
        ours, theirs = getattr(gpt_config, name), getattr(found, name)
        if ours != theirs:
            raise InputError(
                f"{out}: its run has {name} {theirs}, the data has {ours}, so it cannot be "
                f"resumed. To start from its weights: --init_from {out} and another --out"
            )


def open_validation(config: TrainConfig, gpt_config: GPTConfig, world: World) -> Dataset | None:
    """The validation data; raises InputError where it does not fit the training data."""
    if not config.validation:
        return None
    given = dataclasses.replace(
        config.data,
        codes=config.validation,
        features=config.validation_features,
        labels=(),
        live=LiveConfig(),
    )
    validation = open_data(given, world, config.out)
    for name, theirs in validation.model_fields().items():
        ours = getattr(gpt_config, name)
        if ours != theirs:
            raise InputError(
                f"validation {config.validation[0]}: {name} is {theirs}, in data it is {ours}"
            )
    return validation


@torch.no_grad()
def validation_loss(
    gpt: GPT, validation: Dataset, config: TrainConfig, world: World
) -> torch.Tensor:
    """Mean cross-entropy per code over the same samples on any number of processes, a scalar."""
    count = min(len(validation), config.validation_samples or len(validation))
    batch = max(1, config.batch_size // (world.size * config.gradient_accumulation))
    mine = np.arange(count)[world.rank :: world.size]
    total = torch.zeros(2, dtype=torch.float64, device=world.device)
    training = gpt.training
    gpt.eval()
    for rows in np.split(mine, range(batch, len(mine), batch)):
        codes, condition = to_device(world.device, *validation.batch(rows, rows, config.seed))
        with world.autocast(config.precision):
            logits = gpt(codes, condition)
        losses = F.cross_entropy(logits.flatten(0, 1), codes.flatten(), reduction="sum")
        total += torch.stack([losses.double(), torch.tensor(codes.numel(), device=world.device)])
    gpt.train(training)
    total = world.sum(total)
    return total[0] / total[1]


def find_tokenizer(data: Dataset, world: World) -> VQModel | None:
    """The tokenizer that made the codes, where it still stands: it decodes the sample grids."""
    path = data.index.get("tokenizer", "")
    if not path or not Path(path).exists():
        return None
    vq, sha256 = load_tokenizer(path)
    if sha256 != data.index["tokenizer_sha256"]:
        logger.warning("%s has changed since the codes were made: no sample grids", path)
        return None
    return vq.to(world.device)


class SampleGrid:
    """Draws the same conditions under the same noise each time, a row per class or prompt."""

    def __init__(
        self, config: TrainConfig, data: Dataset, gpt_config: GPTConfig, vq: VQModel | None
    ) -> None:
        self.vq, self.config = vq, config
        shown = np.arange(min(10, gpt_config.num_classes))
        self.condition = data.conditions(shown)
        if isinstance(data, CodeDataset) and config.sample_classes:
            wrong = [c for c in config.sample_classes if not 0 <= c < gpt_config.num_classes]
            if wrong:
                raise InputError(
                    f"sample_classes: {wrong[0]} is not in 0 .. {gpt_config.num_classes - 1}"
                )
            self.condition = torch.tensor(config.sample_classes)
        if not isinstance(data, CodeDataset) and config.sample_prompts:
            self.condition = data.encode(list(config.sample_prompts))

    def draw(self, gpt: GPT) -> np.ndarray:
        """A grid picture (height, width, 3) uint8."""
        assert self.vq is not None
        columns = self.config.sample_columns
        count = len(self.condition if torch.is_tensor(self.condition) else self.condition[1])
        ids = torch.arange(count * columns)
        pixels = []
        for i in ids.split(16):
            rows = select(self.condition, i // columns)
            codes = generate(
                gpt, rows, **self.config.sampling.arguments(gpt.config.condition), sample_ids=i
            )
            pixels.append(decode_pixels(self.vq, codes).cpu())
        return image_grid(torch.cat(pixels).numpy(), columns)


def main() -> None:
    """Entry point."""
    config = parse_config(TrainConfig)
    with distributed(config.device) as world:
        train(config, world)


if __name__ == "__main__":
    run_command(main)
