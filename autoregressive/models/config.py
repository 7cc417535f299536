"""The transformer's configuration and the published sizes."""

from dataclasses import dataclass
from typing import Literal

# name: (num_layers, num_heads, dim)
PRESETS = {
    "GPT-B": (12, 12, 768),
    "GPT-L": (24, 16, 1024),
    "GPT-XL": (36, 20, 1280),
    "GPT-XXL": (48, 24, 1536),
    "GPT-XXXL": (48, 40, 2560),
    "GPT-1B": (22, 32, 2048),
    "GPT-3B": (24, 32, 3200),
    "GPT-7B": (32, 32, 4096),
}


@dataclass(frozen=True)
class TransformerConfig:
    """The decoder's shape, without what the codes and captions decide.

    Args:
        num_layers: Transformer blocks.
        num_heads: Attention heads.
        dim: Width; a multiple of num_heads.
        num_kv_heads: Key and value heads, for grouped-query attention; 0 for num_heads.
        ffn_multiple: The FFN's hidden width, 8/3 dim, is rounded up to a multiple of this.
        norm_eps: Epsilon of the RMSNorms.
        rope_base: Base of the rotary frequencies.
        rope_condition: Rotary rows of condition tokens; zero as released, or identity.
        token_dropout: Dropout on the embedded sequence, in training.
        residual_dropout: Dropout on the attention's output.
        ffn_dropout: Dropout on the FFN's output.
        drop_path: Stochastic depth, growing linearly to this rate at the last block. The paper
            sets residual_dropout and ffn_dropout to 0 where it is used.
    """

    num_layers: int = 12
    num_heads: int = 12
    dim: int = 768
    num_kv_heads: int = 0
    ffn_multiple: int = 256
    norm_eps: float = 1e-5
    rope_base: float = 10000.0
    rope_condition: Literal["zero", "identity"] = "zero"
    token_dropout: float = 0.0
    residual_dropout: float = 0.0
    ffn_dropout: float = 0.0
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        if min(self.num_layers, self.num_heads, self.dim, self.ffn_multiple) < 1:
            raise ValueError("model: num_layers, num_heads, dim and ffn_multiple must be >= 1")
        if self.dim % self.num_heads or self.head_dim % 2:
            raise ValueError(
                f"model.dim {self.dim} must be an even multiple of num_heads {self.num_heads}"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"model.num_kv_heads {self.num_kv_heads} must divide num_heads {self.num_heads}"
            )
        for name in ("token_dropout", "residual_dropout", "ffn_dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}, must be in [0, 1)")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def ffn_dim(self) -> int:
        """Hidden width of the FFN."""
        return -(-int(8 * self.dim / 3) // self.ffn_multiple) * self.ffn_multiple


@dataclass(frozen=True)
class GPTConfig(TransformerConfig):
    """The whole decoder: its shape, and what the codes and captions decide.

    Args:
        condition: What an image is conditioned on.
        num_classes: Classes, for condition class.
        vocab_size: Entries of the tokenizer's codebook.
        grid: Rows and columns of codes.
        tokenizer_sha256: The tokenizer whose codes the model was trained on; empty if unknown.
        text_dim: Width of the text features, for condition text.
        max_text_tokens: The longest caption, in tokens.
        text_encoder: What tells the text encoder that the model was trained with from others;
            empty if unknown.
    """

    condition: Literal["class", "text"] = "class"
    num_classes: int = 1000
    vocab_size: int = 16384
    grid: tuple[int, int] = (16, 16)
    tokenizer_sha256: str = ""
    text_dim: int = 2048
    max_text_tokens: int = 120
    text_encoder: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.num_classes, self.vocab_size, *self.grid) < 1:
            raise ValueError("model: num_classes, vocab_size and grid must be >= 1")

    @property
    def num_codes(self) -> int:
        """Codes per image."""
        return self.grid[0] * self.grid[1]

    @property
    def num_condition(self) -> int:
        """The most condition tokens."""
        return 1 if self.condition == "class" else self.max_text_tokens

    @property
    def training_flops(self) -> float:
        """FLOPs of a training step per position: 6 P + 12 L d T, P the parameters of products."""
        packed = (self.num_heads + 2 * self.kv_heads) * self.head_dim
        block = self.dim * (packed + self.dim + 3 * self.ffn_dim)
        products = self.num_layers * block + self.vocab_size * self.dim
        length = self.num_condition + self.num_codes - 1
        return 6 * products + 12 * self.num_layers * self.dim * length
