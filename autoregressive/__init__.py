"""The GPT: predicts the codes of an image one after the other, given a class or a caption.

Names are loaded on first use, so that importing one light module of this package, as a vLLM plugin
does, needs none of the packages that only the commands need.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoregressive.inference.generate import generate
    from autoregressive.models.config import GPTConfig
    from autoregressive.models.gpt import GPT
    from autoregressive.sampling.pipeline import ImagePipeline

__all__ = ["GPT", "GPTConfig", "ImagePipeline", "generate"]

_MODULES = {
    "GPT": "autoregressive.models.gpt",
    "GPTConfig": "autoregressive.models.config",
    "ImagePipeline": "autoregressive.sampling.pipeline",
    "generate": "autoregressive.inference.generate",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - any of the exported names
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
