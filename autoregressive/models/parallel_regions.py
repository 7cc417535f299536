"""The sequence of a model that predicts one code of each region at a time (PAR).

Wang et al. 2024, "Parallelized Autoregressive Visual Generation", arXiv 2412.15119. The grid is
cut into n regions of equal shape. The first code of each region is predicted one by one. After that
a step predicts the next code of every region: codes far from one another depend little on one
another.

The tokens behind the condition are: the n first codes; n - 1 learned tokens, which form the first
group with the last of these codes; then the codes in groups of n, without the last group. Token i
of a group predicts the code of region i in the next one. A token sees its whole group and all that
is before it.
"""

import functools
import math

import torch
from torch import nn

from autoregressive.models.transformer import Attend, causal_attention


def region_order(
    grid: tuple[int, int], regions: int, device: torch.device | None = None
) -> torch.Tensor:
    """The grid position of each code in turn, (rows * columns,) int64."""
    (rows, columns), side = grid, math.isqrt(regions)
    positions = torch.arange(rows * columns, device=device)
    cut = positions.view(side, rows // side, side, columns // side)
    return cut.permute(1, 3, 0, 2).flatten()


REGION_TOKENS = "spe_tok_embeddings.special_embeddings.weight"


class RegionTokens(nn.Module):
    """The learned tokens, and the order of all tokens behind the condition.

    Args:
        grid: Rows and columns of codes, multiples of the square root of `regions`.
        regions: Number of regions, a square.
        dim: Width of the transformer.
    """

    def __init__(self, grid: tuple[int, int], regions: int, dim: int) -> None:
        super().__init__()
        self.grid, self.regions = grid, regions
        self.special_embeddings = nn.Embedding(regions - 1, dim)

    def order(self, device: torch.device) -> torch.Tensor:
        """The grid position of each code in turn, (codes,) int64."""
        return region_order(self.grid, self.regions, device)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Vectors of all codes but the last, in raster order -> tokens, both (batch, N - 1, dim).

        The last group is predicted only, and the last code belongs to it.
        """
        special = self.special_embeddings.weight.to(inputs.dtype)
        parts = [inputs, special.expand(len(inputs), -1, -1)]
        learned = inputs.shape[1] + torch.arange(self.regions - 1, device=inputs.device)
        return torch.cat(parts, dim=1)[:, self._tokens(learned)]

    def rotary_rows(self, num_condition: int, device: torch.device) -> torch.Tensor:
        """Row of the rotary table of each token, (N - 1,) int64; learned tokens are conditions."""
        learned = torch.full((self.regions - 1,), -1, device=device)
        return num_condition + self._tokens(learned)

    def steps(self, num_prefix: int, device: torch.device) -> torch.Tensor:
        """The step of each condition token and each token, (num_prefix + N - 1,) int64.

        A token sees those of its own step and of earlier ones.
        """
        single = num_prefix + self.regions - 1  # tokens that have a step of their own
        count = num_prefix + self.grid[0] * self.grid[1] - 1
        tokens = torch.arange(count, device=device)
        group = single + (tokens - single).div(self.regions, rounding_mode="floor")
        return torch.where(tokens < single, tokens, group)

    def attend(
        self,
        num_prefix: int,
        device: torch.device,
        order: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
    ) -> Attend:
        """Attention of a token to those of its own step and of earlier ones.

        order, lengths: for captions, the tokens' order (conditioning.ragged_order) and (batch,) the
            captions' lengths; None: every image has num_prefix condition tokens.
        """
        steps = self.steps(num_prefix, device)[None]
        if order is not None and lengths is not None:
            steps = steps.expand(len(order), -1).gather(1, order)
            # Padding comes last, and no other token sees it.
            count = order.shape[1]
            padding = torch.arange(count, device=device) >= lengths[:, None] + count - num_prefix
            steps = steps.masked_fill(padding, count)
        mask = (steps[:, None, :] <= steps[:, :, None])[:, None]
        return functools.partial(causal_attention, mask=mask)

    def in_raster_order(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, N, dim) in the order of the codes -> in raster order."""
        return x[:, self.order(x.device).argsort()]

    def _tokens(self, learned: torch.Tensor) -> torch.Tensor:
        """The grid positions of the tokens, with `learned` (regions - 1,) for the learned ones."""
        order, n = self.order(learned.device), self.regions
        return torch.cat([order[:n], learned, order[n:-n]])
