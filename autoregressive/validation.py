"""What a decoder's training starts from and shows: validation, sample grids, scores of samples."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from autoregressive.data.codes import CodeDataset
from autoregressive.data.config import OnlineConfig
from autoregressive.data.open import Dataset, open_data
from autoregressive.inference.engine import InferenceEngine
from autoregressive.inference.generate import sample_codes
from autoregressive.models.conditioning import as_condition
from autoregressive.models.config import GPTConfig
from autoregressive.models.gpt import GPT
from autoregressive.models.pretrained import load_gpt
from autoregressive.objectives.next_token import NextTokenLoss
from autoregressive.pipeline import decode_pixels
from autoregressive.sample import score_samples
from core.config import InputError, load_config
from core.data.grids import image_grid
from core.distributed.world import World
from core.training.prefetch import to_device
from core.weights import inference_files, load_weights
from evaluations.scorer import MetricsConfig, open_scorer
from tokenizer.models.pretrained import load_tokenizer
from tokenizer.models.vq_model import VQModel

if TYPE_CHECKING:
    from autoregressive.train import TrainConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(MetricsConfig):
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


def start_from(gpt: GPT, source: str) -> None:
    """Take over the weights of another training; InputError where they do not fit."""
    given = load_gpt(source, grid=gpt.config.grid).gpt
    load_weights(gpt, given.state_dict(), source)
    ours, theirs = gpt.config.text_encoder, given.config.text_encoder
    if ours and theirs and ours != theirs:
        raise InputError(f"init_from {source}: trained with another text encoder")


def check_resumable(out: Path, gpt_config: GPTConfig) -> bool:
    """Whether there is a run to resume; raises InputError for one on other codes: that is none."""
    if not list((out / "checkpoints").glob("step_*/checksums.json")):
        return False
    found = load_config(GPTConfig, inference_files(out, "model")[0])
    for name in ("condition", "grid", "vocab_size", "num_classes", "text_dim", "tokenizer_sha256"):
        ours, theirs = getattr(gpt_config, name), getattr(found, name)
        if ours != theirs:
            raise InputError(
                f"{out}: its run has {name} {theirs}, the data has {ours}, so it cannot be "
                f"resumed. To start from its weights: --init_from {out} and another --out"
            )
    return True


def open_validation(config: TrainConfig, gpt_config: GPTConfig, world: World) -> Dataset | None:
    """The validation data; raises InputError where it does not fit the training data."""
    if not config.validation:
        return None
    given = dataclasses.replace(
        config.data,
        codes=config.validation,
        features=config.validation_features,
        labels=(),
        live=OnlineConfig(),
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
    objective: NextTokenLoss, validation: Dataset, config: TrainConfig, world: World
) -> torch.Tensor:
    """Mean cross-entropy per code over the same samples on any number of processes, a scalar."""
    count = min(len(validation), config.validation_samples or len(validation))
    size = max(1, config.batch_size // (world.size * config.gradient_accumulation))
    total = torch.zeros(2, dtype=torch.float64, device=world.device)
    training = objective.training
    objective.eval()
    # Every rank makes the same number of calls, as FSDP2 needs; one without samples counts nothing.
    for start in range(0, count, size * world.size):
        rows = np.arange(start, min(start + size * world.size, count))[world.rank :: world.size]
        shown = rows if len(rows) else np.array([0])
        batch = validation.batch(shown, shown, config.seed)
        with world.autocast(config.precision):
            loss = objective(*to_device(batch, world.device))
        total += torch.stack([loss.double(), torch.ones_like(loss)]) * len(rows)
    objective.train(training)
    total = world.sum(total)
    return total[0] / total[1]


class SampleScorer:
    """Scores samples every so often; `vq` is the codes' tokenizer, where it still stands."""

    def __init__(self, config: TrainConfig, data: Dataset, world: World) -> None:
        self.config, self.data, self.world = config, data, world
        self.vq = find_tokenizer(data, world)
        self.judge = None
        if config.evaluation.every:
            self.judge = open_scorer(config.evaluation, "generation", world)
            if self.vq is None:
                raise InputError(
                    f"evaluation: the tokenizer {data.index.get('tokenizer')} is gone or changed"
                )

    def due(self, step: int) -> bool:
        """Whether to score after `step` steps."""
        return self.judge is not None and step % self.config.evaluation.every == 0

    def score(self, gpt: GPT) -> dict[str, float]:
        """Scores by name (empty off rank 0); all ranks call it."""
        assert self.judge is not None and self.vq is not None
        count, sampling = self.config.evaluation.num_images, self.config.sampling
        conditions = self.data.conditions
        decoder = InferenceEngine(gpt, self.config.precision)
        return score_samples(decoder, self.vq, conditions, count, sampling, self.judge, self.world)


def find_tokenizer(data: Dataset, world: World) -> VQModel | None:
    """The tokenizer that made the codes, where it still stands: it decodes the sample grids."""
    path = data.index.get("tokenizer", "")
    if not path or not Path(path).exists():
        return None
    vq, sha256 = load_tokenizer(path)
    if sha256 != data.index["tokenizer_sha256"]:
        logger.warning("%s has changed since the codes were made: no sample grids", path)
        return None
    return vq.for_inference(world.device, torch.float32)


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
        columns, decoder = self.config.sample_columns, InferenceEngine(gpt, self.config.precision)
        condition = as_condition(self.condition)
        ids = torch.arange(len(condition) * columns)
        pixels = []
        for i in ids.split(16):
            codes = sample_codes(decoder, condition[i // columns], self.config.sampling, i)
            pixels.append(decode_pixels(self.vq, codes).cpu())
        return image_grid(torch.cat(pixels).numpy(), columns)
