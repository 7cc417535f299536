"""Which models a command samples with, and how they run; every command that samples inherits it."""

from dataclasses import dataclass, field

from autoregressive.inference.compute import ComputeConfig
from autoregressive.sampling.pipeline import ImagePipeline
from core.distributed.world import World
from core.weights import Weights


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
    """The two models of an image pipeline, and how they run.

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

    def load_pipeline(self) -> ImagePipeline:
        """Load both models; InputError if one is missing or the two do not fit each other."""
        return ImagePipeline.from_pretrained(
            self.gpt,
            self.tokenizer,
            gpt_weights=self.weights.gpt,
            tokenizer_weights=self.weights.tokenizer,
            grid=self.grid,
            verify_weights=self.verify_weights,
        )

    def prepare(self, pipeline: ImagePipeline, batches: int, world: World) -> None:
        """Put the models on this process's device, to sample `batches` batches of images."""
        pipeline.prepare(
            **self.compute.arguments(),
            device=world.device,
            num_steps=batches * pipeline.gpt.config.num_codes,
            verbose=world.is_main,
        )
