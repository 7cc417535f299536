"""The configuration of a reconstruction; tokenizer.reconstruct inherits it."""

from dataclasses import dataclass, field
from pathlib import Path

from core.data.config import check_image_size, check_num_workers
from core.distributed.config import DeviceName, Precision
from core.hub import Weights
from evaluations.metrics.config import MetricsConfig
from tokenizer.quantizers.config import PerturbationConfig


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    """Which tokenizer, which images, and which scores.

    Args:
        tokenizer: A run or checkpoint folder, a released file, or a Hub id.
        data: Images: a folder of class folders, a flat folder, a list file, tars, or a folder of
            jsonl files.
        out: The folder for scores.json and reconstructions.png.
        image_size: Height and width of the centre crop; null for the size that the tokenizer was
            trained at.
        rfid: Also compute rFID and the other scores of evaluations.score, which need the weights
            of the feature extractor.
        metrics: For rfid: the feature extractor, and the reference; without a reference, the
            reconstructions are compared with `data` itself.
        perturbation: Replace codes by near ones before decoding. The scores then have the prefix
            perturbed_, and rfid is called pfid (RobustTok).
        lpips: Also compute LPIPS, which needs the weights of VGG16.
        vgg_weights: torchvision's vgg16-397923af.pth; null to use its cache or to download it.
        grid_images: Number of images in reconstructions.png.
        grid_columns: Images per row.
        grid_spread: Show images spread evenly over the data, and so over its classes, instead of
            the first ones.
        weights: The weights to load; auto takes the EMA weights if there are any.
        verify_weights: Compare the files of our checkpoints with their checksums.
        batch_size: Images per forward pass on each process.
        num_workers: Loader processes per rank.
        precision: bf16 or fp32.
        device: auto, cpu, cuda or mps.
    """

    tokenizer: str
    data: Path
    out: Path
    image_size: tuple[int, int] | None = None
    rfid: bool = False
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    perturbation: PerturbationConfig = field(default_factory=PerturbationConfig)
    lpips: bool = False
    vgg_weights: Path | None = None
    grid_images: int = 16
    grid_columns: int = 8
    grid_spread: bool = False
    weights: Weights = "auto"
    verify_weights: bool = True
    batch_size: int = 32
    num_workers: int = 8
    precision: Precision = "fp32"
    device: DeviceName = "auto"

    def __post_init__(self) -> None:
        check_num_workers(self.num_workers)
        if self.image_size:
            check_image_size(*self.image_size)
        if min(self.grid_images, self.grid_columns, self.batch_size) < 1:
            raise ValueError("grid_images, grid_columns and batch_size must be >= 1")
        if self.perturbation.anneal_steps:
            raise ValueError("perturbation.anneal_steps is for training; leave it null")
