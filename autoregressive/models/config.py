"""The configuration of a GPT: its transformer, and what its training data decides."""

import math
from dataclasses import dataclass
from typing import Literal

MAX_LAYERS = 1000  # more would take minutes to build even without memory

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
    """Shape and regularisation of the transformer, without what the training data decides.

    Args:
        num_layers: Number of transformer blocks.
        num_heads: Number of attention heads.
        dim: Width of the residual stream; a multiple of 4 x num_heads (2-D rotary embedding).
        num_kv_heads: Number of key and value heads, for grouped-query attention; 0: num_heads.
        ffn_multiple: The FFN's hidden width, 8/3 dim, is rounded up to a multiple of this.
        norm_eps: Epsilon of the RMSNorms.
        rope_base: Base of the rotary frequencies.
        rope_condition: Rotary rows of condition tokens: zero, as in the released models, or
            identity, which leaves their queries and keys as they are.
        token_dropout: Dropout rate on the embedded sequence.
        residual_dropout: Dropout rate on the attention's output.
        ffn_dropout: Dropout rate on the FFN's output.
        drop_path: Stochastic depth rate; grows linearly over the blocks from 0 to this value. The
            paper sets residual_dropout and ffn_dropout to 0 when it is used.
        qk_norm: RMSNorm over head_dim on queries and keys, before the rotation (Henry et al.,
            arXiv 2010.04245; Dehghani et al., arXiv 2302.05442): stabilises large models.
        adaln: Adaptive norms, for a condition of one token: a class. none; full: in every block a
            linear layer turns the condition into scales, shifts and gains of attention and FFN
            (IBQ, arXiv 2412.02692); shared: one such layer for all blocks, and in each block a
            table that is added (VAR, arXiv 2404.02905): 6 dim instead of 6 dim^2 weights per block.
            With both, one more layer gives scale and shift of the last norm.
        adaln_gain: Factor on the initial weights of the gains, with adaln; IBQ takes 1e-3 for its
            B and L models, 1e-4 for XL and 1e-5 for XXL.
        parallel_regions: Number of regions of the image that are predicted in parallel, one code
            of each per step (PAR, arXiv 2412.15119): 4 or 16. The model learns n - 1 more tokens;
            sampling takes codes / n + n - 1 steps. null: one code per step, in raster order.
        family: llama: RMSNorm, SwiGLU, rotary positions, no biases. rar: the transformer of RAR
            and reAR (arXiv 2411.00776, 2510.04450): LayerNorm, GELU, biases, learned positions, a
            learned first token, and adaptive norms whose condition differs from token to token; it
            needs adaln full and qk_norm.
        ffn_width: Hidden width of the FFN; null: 8/3 dim as said above, and 4 dim in the family
            rar.
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
    qk_norm: bool = False
    adaln: Literal["none", "shared", "full"] = "none"
    adaln_gain: float = 1e-3
    parallel_regions: int | None = None
    family: Literal["llama", "rar"] = "llama"
    ffn_width: int | None = None

    def __post_init__(self) -> None:
        if min(self.num_layers, self.num_heads, self.dim, self.ffn_multiple) < 1:
            raise ValueError("model: num_layers, num_heads, dim and ffn_multiple must be >= 1")
        if self.num_layers > MAX_LAYERS:
            raise ValueError(f"model.num_layers is {self.num_layers}, must be <= {MAX_LAYERS}")
        if self.dim % (4 * self.num_heads):
            raise ValueError(
                f"model.dim {self.dim} must be a multiple of 4 x model.num_heads "
                f"{self.num_heads}: the 2-D rotary embedding splits each head into four parts"
            )
        if self.norm_eps <= 0 or self.rope_base <= 0:
            raise ValueError("model: norm_eps and rope_base must be > 0")
        if self.num_kv_heads < 0 or self.num_heads % self.kv_heads:
            raise ValueError(
                f"model.num_kv_heads {self.num_kv_heads} must divide num_heads {self.num_heads}"
            )
        regions = self.parallel_regions
        if regions is not None and (regions < 4 or math.isqrt(regions) ** 2 != regions):
            raise ValueError(
                f"model.parallel_regions is {regions}, must be a square >= 4: regions "
                "form a grid of 2 x 2, 3 x 3, ...; null: no regions"
            )
        if self.ffn_width is not None and self.ffn_width < 1:
            raise ValueError(f"model.ffn_width is {self.ffn_width}, must be >= 1, or null")
        if self.family == "rar":
            self._check_rar()
        for name in ("token_dropout", "residual_dropout", "ffn_dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}, must be in [0, 1)")

    def _check_rar(self) -> None:
        """Raise ValueError for what the family rar does not have."""
        if self.adaln != "full" or not self.qk_norm:
            raise ValueError("model.family rar needs model.adaln full and model.qk_norm true")
        if self.parallel_regions:
            raise ValueError("model.parallel_regions needs rotary positions: model.family llama")
        if self.dim % (8 * self.num_heads):
            raise ValueError(
                f"model.family rar: model.dim {self.dim} must be a multiple of 8 x model.num_heads "
                f"{self.num_heads}"
            )

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
        if self.ffn_width is not None:
            return self.ffn_width
        if self.family == "rar":
            return 4 * self.dim
        return -(-int(8 * self.dim / 3) // self.ffn_multiple) * self.ffn_multiple


# The linear layers of a block: q | k | v packed, the attention's output, and the three of SwiGLU.
Target = Literal["wqkv", "wo", "w1", "w2", "w3"]


TARGETS: tuple[Target, ...] = ("wqkv", "wo", "w1", "w2", "w3")


@dataclass(frozen=True)
class LoRAOptions:
    """Fine-tuning with low-rank matrices; see models/lora.py. It needs init_from.

    Args:
        rank: Rank of the matrices that are added to linear layers; null to train all weights.
        alpha: Their product is multiplied by alpha / rank.
        targets: The linear layers of every block that get them: wqkv, wo (attention), w1, w2, w3
            (feed-forward). All other weights stay as the base has them.
    """

    rank: int | None = None
    alpha: float = 16.0
    targets: tuple[Target, ...] = TARGETS

    def __post_init__(self) -> None:
        if self.rank is None and (self.alpha != 16.0 or self.targets != TARGETS):
            raise ValueError("lora: give lora.rank, or leave out lora.alpha and lora.targets")
        if self.rank is not None and (self.rank < 1 or self.alpha <= 0):
            raise ValueError("lora: rank must be >= 1, or null, and alpha > 0")
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError("lora.targets: name at least one layer, and each of them once")


@dataclass(frozen=True)
class LoRAConfig:
    """The low-rank matrices of a model, and the base model that they belong to.

    Args:
        rank: Rank of the matrices.
        alpha: Their product is multiplied by alpha / rank.
        targets: The linear layers of every block that have them.
        base: The base model, as init_from named it: a path, a released name or a Hub id.
        base_path: Path to the base from the checkpoint's folder; null if it is not a local path.
        base_sha256: sha256 of the base's weights; see core.weights.tensors_sha256.
        new_classes: Number of classes that the base does not have; they come after its classes.
    """

    rank: int
    alpha: float
    targets: tuple[Target, ...]
    base: str = ""
    base_path: str | None = None
    base_sha256: str = ""
    new_classes: int = 0

    @property
    def scale(self) -> float:
        """Factor of the product of the two matrices."""
        return self.alpha / self.rank

    def continues(self, other: "LoRAConfig | None") -> bool:
        """Whether a run with `other` can continue with these settings: the base may have moved."""
        names = ("rank", "alpha", "targets", "base_sha256", "new_classes")
        return other is not None and all(getattr(self, n) == getattr(other, n) for n in names)

    def __str__(self) -> str:
        """The settings that a user chose, for messages."""
        return f"lora.rank {self.rank}, alpha {self.alpha:g}, targets {','.join(self.targets)}"


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
        self._check_regions()

    def _check_regions(self) -> None:
        """Raise ValueError for regions that the grid cannot be cut into."""
        if self.parallel_regions is None:
            return
        side = math.isqrt(self.parallel_regions)
        if any(size % side for size in self.grid) or self.parallel_regions == self.num_codes:
            raise ValueError(
                f"model.parallel_regions {self.parallel_regions}: a grid of {self.grid} codes "
                f"cannot be cut into {side} x {side} equal regions of several codes"
            )
        if self.target_position:
            raise ValueError(
                "model.parallel_regions and target_position cannot be combined: regions have one "
                "order of codes"
            )

    @property
    def num_codes(self) -> int:
        """Number of codes of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def num_condition(self) -> int:
        """Largest number of condition tokens."""
        if self.condition == "text":
            return self.max_text_tokens
        return 2 if self.family == "rar" else 1  # rar has a learned token before the class

    @property
    def training_flops(self) -> float:
        """FLOPs of a training step per position: 6 P + 12 L d T, or 4 P + 12 L d T with lora.

        P: parameters of matrix products; L: layers; d: width; T: sequence length.
        """
        packed = (self.num_heads + 2 * self.kv_heads) * self.head_dim
        ffn, adaptive = (2, 6 * self.dim) if self.family == "rar" else (3, 0)
        block = self.dim * (packed + self.dim + ffn * self.ffn_dim + adaptive)
        products = self.num_layers * block + self.vocab_size * self.dim
        length = self.num_condition + self.num_codes - 1
        return (6 if self.lora is None else 4) * products + 12 * self.num_layers * self.dim * length
