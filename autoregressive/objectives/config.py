"""Which objective a training uses, and the options of each.

An objective is one file of this folder with one subclass of Objective, and a line here: the name of
the file in `Kind`. Its options, if it has any, are a dataclass and a field here, so that flags are
parsed, and help is shown, before torch is imported.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

Kind = Literal[
    "next_token",
    "next_patch",
    "alignment",
    "noisy_context",
    "guidance_free",
    "contrastive",
    "clusters",
    "random_order",
    "z_loss",
]


@dataclass(frozen=True)
class NextPatchOptions:
    """Options of the objective next_patch.

    Args:
        side: Side of a patch in codes, during the first stage.
        until: Share of the training after which single codes are predicted, in [0, 1].
    """

    side: int = 2
    until: float = 0.5

    def __post_init__(self) -> None:
        if self.side < 2 or not 0 < self.until <= 1:
            raise ValueError("objective.next_patch: side must be >= 2, until in (0, 1]")


@dataclass(frozen=True)
class AlignmentOptions:
    """Options of the objective alignment.

    Args:
        features: A `.npy` file (images, codes, dim), float16 or float32: the features of an image
            encoder at each code's grid position. Row i belongs to image i of data.codes, which
            then has one crop of each image.
        weight: Weight of the alignment; GEAR takes 0.5, Mirai and iFSQ take 2.
        depth_share: The states after this share of the blocks are aligned.
        shift: 0: the state that predicts a code is aligned with this code's features (GEAR); 1: the
            state whose input is the code (Mirai).
        hidden: Width of the network's hidden layers.
    """

    features: Path | None = None
    weight: float = 0.5
    depth_share: float = 1 / 3
    shift: int = 0
    hidden: int = 2048

    def __post_init__(self) -> None:
        if self.weight <= 0 or not 0 < self.depth_share <= 1 or self.hidden < 1:
            raise ValueError("objective.alignment: weight > 0, depth_share in (0, 1], hidden >= 1")
        if self.shift not in (0, 1):
            raise ValueError(f"objective.alignment.shift is {self.shift}, must be 0 or 1")


@dataclass(frozen=True)
class NoisyContextOptions:
    """Options of the objective noisy_context.

    Args:
        noise: Largest share of replaced input codes; each image draws its share below it.
        noise_end: Share of the training at which the noise has fallen linearly to 0, in (0, 1].
        embedding_weight: Weight of the two heads; 0 trains without them.
        encode_block: The block (from 0) that the head of input codes reads.
        decode_share: The head of predicted codes reads the block at this share of the depth; reAR
            takes block 15 of 20 and 18 of 24.
        hidden: Width of the heads' hidden layers.
    """

    noise: float = 1.0
    noise_end: float = 0.75
    embedding_weight: float = 1.0
    encode_block: int = 0
    decode_share: float = 0.75
    hidden: int = 2048

    def __post_init__(self) -> None:
        if not (0 <= self.noise <= 1 and 0 < self.noise_end <= 1 and 0 < self.decode_share <= 1):
            raise ValueError(
                "objective.noisy_context: noise in [0, 1], noise_end and decode_share in (0, 1]"
            )
        if self.embedding_weight < 0 or self.encode_block < 0 or self.hidden < 1:
            raise ValueError(
                "objective.noisy_context: embedding_weight and encode_block >= 0, hidden >= 1"
            )


@dataclass(frozen=True)
class GuidanceFreeOptions:
    """Options of the objective guidance_free.

    Args:
        least: Smallest guidance strength beta that is trained, in [0, 1); the largest is 1.
    """

    least: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.least < 1:
            raise ValueError("objective.guidance_free.least must be in [0, 1)")


@dataclass(frozen=True)
class ContrastiveOptions:
    """Options of the objective contrastive.

    Args:
        beta: Factor on the differences of log-likelihoods, > 0.
        negative_weight: Weight lambda of the images with another class; published: 1000 for B, XL
            and XXL, 300 for L, 500 for 3B.
    """

    beta: float = 0.02
    negative_weight: float = 1000.0

    def __post_init__(self) -> None:
        if self.beta <= 0 or self.negative_weight <= 0:
            raise ValueError("objective.contrastive: beta and negative_weight must be > 0")


@dataclass(frozen=True)
class ClustersOptions:
    """Options of the objective clusters.

    Args:
        count: Number of clusters, of equal size.
        weight: Weight of the cross-entropy of the cluster.
        iterations: Largest number of iterations of k-means.
    """

    count: int = 128
    weight: float = 1.0
    iterations: int = 100

    def __post_init__(self) -> None:
        if self.count < 2 or self.weight <= 0 or self.iterations < 1:
            raise ValueError("objective.clusters: count >= 2, weight > 0, iterations >= 1")


@dataclass(frozen=True)
class RandomOrderOptions:
    """Options of the objective random_order.

    Args:
        start: Until this share of the training, every order is random.
        end: From this share on, every order is raster; linear between them.
    """

    start: float = 0.5
    end: float = 0.75

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end <= 1:
            raise ValueError("objective.random_order needs 0 <= start < end <= 1")


@dataclass(frozen=True)
class ZLossOptions:
    """Options of the objective z_loss.

    Args:
        weight: Factor of the squared logarithm of the normaliser; 1e-5 in the paper.
    """

    weight: float = 1e-5

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise ValueError(f"objective.z_loss.weight is {self.weight}, must be > 0")


@dataclass(frozen=True)
class ObjectiveConfig:
    """The training objective. Options of one that is not in use must have their defaults.

    Args:
        kind: What is minimised.
            next_token: Cross-entropy of the next code (LlamaGen).
            next_patch: Cross-entropy, first of patches of codes, which are shorter sequences (NPP).
            alignment: Cross-entropy, and hidden states aligned with features of the images (REPA).
            noisy_context: Cross-entropy behind a noisy context, heads for codes' vectors (reAR).
            guidance_free: Guidance becomes an input, and sampling takes half the rows (GFT).
            contrastive: Fine-tuning after which no guidance is needed (CCA); needs init_from.
            clusters: Cross-entropy of codes and of clusters of similar codes (IAR).
            random_order: Cross-entropy in random orders, which become raster order (RAR).
            z_loss: Cross-entropy that keeps the logits' normaliser near one (Chameleon).
        next_patch: Options of next_patch.
        alignment: Options of alignment.
        noisy_context: Options of noisy_context.
        guidance_free: Options of guidance_free.
        contrastive: Options of contrastive.
        clusters: Options of clusters.
        random_order: Options of random_order.
        z_loss: Options of z_loss.
    """

    kind: Kind = "next_token"
    next_patch: NextPatchOptions = field(default_factory=NextPatchOptions)
    alignment: AlignmentOptions = field(default_factory=AlignmentOptions)
    noisy_context: NoisyContextOptions = field(default_factory=NoisyContextOptions)
    guidance_free: GuidanceFreeOptions = field(default_factory=GuidanceFreeOptions)
    contrastive: ContrastiveOptions = field(default_factory=ContrastiveOptions)
    clusters: ClustersOptions = field(default_factory=ClustersOptions)
    random_order: RandomOrderOptions = field(default_factory=RandomOrderOptions)
    z_loss: ZLossOptions = field(default_factory=ZLossOptions)

    def __post_init__(self) -> None:
        for part in fields(self):
            value = getattr(self, part.name)
            if part.name not in ("kind", self.kind) and value != type(value)():
                raise ValueError(f"objective.{part.name} is set, but objective.kind is {self.kind}")

    @property
    def options(self) -> Any:  # noqa: ANN401 - the dataclass of the kind in use
        """The options of the objective in use; None for one without any."""
        return getattr(self, self.kind, None)
