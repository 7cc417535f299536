r"""Train the transformer on codes, conditioned on classes or captions.

Run the same command again to continue: the result is the same bit for bit.

    python -m autoregressive.train --config configs/autoregressive/class_256.yaml \
        --config configs/autoregressive/size/b.yaml --data.codes codes/train --out runs/gpt_b
    python -m autoregressive.train --config configs/autoregressive/text_256.yaml \
        --data.codes codes/laion --data.features features/laion --out runs/t2i_stage1
    torchrun --nproc-per-node 8 -m autoregressive.train ...
"""

from autoregressive.training.config import TrainConfig
from core.config import InputError, parse_config, parse_first, run_command

parse_first(TrainConfig, __name__)

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from autoregressive.data.codes import drop_condition, tokenizer_names
from autoregressive.data.open import Dataset, open_data
from autoregressive.models.config import GPTConfig
from autoregressive.models.gpt import GPT
from autoregressive.models.lora import LoRAWeights, share_base
from autoregressive.models.transformer import Block
from autoregressive.objectives.base import Objective
from autoregressive.objectives.build import LOSSES, build_objective
from autoregressive.objectives.next_token import NextTokenLoss
from autoregressive.training.model_config import resolve_model
from autoregressive.training.plan import plan_training
from autoregressive.training.validation import (
    SampleGrid,
    SampleScorer,
    check_resumable,
    check_same_heads,
    open_validation,
    read_codebook,
    start_from,
    unsharded_copy,
    validation_loss,
)
from core.data.order import ShuffledOrder, check_batch_size, local_positions
from core.distributed.parallel import no_sync, prepare, shard
from core.distributed.world import World, distributed
from core.lock import writer_lock
from core.rng import seed_step
from core.training.ema import EMA
from core.training.initialization import initialize
from core.training.memory_plan import approve
from core.training.optimizer import Stepper, build_optimizer, learning_rate
from core.training.prefetch import prefetch
from core.training.session import Session


def train(config: TrainConfig, world: World) -> None:
    """Train to num_steps, from the newest checkpoint in the run's folder."""
    check_batch_size(config.training.batch_size, config.training.gradient_accumulation, world)
    data = open_data(config.data, world, config.out)
    config, gpt_config = resolve_model(config, data, world)
    config.sampling.check_grid(gpt_config.num_codes)
    validation = open_validation(config, gpt_config, world)
    resumes = check_resumable(config.out, gpt_config, tokenizer_names(data.index))
    if LOSSES[config.objective.kind].needs_one_crop and data.crops != 1:
        raise InputError(
            f"objective.kind {config.objective.kind} needs codes of one crop of each image; these "
            f"data have {data.crops or 'random'} crops per image"
        )
    needed = LOSSES[config.objective.kind].needs_codebook
    codebook = read_codebook(data, config.data, world) if needed else None
    plan = plan_training(config, gpt_config, len(data), world, codebook)
    if not approve(plan, config, config.parallel, world, config.dry_run):
        return
    models = build_models(config, gpt_config, world, not resumes, len(data), codebook)
    if resumes:
        check_same_heads(config.out, models.objective.heads)
    flops = gpt_config.training_flops
    session = Session(config, gpt_config, world, models.checkpointed, unit="token", flops=flops)
    batches = prefetch(
        training_batches(config, data, world, session.samples, models.objective), world.device
    )
    scorer = SampleScorer(config, data, world)
    grid = SampleGrid(config, data, gpt_config, scorer.vq, world)
    losses = MeanLoss(world)
    if session.step == 0 and session.evaluation_due:
        evaluate(session, models.ema_objective, validation, grid)

    for step in session.steps():
        # One optimizer step.
        seed_step(config.training.seed, step, world.rank)
        models.objective.begin_step(step / config.training.num_steps)
        for i in range(config.training.gradient_accumulation):
            with session.waiting_for_data():
                batch = next(batches)
            accumulating = i + 1 < config.training.gradient_accumulation
            with no_sync(models.parallel) if accumulating else contextlib.nullcontext():
                with world.autocast(config.training.precision):
                    loss = models.parallel(*batch)
                    loss = loss / config.training.gradient_accumulation
                loss.backward()
            losses.add(loss)
        session.wait_for_copy()
        grad_norm = models.stepper.step(step, config.training.num_steps)
        if models.ema:
            models.ema.update(models.objective.gpt)
        session.advance(config.training.batch_size * gpt_config.num_codes)

        # At intervals: report, evaluate, save.
        if session.report_due:
            skipped = models.stepper.check()
            metrics = {
                "loss": losses.take(config.training.gradient_accumulation),
                "lr": learning_rate(step, config.optimizer, config.training.num_steps),
                "grad_norm": grad_norm,
                "epoch": session.samples / len(data),
            }
            session.log(metrics | ({"skipped_steps": skipped} if skipped else {}))
        if session.evaluation_due:
            evaluate(session, models.ema_objective, validation, grid)
        if scorer.due(session.step):
            ema_gpt = unsharded_copy(models.ema_objective.gpt, world, everywhere=True)
            session.log_evaluation(scorer.score(ema_gpt))
        session.save_if_due(check=models.stepper.check)
    session.finish()


