"""The decoder: predicts an image's codes one by one under a class or a caption."""

from autoregressive.model import GPT, GPTConfig
from autoregressive.sampling import generate

__all__ = ["GPT", "GPTConfig", "generate"]
