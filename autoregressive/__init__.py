"""The GPT: predicts the codes of an image one after the other, given a class or a caption."""

from typing import TYPE_CHECKING, Any

from autoregressive.inference.generate import generate
from autoregressive.models.config import GPTConfig
from autoregressive.models.gpt import GPT

if TYPE_CHECKING:
    from autoregressive.pipeline import ImagePipeline

__all__ = ["GPT", "GPTConfig", "ImagePipeline", "generate"]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    # Loaded on first use: the pipeline needs the tokenizer package and the text encoder's.
    if name == "ImagePipeline":
        from autoregressive.pipeline import ImagePipeline

        return ImagePipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
