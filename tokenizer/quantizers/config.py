"""Options of the quantizers that have any, and of the perturbation of codes."""

from dataclasses import dataclass
from typing import Literal

from core.errors import InputError

LARGEST_GROUP = 20  # the entropy of a group takes 2 ** group_size probabilities of each vector


@dataclass(frozen=True)
class VectorOptions:
    """Options of the quantizer vq alone.

    Args:
        gradient: How the decoder's gradient reaches the encoder. straight_through: unchanged.
            rotation: rotated and scaled by the map from a vector to its entry (Fifty et al. 2024,
            section 4).
        dead_codes: What happens to entries that no vector chooses. keep: nothing. cvq: each
            micro-batch moves them to vectors of the batch (CVQ-VAE, section 3.2).
    """

    gradient: Literal["straight_through", "rotation"] = "straight_through"
    dead_codes: Literal["keep", "cvq"] = "keep"


@dataclass(frozen=True)
class FiniteScalarOptions:
    """Options of the quantizer fsq alone.

    Args:
        levels: Levels of each channel, at least 3: as many as codebook_dim, with the product
            vocab_size. For two levels, the signs, take quantizer lfq or bsq: here the bound of the
            published code would put their border at -3.8.
        bound: tanh (FSQ), or sigmoid (iFSQ; odd levels only).
    """

    levels: tuple[int, ...] = (8, 8, 8, 8, 4)
    bound: Literal["tanh", "sigmoid"] = "tanh"


@dataclass(frozen=True)
class BinarySphericalOptions:
    """Options of the quantizer bsq alone; entropy_weight is the published zeta.

    Args:
        group_size: Channels whose joint entropy is computed, a divisor of codebook_dim; entropies
            of groups are added. 1 is the published "analytical" form.
        inverse_temperature: Of the soft assignments; the entropy loss is divided by it.
        sample_entropy_weight: Weight of the mean entropy of a vector, which is minimised.
        codebook_entropy_weight: Weight of the entropy of the mean assignment, which is maximised.
    """

    group_size: int = 9
    inverse_temperature: float = 1.0
    sample_entropy_weight: float = 1.0
    codebook_entropy_weight: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.group_size <= LARGEST_GROUP or self.inverse_temperature <= 0:
            raise ValueError(
                f"model.bsq: group_size must be in 1 .. {LARGEST_GROUP}, inverse_temperature > 0"
            )
        if min(self.sample_entropy_weight, self.codebook_entropy_weight) < 0:
            raise ValueError("model.bsq: the weights must be >= 0")


@dataclass(frozen=True)
class PerturbationConfig:
    """Which codes are replaced.

    Args:
        image_share: Share of the images of a batch with replaced codes (beta); 0 for none.
            Published: 0.1.
        probability: Probability of replacing a code of these images (alpha).
        neighbors: A code is replaced by one of this many nearest codes, itself included, with equal
            probability (delta).
        anneal_steps: During training, probability and neighbors fall from the first of these
            optimizer steps to the second, linearly; null for never.
        final_ratio: They fall to this share of their values.
    """

    image_share: float = 0.0
    probability: float = 1.0
    neighbors: int = 100
    anneal_steps: tuple[int, int] | None = None
    final_ratio: float = 0.5

    def __post_init__(self) -> None:
        shares = (self.image_share, self.probability, self.final_ratio)
        if min(shares) < 0 or max(shares) > 1 or self.neighbors < 1:
            raise ValueError(
                "perturbation: image_share, probability and final_ratio must be in [0, 1], "
                "neighbors >= 1"
            )
        if self.anneal_steps and not 0 <= self.anneal_steps[0] < self.anneal_steps[1]:
            raise ValueError(f"perturbation.anneal_steps {self.anneal_steps} must ascend from >= 0")

    def check(self, vocab_size: int) -> None:
        """Raise InputError for options without use, and for fewer codes than neighbors."""
        if not self.image_share and self != PerturbationConfig():
            raise InputError("perturbation: these options need perturbation.image_share > 0")
        if self.image_share and self.neighbors > vocab_size:
            raise InputError(f"perturbation.neighbors {self.neighbors}: only {vocab_size} codes")
