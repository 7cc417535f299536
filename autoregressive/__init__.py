"""The GPT: predicts the codes of an image one after the other, given a class or a caption."""

from typing import TYPE_CHECKING

from core import lazy_names

if TYPE_CHECKING:
    from autoregressive.inference.generate import generate
    from autoregressive.models.config import GPTConfig
    from autoregressive.models.gpt import GPT
    from autoregressive.sampling.pipeline import ImagePipeline

__all__ = ["GPT", "GPTConfig", "ImagePipeline", "generate"]

__getattr__ = lazy_names(
    __name__,
    {
        "GPT": "autoregressive.models.gpt",
        "GPTConfig": "autoregressive.models.config",
        "ImagePipeline": "autoregressive.sampling.pipeline",
        "generate": "autoregressive.inference.generate",
    },
)
