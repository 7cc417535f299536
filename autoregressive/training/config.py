"""The configuration of autoregressive.train."""

from dataclasses import dataclass, field
from pathlib import Path

from autoregressive.data.config import DataConfig
from autoregressive.inference.sampling_config import SamplingConfig
from autoregressive.models.config import LoRAOptions, TransformerConfig
from autoregressive.objectives.config import ObjectiveConfig
from core.distributed.config import ParallelConfig
from core.training.config import OptimizerConfig, ReportConfig, TrainingConfig
from evaluations.metrics.config import MetricsConfig

LORA_LACKS = (
    "objective.kind {} needs parts that LoRA does not train; take another objective.kind, or leave "
    "lora out"
)


@dataclass(frozen=True)
class EvaluationConfig:
    """How often samples are scored during training, and how many.

    Args:
        every: Interval between evaluations in optimizer steps; null for none.
        num_images: Number of images to sample for an evaluation, over all classes in turn.
    """

    every: int | None = None
    num_images: int = 5000

    def __post_init__(self) -> None:
        if (self.every is not None and self.every < 1) or self.num_images < 2:
            raise ValueError("evaluation: every must be >= 1, or null; num_images must be >= 2")


@dataclass(frozen=True)
class TrainConfig:
    """A training run of the transformer.

    Args:
        out: The run's folder.
        init_from: Start from these weights (a run or checkpoint folder, a released file, a Hub
            id) at step 0 with a fresh optimizer; the grid may differ. null for random weights.
        data: The codes to train on, and the captions' features. Vocabulary, grid, classes and
            text encoder are read from them.
        validation: Codes for the validation loss; empty for none.
        validation_features: Features of their captions, for a text model.
        validation_samples: How many of them to use at most; null for all.
        training: Length, batch size, precision and seed.
        model: Shape of the transformer. With lora, that of the base: leave it out, but for dropout.
        lora: Fine-tuning of a few weights of init_from; off by default.
        objective: What is minimised: cross-entropy of the next code, or another objective.
        optimizer: AdamW or Muon, and the learning-rate schedule.
        parallel: DDP, FSDP2 or HSDP, compile and activation checkpointing.
        report: How often to report, evaluate and save.
        evaluation: How often to score samples, and how many.
        metrics: The scores of these samples and their reference.
        loss_chunk: Number of tokens per process whose float32 logits exist at the same time.
        condition_dropout: Fraction of samples trained with the null condition, for guidance.
        sampling: Sampling settings of the sample grids.
        sample_classes: Classes of the sample grids, a row each; empty for the first ten.
        sample_prompts: Prompts of the sample grids of a text model, a row each; empty for the
            captions of the first ten training images.
        sample_columns: Images per row.
        dry_run: Print the configuration, its size and memory by strategy, check, and stop.
    """

    out: Path
    data: DataConfig
    validation: tuple[Path, ...] = ()
    validation_features: Path | None = None
    validation_samples: int | None = 10000
    init_from: str | None = None
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(1501200, 256))
    model: TransformerConfig = field(default_factory=TransformerConfig)
    lora: LoRAOptions = field(default_factory=LoRAOptions)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    loss_chunk: int = 1024
    condition_dropout: float = 0.1
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    sample_classes: tuple[int, ...] = ()
    sample_prompts: tuple[str, ...] = ()
    sample_columns: int = 8
    dry_run: bool = False

    def __post_init__(self) -> None:
        if min(self.loss_chunk, self.sample_columns) < 1:
            raise ValueError("loss_chunk and sample_columns must be >= 1")
        if self.validation_samples is not None and self.validation_samples < 1:
            raise ValueError("validation_samples must be >= 1, or null for all")
        if not 0 <= self.condition_dropout < 1:
            raise ValueError("condition_dropout must be in [0, 1)")
        if self.objective.kind == "contrastive" and self.init_from is None:
            raise ValueError("objective.kind contrastive fine-tunes a model: give init_from")
        if self.lora.rank is not None:
            self._check_lora()
        elif self.data.first_class:
            raise ValueError("data.first_class is for fine-tuning with lora: give lora.rank")
        if self.optimizer.kind == "muon" and self.lora.rank is not None:
            raise ValueError("optimizer.kind muon is for whole matrices, not for those of lora")
        if self.optimizer.kind == "muon" and self.parallel.strategy != "ddp":
            raise ValueError(
                "optimizer.kind muon needs whole matrices: leave parallel.strategy at ddp"
            )
        if self.objective.kind == "guidance_free":
            if not self.condition_dropout:
                raise ValueError(
                    "objective.kind guidance_free: condition_dropout must be > 0: it trains the "
                    "null class"
                )
            self.sampling.resolved("class", guidance_input=True)  # refuses a cfg_scale
        self.sampling.check_order(self.model.parallel_regions)
        if self.evaluation.every and self.metrics.reference is None:
            raise ValueError("evaluation.every needs metrics.reference")

    def _check_lora(self) -> None:
        """Refuse what LoRA cannot train."""
        kind = self.objective.kind
        if self.init_from is None:
            raise ValueError("lora fine-tunes a model: give init_from")
        if kind == "contrastive":
            raise ValueError(f"lora: {LORA_LACKS.format(kind)}")
