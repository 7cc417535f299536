"""Train the decoder on codes, under classes or captions; run again, it continues bit for bit.

    python -m autoregressive.train --config configs/autoregressive/class_256.yaml \
        --config configs/autoregressive/size/b.yaml --data.codes [codes/train] --out runs/gpt_b
    python -m autoregressive.train --config configs/autoregressive/text_256.yaml \
        --data.codes [codes/laion] --data.features features/laion --out runs/t2i_stage1
    torchrun --nproc-per-node 8 -m autoregressive.train ...
"""

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from autoregressive.data.codes import drop_condition
from autoregressive.data.config import DataConfig
from autoregressive.data.open import Dataset, open_data
from autoregressive.inference.sampling_config import SamplingConfig
from autoregressive.models.config import GPTConfig
from autoregressive.models.gpt import GPT
from autoregressive.models.transformer import Block, TransformerConfig
from autoregressive.objectives.next_token import NextTokenLoss, unsharded_copy
from autoregressive.validation import (
    EvaluationConfig,
    SampleGrid,
    SampleScorer,
    check_resumable,
    open_validation,
    start_from,
    validation_loss,
)
from core.config import parse_config, run_command
from core.data.order import ShuffledOrder, check_batch_size, local_positions
from core.distributed.parallel import ParallelConfig, no_sync, prepare, shard
from core.distributed.preemption import Preemption
from core.distributed.world import DeviceName, Precision, World, distributed
from core.rng import seed_step
from core.training.checkpoint import Checkpointer
from core.training.ema import EMA
from core.training.memory_plan import (
    Plan,
    check_fits,
    plan_model,
    print_plan,
    transformer_activations,
)
from core.training.optimizer import OptimizerConfig, Stepper, build_adamw, learning_rate
from core.training.prefetch import prefetch
from core.training.run import ReportConfig, Run, begin_run


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
        parallel: DDP, FSDP2 or HSDP, compile and activation checkpointing.
        report: How often to report, sample and save.
        evaluation: Scores of samples, and how often.
        num_steps: Optimizer steps.
        batch_size: Samples per optimizer step, over all processes and accumulation steps.
        gradient_accumulation: Micro-batches per optimizer step.
        loss_chunk: Codes of a process whose float32 logits exist at once.
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
        dry_run: Print the configuration, its size and memory by strategy, check, and stop.
    """

    out: Path
    data: DataConfig
    validation: tuple[Path, ...] = ()
    validation_features: Path | None = None
    validation_samples: int = 10000
    init_from: str = ""
    model: TransformerConfig = field(default_factory=TransformerConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    num_steps: int = 1501200
    batch_size: int = 256
    gradient_accumulation: int = 1
    loss_chunk: int = 1024
    condition_dropout: float = 0.1
    ema_decay: float = 0.0
    precision: Precision = "bf16"
    seed: int = 0
    device: DeviceName = "auto"
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    sample_classes: tuple[int, ...] = ()
    sample_prompts: tuple[str, ...] = ()
    sample_columns: int = 8
    dry_run: bool = False

    def __post_init__(self) -> None:
        counts = (self.num_steps, self.gradient_accumulation, self.loss_chunk, self.sample_columns)
        if min(counts) < 1:
            raise ValueError(
                "num_steps, gradient_accumulation, loss_chunk and sample_columns must be >= 1"
            )
        if not 0 <= self.condition_dropout < 1 or not 0 <= self.ema_decay < 1:
            raise ValueError("condition_dropout and ema_decay must be in [0, 1)")


def train(config: TrainConfig, world: World) -> None:
    """Train to num_steps, from the newest checkpoint in the run's folder."""
    check_batch_size(config.batch_size, config.gradient_accumulation, world)
    data = open_data(config.data, world, config.out)
    gpt_config = GPTConfig(**asdict(config.model), **data.model_fields())
    validation = open_validation(config, gpt_config, world)
    resumes = check_resumable(config.out, gpt_config)
    plan = plan_training(config, gpt_config, len(data), world)
    if config.dry_run:
        print_plan(plan, config, config.parallel, world)
    check_fits(plan, config.parallel, world)
    if config.dry_run:
        return
    begin_run(config.out, world)
    torch.manual_seed(config.seed)
    gpt = GPT(gpt_config)
    if config.init_from and not resumes:
        start_from(gpt, config.init_from)
    ema = EMA(gpt, config.ema_decay) if config.ema_decay else None
    objective = NextTokenLoss(gpt, config.loss_chunk)
    parallel = prepare(objective, config.parallel, world, config.precision, Block)
    averaged = objective
    if ema:
        averaged = NextTokenLoss(ema.model, config.loss_chunk)
        shard(averaged, config.parallel, world, config.precision, Block)
    optimizer = build_adamw(gpt, config.optimizer)
    stepper = Stepper(optimizer, config.optimizer, world.device)
    checkpoints = Checkpointer(
        config.out / "checkpoints",
        gpt_config,
        world,
        config.report.keep_last,
        config.report.keep_every,
        model=gpt,
        ema=ema.model if ema else None,
        optimizer=optimizer,
    )
    state = checkpoints.restore_latest()
    first_step, samples = state["step"], state.get("samples", 0)
    batches = prefetch(training_batches(config, data, world, samples), world.device)
    scorer = SampleScorer(config, data, world)
    pictures = SampleGrid(config, data, gpt_config, scorer.vq)
    draws = world.broadcast(pictures.vq is not None)
    run = Run(config.out, config, config.report, world)
    run.start(first_step, config.num_steps, "token", gpt_config.training_flops)
    loss_sum = torch.zeros((), device=world.device)
    losses = 0
    interruption = Preemption(world)

    for step in range(first_step, config.num_steps):
        # One optimizer step.
        run.begin_step(step)
        seed_step(config.seed, step, world.rank)
        for i in range(config.gradient_accumulation):
            with run.waiting():
                codes, condition, dropped = next(batches)
            accumulating = i + 1 < config.gradient_accumulation
            with no_sync(parallel) if accumulating else contextlib.nullcontext():
                with world.autocast(config.precision):
                    loss = parallel(codes, condition, dropped) / config.gradient_accumulation
                loss.backward()
            loss_sum += loss.detach()
        checkpoints.wait_for_copy()
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
            if draws:
                whole = unsharded_copy(averaged.gpt, world)
                if world.is_main:
                    run.draw(done, pictures.draw(whole))
        if scorer.due(done):
            run.log(done, scorer.score(unsharded_copy(averaged.gpt, world, everywhere=True)))
        stopping = interruption.requested() and done < config.num_steps
        if stopping or config.report.saves(done, config.num_steps):
            stepper.check()
            checkpoints.save(done, samples=samples)
        if stopping:
            checkpoints.finish()
            interruption.leave(done)
    checkpoints.finish()
    run.finish()


