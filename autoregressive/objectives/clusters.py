"""Cross-entropy of the code and of its cluster (IAR, arXiv 2501.00880).

Codes with similar vectors form a cluster, so that a similar wrong code costs less. The codebook and
the weights keep their order.
"""

from dataclasses import dataclass

import torch

from autoregressive.models.config import GPTConfig
from autoregressive.models.gpt import GPT
from autoregressive.objectives.base import Batch, Objective
from core.config import InputError
from core.training.linear_cross_entropy import linear_cross_entropy


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


class ClustersLoss(Objective):
    """Cross-entropy of codes and of clusters of similar codes (IAR)."""

    options_type = ClustersOptions
    needs_codebook = True
    clusters: torch.Tensor

    def __init__(self, gpt: GPT, chunk: int, seed: int, options: ClustersOptions) -> None:
        super().__init__(gpt, chunk, seed)
        self.options = options

    def check(self, config: GPTConfig, images: int) -> None:
        """Refuse a vocabulary that has no clusters of equal size."""
        if config.vocab_size % self.options.count:
            raise InputError(
                f"objective.clusters.count {self.options.count} must divide the vocabulary of "
                f"{config.vocab_size}"
            )

    def set_codebook(self, codebook: torch.Tensor) -> None:
        """Cluster the vectors; the same clusters on every process and after every resume."""
        found = balanced_clusters(
            codebook.cpu(), self.options.count, self.seed, self.options.iterations
        )
        self.register_buffer("clusters", found.to(codebook.device), persistent=False)

    def training_loss(self, batch: Batch) -> torch.Tensor:
        """The sum of both, in one pass over the logits."""
        hidden = self.gpt.hidden(batch.codes, batch.condition, batch.drop_condition)
        return linear_cross_entropy(
            hidden.flatten(0, 1),
            self.gpt.output.weight,
            batch.codes.flatten(),
            self.chunk,
            clusters=self.clusters,
            cluster_weight=self.options.weight,
        )


def balanced_clusters(
    vectors: torch.Tensor, count: int, seed: int, iterations: int
) -> torch.Tensor:
    """k-means with clusters of equal size: vectors (n, dim) -> the cluster of each, (n,) int64.

    The nearest pairs of a vector and a center are joined first, until the cluster is full.
    """
    capacity = len(vectors) // count
    generator = torch.Generator().manual_seed(seed)
    centers = vectors[torch.randperm(len(vectors), generator=generator)[:count]]
    clusters = torch.full((len(vectors),), -1)
    for _ in range(iterations):
        before, clusters = clusters, _assign(torch.cdist(vectors, centers), capacity)
        if torch.equal(before, clusters):
            break
        sums = torch.zeros_like(centers).index_add_(0, clusters, vectors)
        centers = sums / capacity
    return clusters


def _assign(distances: torch.Tensor, capacity: int) -> torch.Tensor:
    """Give each row to its nearest column that still has room, in rounds; (n,) int64."""
    distances = distances.clone()
    clusters = torch.full((len(distances),), -1)
    room = torch.full((distances.shape[1],), capacity)
    while (clusters < 0).any():
        left = torch.nonzero(clusters < 0)[:, 0]
        least, wanted = distances[left].min(dim=1)
        for column in wanted.unique().tolist():
            asking = left[wanted == column]
            nearest = least[wanted == column].argsort(stable=True)
            taken = asking[nearest[: int(room[column])]]
            clusters[taken] = column
            room[column] -= len(taken)
            if room[column] == 0:
                distances[:, column] = torch.inf
    return clusters