class TrainingModels(NamedTuple):
    """The transformer with its loss, its EMA and its optimizer."""

    objective: Objective
    parallel: nn.Module  # the objective, wrapped for training on several processes
    ema: EMA[GPT] | None
    ema_objective: Objective  # the loss of the EMA model; the objective itself without EMA
    stepper: Stepper

    @property
    def checkpointed(self) -> dict[str, nn.Module | torch.optim.Optimizer | None]:
        """The parts of a checkpoint."""
        model: nn.Module = self.objective.gpt
        ema_model: nn.Module | None = self.ema.model if self.ema else None
        if self.objective.gpt.config.lora:
            model, ema_model = LoRAWeights(model), ema_model and LoRAWeights(ema_model)
        return {
            "model": model,
            "ema": ema_model,
            "optimizer": self.stepper.optimizer,
            "objective": self.objective.heads,
        }


class MeanLoss:
    """Sums the loss of micro-batches on the device, so that the loop never waits for it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.total, self.count = torch.zeros((), device=world.device), 0

    def add(self, loss: torch.Tensor) -> None:
        """Add the loss of a micro-batch, which is divided by their number per step."""
        self.total += loss.detach()
        self.count += 1

    def take(self, gradient_accumulation: int) -> torch.Tensor:
        """The mean loss per step over all ranks since the last call; starts again from zero."""
        steps = self.count // gradient_accumulation
        mean = self.world.sum(self.total / steps) / self.world.size
        self.total.zero_()
        self.count = 0
        return mean


def evaluate(
    session: Session, objective: Objective, validation: Dataset | None, grid: SampleGrid
) -> None:
    """Report the validation loss and draw the sample grid; all ranks call it."""
    if validation:
        loss = validation_loss(objective, validation, grid.config, session.world)
        session.log_evaluation({"validation_loss": loss})
    if grid.draws:
        gpt = unsharded_copy(objective.gpt, session.world)
        if session.world.is_main:
            session.draw(grid.draw(gpt))


def build_models(
    config: TrainConfig,
    gpt_config: GPTConfig,
    world: World,
    initialized: bool,
    images: int = 0,
    codebook: torch.Tensor | None = None,
) -> TrainingModels:
    """Build the transformer, its EMA and its optimizer, sharded over the processes.

    initialized: False where a checkpoint is about to be loaded; the weights are then undefined.
    images, codebook: As for build_objective.
    """
    seed, chunk = config.training.seed, config.loss_chunk
    with torch.device("meta"):
        objective = build_objective(
            config.objective, GPT(gpt_config), chunk, seed, codebook, images
        )
    parallel = prepare(objective, config.parallel, world, config.training.precision, Block)
    gpt = objective.gpt
    gpt.build_rotary()
    if config.init_from and (initialized or gpt_config.lora):  # no checkpoint of LoRA has its base
        start_from(gpt, config.init_from, seed)
    elif initialized:
        initialize(gpt, seed)
    objective.prepare(seed, codebook)
    if objective.reference is not None and config.init_from:
        start_from(objective.reference, config.init_from, seed)
    ema, ema_objective = None, objective
    if config.training.ema_decay is not None:
        with torch.device("meta"):
            ema_objective = NextTokenLoss(GPT(gpt_config), chunk)
        ema_objective.requires_grad_(False).eval()
        shard(ema_objective, config.parallel, world, config.training.precision, Block)
        ema = EMA(gpt, config.training.ema_decay, ema_objective.gpt)
        if gpt_config.lora:
            share_base(gpt, ema.model)
    optimizer = build_optimizer(gpt, config.optimizer, gpt.hidden_matrices(), objective.heads)
    stepper = Stepper(optimizer, config.optimizer, world.device)
    return TrainingModels(objective, parallel, ema, ema_objective, stepper)


def training_batches(
    config: TrainConfig, data: Dataset, world: World, samples: int, objective: Objective
) -> Iterator[tuple[Any, ...]]:
    """This rank's micro-batches after `samples` samples: the arguments of Objective.forward."""
    seed, size = config.training.seed, config.training.batch_size
    order = ShuffledOrder(len(data), seed)
    while True:
        for positions in local_positions(
            samples, size, config.training.gradient_accumulation, world
        ):
            rows = order[positions]
            codes, condition = data.batch(rows, positions, seed)
            dropped = drop_condition(positions, config.condition_dropout, seed)
            # The places after them in the global batch, whatever this process has of it.
            after = samples + (positions - samples + 1) % size
            extra = objective.extra(rows, lambda at=after: data.batch(order[at], at, seed)[1])
            yield codes, condition, dropped, torch.from_numpy(positions), extra
        samples += size


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