def plan_training(config: TrainConfig, gpt_config: GPTConfig, samples: int, world: World) -> Plan:
    """What the training needs, counted on a model without memory."""
    with torch.device("meta"):
        gpt = GPT(gpt_config)
    length = gpt_config.num_condition + gpt_config.num_codes - 1
    rows = config.batch_size // (world.size * config.gradient_accumulation)
    kept = transformer_activations(
        rows * length,
        gpt_config.dim,
        gpt_config.ffn_dim,
        gpt_config.num_layers,
        config.parallel.activation_checkpointing,
    )
    logits = 4 * min(config.loss_chunk, rows * gpt_config.num_codes) * gpt_config.vocab_size
    return plan_model(
        gpt,
        Block,
        config.ema_decay > 0,
        kept + logits,
        samples,
        config.batch_size,
        config.num_steps,
    )


def training_batches(
    config: TrainConfig, data: Dataset, world: World, samples: int
) -> Iterator[tuple[Any, ...]]:
    """This rank's micro-batches from position `samples` on: codes, conditions, dropped ones."""
    order = ShuffledOrder(len(data), config.seed)
    while True:
        for positions in local_positions(
            samples, config.batch_size, config.gradient_accumulation, world
        ):
            codes, condition = data.batch(order[positions], positions, config.seed)
            dropped = drop_condition(positions, config.condition_dropout, config.seed)
            yield codes, condition, dropped
        samples += config.batch_size


def main() -> None:
    """Entry point."""
    config = parse_config(TrainConfig)
    with distributed(config.device, config.parallel.timeout_minutes) as world:
        train(config, world)


if __name__ == "__main__":
    run_command(main)
