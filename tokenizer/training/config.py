"""The configuration of tokenizer.train."""

from dataclasses import dataclass, field
from pathlib import Path

from core.data.images import check_image_size
from core.data.loader import check_num_workers
from core.distributed.parallel import ParallelConfig
from core.training.config import TrainingConfig
from core.training.optimizer import OptimizerConfig
from core.training.run import ReportConfig
from evaluations.features.extractors import ExtractorConfig
from tokenizer.losses.objective import LossConfig
from tokenizer.models.config import VQConfig
from tokenizer.models.discriminator import DiscriminatorConfig
from tokenizer.quantizers.perturbation import PerturbationConfig


@dataclass(frozen=True)
class TrainConfig:
    """A training run of the tokenizer.

    Args:
        data: Training images: a folder of class folders, a flat folder, or a list file.
        out: The run's folder.
        validation: Images to reconstruct during training; null for the training images.
        validation_images: How many of them to use for the scores; the first 16 are drawn.
        rfid: Also report the Frechet distance between these images and their reconstructions. It is
            called rfid only for the network of FID.
        metrics: For rfid: the feature extractor.
        image_size: Height and width of the crops.
        crop_scale: Smallest random crop, as a fraction of the resized short side.
        init_from: Start from these weights (a file, folder or Hub id) with fresh optimizers; null
            for random weights.
        init_discriminator: Start the discriminator from these weights: a released training file, a
            released name, or training/discriminator.safetensors of a checkpoint; null for random
            weights.
        training: Length, batch size, precision and seed. With bf16, the nearest-code search stays
            in float32.
        model: Shape of the tokenizer.
        discriminator: Shape of the discriminator.
        loss: The terms of the loss and their weights.
        perturbation: Replaces codes by near ones before the decoder.
        optimizer: The tokenizer's optimizer, and that of the projector of loss.distillation.
        discriminator_optimizer: The discriminator's optimizer.
        parallel: Compile and activation checkpointing.
        report: How often to report, evaluate and save.
        num_workers: Data loader processes per rank.
        dry_run: Print the configuration, its size and memory without activations, and stop.
    """

    data: Path
    out: Path
    validation: Path | None = None
    validation_images: int = 256
    rfid: bool = False
    metrics: ExtractorConfig = field(default_factory=ExtractorConfig)
    image_size: tuple[int, int] = (256, 256)
    crop_scale: float = 0.8
    init_from: str | None = None
    init_discriminator: str | None = None
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(400360, 128))
    model: VQConfig = field(default_factory=VQConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    perturbation: PerturbationConfig = field(default_factory=PerturbationConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    discriminator_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    num_workers: int = 8
    dry_run: bool = False

    def __post_init__(self) -> None:
        if self.parallel.strategy != "ddp":
            raise ValueError("parallel.strategy: the tokenizer trains only under ddp")
        if "muon" in (self.optimizer.kind, self.discriminator_optimizer.kind):
            raise ValueError(
                "optimizer.kind muon is for the transformer: the tokenizer has no blocks"
            )
        check_image_size(*self.image_size)
        if self.model.image_size not in (None, self.image_size):
            raise ValueError("model.image_size is that of the training images: leave it out")
        check_num_workers(self.num_workers)
        if self.validation_images < 1:
            raise ValueError("validation_images must be >= 1")
        if self.rfid and self.validation_images < 2:
            raise ValueError("rfid needs validation_images >= 2")
        if not self.rfid and self.metrics != ExtractorConfig():
            raise ValueError("metrics: these options need rfid true")
        self.perturbation.check(self.model.vocab_size)
        if not 0 < self.crop_scale <= 1:
            raise ValueError("crop_scale must be in (0, 1]")
        if any(side < 1 or side % self.model.downsample for side in self.image_size):
            raise ValueError(
                f"image_size {self.image_size} must be divisible by {self.model.downsample}"
            )
