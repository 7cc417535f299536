"""Whether images show what their names say: retrieval of the right name among a hundred.

The protocol is that of R-precision (Xu et al. 2018, AttnGAN, section 4): the right candidate stands
among 99 others, drawn at random. A candidate here is a real image of its name, so that no network
for text is needed. Chance is 1 / candidates for the first place.
"""

import torch
from torch.nn import functional as F

from core.rng import random_uniform

CANDIDATES = 100


def retrieval_ranks(
    queries: torch.Tensor,
    wanted: torch.Tensor,
    gallery: torch.Tensor,
    candidates: int = CANDIDATES,
    seed: int = 0,
) -> torch.Tensor:
    """The place of the right name for each image, (n,) int64 in 0 .. candidates - 1; 0 is best.

    queries: features (n, dim) of generated images. gallery: features (m, dim) of one real image
    for each name, m >= candidates. wanted: the names asked for, (n,) int64 rows of the gallery.
    Similarity is the cosine after the gallery's mean is subtracted. Others that are as similar as
    the right one come before it. The other candidates of image i depend on (seed, i) alone.
    """
    assert 1 < candidates <= len(gallery), "fewer names than candidates"
    mean = gallery.float().mean(0)
    ours, theirs = (F.normalize(x.float() - mean, dim=1) for x in (queries, gallery))
    similarity = ours @ theirs.T
    rows, columns = torch.arange(len(queries))[:, None], torch.arange(len(gallery))[None]
    order = random_uniform(seed, rows, columns)
    order[rows[:, 0], wanted] = 2.0  # beyond the others: never its own competitor
    others = order.argsort(1)[:, : candidates - 1]
    return (similarity.gather(1, others) >= similarity.gather(1, wanted[:, None])).sum(1)


def top_k_shares(ranks: torch.Tensor, places: tuple[int, ...] = (1, 5)) -> dict[str, float]:
    """Ranks (n,) of retrieval_ranks -> the share of images whose name is in the first k places."""
    return {f"top{k}": float((ranks < k).double().mean()) for k in places}
