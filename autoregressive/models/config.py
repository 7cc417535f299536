"""The configuration of a GPT: its transformer, and what its training data decides."""

from dataclasses import dataclass
from typing import Literal

from autoregressive.models.lora import LoRAConfig
from autoregressive.models.transformer import TransformerConfig

MAX_CODES = 2**20  # 1024 x 1024; the rotary table of more would fill the memory


@dataclass(frozen=True)
class GPTConfig(TransformerConfig):
    """The whole model: the transformer, and what the codes and captions decide.

    Args:
        condition: What an image is conditioned on: a class label, a caption, or nothing (the null
            class alone).
        num_classes: Number of classes, for condition class; 0 for condition none.
        vocab_size: Number of entries of the tokenizer's codebook.
        grid: Rows and columns of codes.
        tokenizer_sha256: sha256 of the weights (in older models: of the file) of the tokenizer
            whose codes the model was trained on; empty if unknown.
        text_dim: Width of the text features, for condition text.
        max_text_tokens: Largest number of tokens of a caption.
        text_encoder: Identity of the text encoder that the model was trained with; empty if
            unknown.
        guidance_input: The model takes the guidance strength as an input, and samples with one row
            per image instead of two (GFT).
        target_position: A vector of the grid position to predict is added to each input, for
            models trained in random order (RAR); zero at the start.
        lora: The weights are low-rank matrices that belong to a base model (models/lora.py); null
            for a whole model.
    """

    condition: Literal["class", "text", "none"] = "class"
    num_classes: int = 1000
    vocab_size: int = 16384
    grid: tuple[int, int] = (16, 16)
    tokenizer_sha256: str = ""
    text_dim: int = 2048
    max_text_tokens: int = 120
    text_encoder: str = ""
    guidance_input: bool = False
    target_position: bool = False
    lora: LoRAConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.condition == "none":
            object.__setattr__(self, "num_classes", 0)
        elif self.num_classes < 1:
            raise ValueError("model.num_classes must be >= 1")
        if min(self.vocab_size, *self.grid) < 1:
            raise ValueError("model: vocab_size and grid must be >= 1")
        if self.num_codes > MAX_CODES:
            raise ValueError(f"model.grid {self.grid}: at most {MAX_CODES} codes per image")
        if min(self.text_dim, self.max_text_tokens) < 1:
            raise ValueError("model: text_dim and max_text_tokens must be >= 1")
        if self.lora and self.lora.new_classes >= max(1, self.num_classes):
            raise ValueError(f"model.lora.new_classes: the base has a class, of {self.num_classes}")
        if self.adaln != "none" and self.condition == "text":
            raise ValueError("model.adaln needs a condition of one token: condition class or none")

    @property
    def num_codes(self) -> int:
        """Number of codes of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def num_condition(self) -> int:
        """Largest number of condition tokens."""
        return self.max_text_tokens if self.condition == "text" else 1

    @property
    def training_flops(self) -> float:
        """FLOPs of a training step per position: 6 P + 12 L d T, or 4 P + 12 L d T with lora.

        P: parameters of matrix products; L: layers; d: width; T: sequence length.
        """
        packed = (self.num_heads + 2 * self.kv_heads) * self.head_dim
        block = self.dim * (packed + self.dim + 3 * self.ffn_dim)
        products = self.num_layers * block + self.vocab_size * self.dim
        length = self.num_condition + self.num_codes - 1
        return (6 if self.lora is None else 4) * products + 12 * self.num_layers * self.dim * length
