"""Evaluation during training: validation loss, sample grids, scores of samples; initial weights."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
from torch import nn

from autoregressive.data.codes import CodeDataset
from autoregressive.data.config import DataConfig, OnlineConfig
from autoregressive.data.open import Dataset, open_data
from autoregressive.inference.engine import InferenceEngine
from autoregressive.models.conditioning import ClassCondition, Condition
from autoregressive.models.config import GPTConfig
from autoregressive.models.gpt import GPT
from autoregressive.models.lora import CLASS_TABLE, NEW_CLASSES, is_lora_weight
from autoregressive.models.parallel_regions import REGION_TOKENS
from autoregressive.models.pretrained import read_gpt
from autoregressive.objectives.base import Objective
from autoregressive.sampling.loop import score_samples
from autoregressive.sampling.pipeline import ImagePipeline
from autoregressive.training.config import TrainConfig
from core.checksums import checkpoint_folders, find_damage, read_checksums
from core.config import InputError, load_config
from core.data.grids import image_grid
from core.distributed.config import Precision
from core.distributed.parallel import full_state, local
from core.distributed.world import World
from core.training.initialization import copy_weights, initialize
from core.training.prefetch import to_device
from core.training.safetensors_storage import read_headers
from core.weights import load_weights
from evaluations.scorer import open_scorer
from tokenizer.models.pretrained import load_tokenizer
from tokenizer.models.vq_model import VQModel

logger = logging.getLogger(__name__)


# Parts that an objective or parallel_regions adds to a model: weights without them are a start too.
ADDED_PARTS = ("t_embedder.", "target_position.", REGION_TOKENS)


def start_from(gpt: GPT, source: str, seed: int = 0) -> None:
    """Copy the weights of another training; raises InputError if they do not fit.

    `gpt` may be sharded: each process reads only the rows that it holds. Parts that an objective
    or LoRA adds, and that `source` does not have, get their initial values by `seed`; new classes
    start as the null class.
    """
    given = read_gpt(source, grid=gpt.config.grid)
    tensors, state = given.tensors, gpt.state_dict()
    if NEW_CLASSES in state:
        null = tensors[CLASS_TABLE][-1:]
        tensors = {**tensors, NEW_CLASSES: null.expand(len(state[NEW_CLASSES]), -1)}
    added = [n for n in state if n.startswith(ADDED_PARTS) or is_lora_weight(n)]
    added = [name for name in added if name not in tensors]
    if added:
        initialize(gpt, seed)
    copy_weights(gpt, tensors, source, kept=added)
    ours, theirs = gpt.config.text_encoder, given.config.text_encoder
    if ours and theirs and ours != theirs:
        raise InputError(f"init_from {source}: was trained with another text encoder")


def unsharded_copy(gpt: GPT, world: World, everywhere: bool = False) -> GPT:
    """A GPT that one process can sample from: on rank 0, or on every rank if `everywhere`.

    All ranks must call it, because the weights of a sharded model are gathered. A model that is
    not sharded is returned as it is.
    """
    if all(local(parameter) is parameter for parameter in gpt.parameters()):
        return gpt
    state = full_state(gpt, world, everywhere)
    if not state:
        return gpt
    with torch.device("meta"):
        whole = GPT(gpt.config)
    load_weights(whole, state, "the sharded model", assign=True)
    whole.build_rotary()
    return whole.to(world.device).eval()


def read_codebook(data: Dataset, config: DataConfig, world: World) -> torch.Tensor:
    """The vector of every code, (vocab, dim) float32, of the tokenizer that made the codes.

    Raises InputError where the tokenizer is missing or has changed.
    """
    vq, found = find_tokenizer(data, config, world)
    if vq is None:
        raise InputError(f"objective: it needs the tokenizer of the codes: {found}")
    codes = torch.arange(vq.config.vocab_size, device=world.device).view(1, -1, 1)
    return vq.quantize.lookup(codes)[0, :, :, 0].T.float().contiguous()


def check_resumable(
    out: Path, gpt_config: GPTConfig, tokenizer_names: Collection[str] = ()
) -> bool:
    """Whether `out` has a run to resume; raises InputError if that run used other codes.

    tokenizer_names: what older runs may know the tokenizer by, see data.codes.tokenizer_names.
    """
    steps = list(checkpoint_folders(out / "checkpoints").values())
    # The code that restores the run reports damaged checkpoints.
    whole = [step for step in steps if not find_damage(step, names=["config.yaml"])]
    if not whole:
        return bool(steps)
    found = load_config(GPTConfig, whole[-1] / "config.yaml")
    ours, theirs = gpt_config.lora, found.lora
    if (ours or theirs) and not (ours and ours.continues(theirs)):
        raise InputError(
            f"{out}: its run has {theirs or 'no lora'} and cannot be resumed with "
            f"{ours or 'no lora'}"
            + (", or with another base" if ours and theirs else "")
            + "; give the settings that it started with, or another --out"
        )
    for name in ("guidance_input", "target_position"):
        if getattr(gpt_config, name) != getattr(found, name):
            raise InputError(
                f"{out}: its run has another objective.kind; continue it with that one"
            )
    for name in ("condition", "grid", "vocab_size", "num_classes", "text_dim", "tokenizer_sha256"):
        ours, theirs = getattr(gpt_config, name), getattr(found, name)
        older = name == "tokenizer_sha256" and theirs in tokenizer_names
        if ours != theirs and not older:
            raise InputError(
                f"{out}: its run has {name} {theirs}, the data has {ours}, so it cannot be "
                f"resumed. To start from its weights, give --init_from {out} and another --out"
            )
    return True


def check_same_heads(out: Path, heads: nn.Module | None) -> None:
    """Raise InputError if the run in `out` has been trained with other heads of an objective.

    heads: Those of this run, on any device.
    """
    steps = list(checkpoint_folders(out / "checkpoints").values())
    # The code that restores the run reports damaged checkpoints.
    name = "training/objective.safetensors"
    whole = [step for step in steps if not find_damage(step, names=["config.yaml"])]
    if not whole:
        return
    ours, theirs = {}, {}
    if name in read_checksums(whole[-1]).files:
        if find_damage(whole[-1], names=[name]):
            return
        headers = read_headers({"": whole[-1] / name})
        theirs = {key: shape for key, (_, shape) in headers.items()}
    if heads is not None:
        ours = {f"/{name}": tuple(tensor.shape) for name, tensor in heads.state_dict().items()}
    if ours != theirs:
        raise InputError(
            f"{out}: its run has another objective.kind, or other sizes of its heads; continue it "
            f"with that objective, or give --init_from {out} and another --out"
        )


def open_validation(config: TrainConfig, gpt_config: GPTConfig, world: World) -> Dataset | None:
    """The validation data; raises InputError if it does not fit the training data."""
    if not config.validation:
        return None
    given = dataclasses.replace(
        config.data,
        codes=config.validation,
        features=config.validation_features,
        labels=(),
        online=OnlineConfig(),
    )
    validation = open_data(given, world, config.out)
    for name, theirs in validation.model_fields().items():
        ours = getattr(gpt_config, name)
        # With LoRA, the base may have more classes than its new data.
        more = name == "num_classes" and gpt_config.lora and ours > theirs
        if ours != theirs and not more:
            raise InputError(
                f"validation {config.validation[0]}: {name} is {theirs}, in data {ours}"
            )
    return validation


@torch.no_grad()
def validation_loss(
    objective: Objective, validation: Dataset, config: TrainConfig, world: World
) -> torch.Tensor:
    """Mean cross-entropy in nats per code, a scalar; the same for any number of processes."""
    count = min(len(validation), config.validation_samples or len(validation))
    size = max(
        1, config.training.batch_size // (world.size * config.training.gradient_accumulation)
    )
    total = torch.zeros(2, dtype=torch.float64, device=world.device)
    training = objective.training
    objective.eval()
    # FSDP2 needs the same number of calls on every rank; a call without samples has weight 0.
    for start in range(0, count, size * world.size):
        rows = np.arange(start, min(start + size * world.size, count))[world.rank :: world.size]
        shown = rows if len(rows) else np.array([0])
        batch = validation.batch(shown, shown, config.training.seed)
        with world.autocast(config.training.precision):
            loss = objective(*to_device(batch, world.device))
        total += torch.stack([loss.double(), torch.ones_like(loss)]) * len(rows)
    objective.train(training)
    total = world.sum(total)
    return total[0] / total[1]


class SampleScorer:
    """Scores samples during training. vq: the tokenizer of the codes, or None if it is missing."""

    def __init__(self, config: TrainConfig, data: Dataset, world: World) -> None:
        self.config, self.data, self.world = config, data, world
        self.vq, found = find_tokenizer(data, config.data, world)
        wanted = config.report.sample_every is not None
        if wanted and world.is_main:
            if self.vq is None:
                logger.warning("%s: no sample grids, because %s", config.out, found)
            else:
                print(f"{config.out}: sample grids are decoded by {found}")
        self.scorer = None
        if config.evaluation.every:
            self.scorer = open_scorer(config.metrics, "generation", world)
            if self.vq is None:
                raise InputError(f"evaluation.every needs the tokenizer of the codes: {found}")

    def due(self, step: int) -> bool:
        """Whether to score after `step` steps."""
        every = self.config.evaluation.every
        return every is not None and step % every == 0

    def score(self, gpt: GPT) -> dict[str, float]:
        """Scores by name (empty except on rank 0); all ranks call it."""
        assert self.scorer is not None and self.vq is not None
        count, sampling = self.config.evaluation.num_images, self.config.sampling
        pipeline = training_pipeline(gpt, self.vq, self.config.training.precision)
        conditions = lambda ids: self.data.conditions(ids.numpy())  # noqa: E731
        return score_samples(pipeline, conditions, count, sampling, self.scorer, self.world)


def training_pipeline(gpt: GPT, vq: VQModel, precision: Precision) -> ImagePipeline:
    """A pipeline of a GPT in training, on the device and in the precision of the training."""
    return ImagePipeline(gpt, vq, engine=InferenceEngine(gpt, precision))


def find_tokenizer(data: Dataset, config: DataConfig, world: World) -> tuple[VQModel | None, str]:
    """The tokenizer that made the codes, and where it is; None and the reason if it is not found.

    Looked for beside the codes, under the path or name that was given to tokenizer.encode, and, if
    that is no path, on the Hub.
    """
    source = data.index.get("tokenizer", "")
    if not source:
        return None, "the codes do not say which tokenizer made them"
    beside = data.index.get("tokenizer_path")
    places = [config.codes[0] / beside] if beside and config.codes else []
    existing = [path for path in (*places, Path(source)) if path.exists()]
    found = os.path.normpath(existing[0]) if existing else str(source)
    try:
        loaded = load_tokenizer(found)
    except InputError as error:
        return None, f"their tokenizer cannot be loaded ({error})"
    if not loaded.is_known_as(data.index["tokenizer_sha256"]):
        return None, f"{found} has changed since the codes were made"
    return loaded.vq.for_inference(world.device, torch.float32), found


class SampleGrid:
    """Draws the same conditions under the same noise each time, a row per class or prompt.

    draws: Whether there is anything to draw, the same on all ranks. Only rank 0 draws and has the
    conditions. It loads the text encoder, if one is needed, once and frees it again.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: Dataset,
        gpt_config: GPTConfig,
        vq: VQModel | None,
        world: World,
    ) -> None:
        self.vq, self.config = vq, config
        self.draws = bool(
            world.broadcast(vq is not None and config.report.sample_every is not None)
        )
        if isinstance(data, CodeDataset):
            wrong = [c for c in config.sample_classes if not 0 <= c < gpt_config.num_classes]
            if wrong and gpt_config.condition == "none":
                raise InputError("sample_classes: the model is unconditional (data.condition none)")
            if wrong:
                raise InputError(
                    f"sample_classes: {wrong[0]} is not in 0 .. {gpt_config.num_classes - 1}"
                )
        if self.draws and world.is_main:
            self.condition = self._conditions(data, gpt_config.num_classes)

    def _conditions(self, data: Dataset, num_classes: int) -> Condition:
        """The classes or prompts of the config, or the first ten of the data."""
        if isinstance(data, CodeDataset):
            if self.config.sample_classes:
                return ClassCondition(torch.tensor(self.config.sample_classes))
        elif self.config.sample_prompts:
            return data.encode(list(self.config.sample_prompts))
        return data.conditions(np.arange(min(10, max(1, num_classes))))

    def draw(self, gpt: GPT) -> np.ndarray:
        """An image grid (height, width, 3) uint8."""
        assert self.vq is not None
        columns = self.config.sample_columns
        pipeline = training_pipeline(gpt, self.vq, self.config.training.precision)
        condition = self.condition
        ids = torch.arange(len(condition) * columns)
        pixels = []
        for i in ids.split(16):
            codes = pipeline.sample(condition[i // columns], self.config.sampling, i)
            pixels.append(pipeline.decode(codes).cpu())
        return image_grid(torch.cat(pixels).numpy(), columns)
