"""The VQGAN tokenizer: turns images into grids of codes and back."""

from typing import TYPE_CHECKING

from core import lazy_names

if TYPE_CHECKING:
    from tokenizer.models.config import VQConfig
    from tokenizer.models.vq_model import VQModel

__all__ = ["VQConfig", "VQModel"]

__getattr__ = lazy_names(
    __name__, {"VQConfig": "tokenizer.models.config", "VQModel": "tokenizer.models.vq_model"}
)
