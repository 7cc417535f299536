"""The GPT: predicts an image's codes one by one, from a class or a caption."""

from autoregressive.inference.generate import generate
from autoregressive.models.config import GPTConfig
from autoregressive.models.gpt import GPT

__all__ = ["GPT", "GPTConfig", "generate"]
