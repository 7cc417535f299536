"""The configuration of sampling: the models, the conditions, and a sample run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from autoregressive.inference.sampling_config import ComputeConfig, SamplingConfig
from core.data.config import Cleaning
from core.distributed.config import Precision
from core.hub import Weights
from evaluations.metrics.config import MetricsConfig


@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """Which weights of a checkpoint to load.

    Args:
        gpt: auto takes the EMA weights of our runs.
        tokenizer: auto takes the EMA weights if there are any.
    """

    gpt: Weights = "auto"
    tokenizer: Weights = "auto"


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """The two models of an image pipeline, and how they run; commands that sample inherit it.

    Args:
        gpt: The GPT: a run or checkpoint folder, a released file, or a Hub id.
        tokenizer: The tokenizer: a run or checkpoint folder, a released file, or a Hub id.
        grid: Rows and columns of codes, for a released file that does not tell; null to infer.
        weights: Which weights of the two checkpoints to load.
        verify_weights: Compare the files of our checkpoints with their checksums.
        compute: Device and precision.
    """

    gpt: str
    tokenizer: str
    grid: tuple[int, int] | None = None
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    verify_weights: bool = True
    compute: ComputeConfig = field(default_factory=ComputeConfig)


Layout = Literal["flat", "geneval", "dpg"]


@dataclass(frozen=True, kw_only=True)
class ConditionConfig:
    """The classes or prompts to sample.

    Args:
        classes: Image i has class classes[i % len(classes)]. Empty: follow `labels`.
        labels: random (a random class per image, as in the published FIDs) or balanced (classes
            in turn).
        prompts: For a text model: a .txt (one prompt per line), a .tsv or .csv (with a column
            named prompt, caption or text), a .jsonl (with such a field), or a folder of .txt files
            with one prompt each.
        prompt: A single prompt instead of a file.
        images_per_prompt: Number of consecutive images of each prompt.
        negative_prompt: Guidance leads away from this text; null for the null caption.
        clean_prompts: clean (as language.encode cleans captions), reference (the published rules)
            or none.
        text_encoder: The text encoder of the text model: a T5's folder or Hub id, or wordllama.
        text_encoder_precision: bf16 or fp32.
    """

    classes: tuple[int, ...] = ()
    labels: Literal["random", "balanced"] = "random"
    prompts: Path | None = None
    prompt: str | None = None
    images_per_prompt: int = 1
    negative_prompt: str | None = None
    clean_prompts: Cleaning = "clean"
    text_encoder: str = "google/flan-t5-xl"
    text_encoder_precision: Precision = "bf16"

    def __post_init__(self) -> None:
        if self.images_per_prompt < 1:
            raise ValueError("images_per_prompt must be >= 1")
        if self.prompts and self.prompt:
            raise ValueError("give prompts or prompt, not both")
        if self.prompt == "":
            raise ValueError("prompt is empty")


@dataclass(frozen=True, kw_only=True)
class SampleRunConfig(PipelineConfig):
    """Settings of a sample run.

    Args:
        num_images: Number of images; null for 50,000 images of a class model, or for all prompts.
        conditions: The classes or prompts.
        sampling: Guidance, filters and seed.
        metrics: With metrics.reference, the images are scored while they are sampled and
            scores.json is written.
        out: Output folder: samples.png, samples.npz and index.json.
        resize: Resize to resize x resize pixels before rounding (bicubic, no antialiasing: how the
            reference evaluates 384 px models at 256 px); null to keep the size.
        batch_size: Images per batch on each process; does not change any image.
        shard_size: Images per shard; a killed run loses at most one shard per process.
        npz: Write samples.npz: arr_0 uint8 (n, height, width, 3), and the labels as arr_1. Without
            it only the codes are kept (512 bytes per image of 16 x 16 codes).
        png: Also write png files, in the folders of `layout`.
        layout: flat: png/000000.png, as scorers of COCO-30k and PartiPrompts read. geneval:
            png/00000/metadata.jsonl and png/00000/samples/0000.png. dpg: all images of a prompt in
            one image png/NAME.png (DPG-Bench: conditions.images_per_prompt 4).
        grid_rows: Rows of samples.png, one class per row where possible.
        grid_columns: Images per row of samples.png.
    """

    out: Path
    num_images: int | None = None
    conditions: ConditionConfig = field(default_factory=ConditionConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    resize: int | None = None
    batch_size: int = 32
    shard_size: int = 500
    npz: bool = True
    png: bool = False
    layout: Layout = "flat"
    grid_rows: int = 10
    grid_columns: int = 10

    def __post_init__(self) -> None:
        if self.num_images is not None and self.num_images < 1:
            raise ValueError("num_images must be >= 1, or null")
        if self.resize is not None and self.resize < 1:
            raise ValueError("resize must be >= 1, or null")
        if min(self.batch_size, self.shard_size, self.grid_rows, self.grid_columns) < 1:
            raise ValueError("batch_size, shard_size, grid_rows and grid_columns must be >= 1")
        if self.layout != "flat" and not self.png:
            raise ValueError(f"layout {self.layout} describes png files: set png true")
        if self.layout == "dpg" and self.shard_size % self.conditions.images_per_prompt:
            raise ValueError("layout dpg: shard_size must be a multiple of images_per_prompt")
