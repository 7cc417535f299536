"""The VQGAN tokenizer: turns images into grids of codes and back."""

from tokenizer.model import VQConfig, VQModel

__all__ = ["VQConfig", "VQModel"]
