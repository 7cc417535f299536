"""Learned positions, and a condition for every token (RAR, arXiv 2411.00776; reAR, 2510.04450)."""

import torch
from torch import nn


class LearnedPositions(nn.Module):
    """The vectors that the family rar adds to its tokens: a first token, the class, then codes.

    cls_token: (dim,), the first token. positions: (N + 2, dim), added to the first token, the
    class, and the code at each grid position. steps: (N + 1, dim), added to the class for the
    adaptive norms of each token in turn.
    """

    PREFIX = 2  # the first token and the class

    def __init__(self, num_codes: int, dim: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(dim))
        self.positions = nn.Parameter(torch.zeros(num_codes + self.PREFIX, dim))
        self.steps = nn.Parameter(torch.zeros(num_codes + self.PREFIX - 1, dim))

    def prefix(self, classes: torch.Tensor) -> torch.Tensor:
        """Class tokens (batch, 1, dim) -> the first token and the class, (batch, 2, dim)."""
        first = self.cls_token.to(classes.dtype).expand_as(classes)
        return torch.cat([first, classes], dim=1) + self.positions[: self.PREFIX].to(classes.dtype)

    def place(self, inputs: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Codes' vectors (batch, n, dim) at grid positions (batch or 1, n), with these added."""
        return inputs + self.positions[self.PREFIX + positions].to(inputs.dtype)

    def conditions(self, classes: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """What the adaptive norms of the tokens at `places` (rows or 1, n) read: (rows, n, dim)."""
        return classes + self.steps[places].to(classes.dtype)
