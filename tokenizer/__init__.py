"""The VQGAN tokenizer: turns images into grids of codes and back."""

from tokenizer.models.config import VQConfig
from tokenizer.models.vq_model import VQModel

__all__ = ["VQConfig", "VQModel"]
