"""The GPT: predicts an image's codes one by one under a class or a caption.

Names are loaded when they are first used, so that a light module of this package (a plugin of
another program, say) does not import what only commands need.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoregressive.inference.generate import generate
    from autoregressive.models.config import GPTConfig
    from autoregressive.models.gpt import GPT

__all__ = ["GPT", "GPTConfig", "generate"]

_MODULES = {
    "GPT": "autoregressive.models.gpt",
    "GPTConfig": "autoregressive.models.config",
    "generate": "autoregressive.inference.generate",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever is exported
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
