"""2-D rotary position embedding: half of each head rotates with the row, half with the column."""

from typing import Literal

import torch


def rotary_table(
    grid: tuple[int, int],
    head_dim: int,
    base: float,
    num_condition: int,
    condition_rows: Literal["zero", "identity"],
) -> torch.Tensor:
    """cos and sin for the condition tokens, then for each grid position in raster order.

    Returns (num_condition + height * width, head_dim // 2, 2) float32; head_dim must be a multiple
    of 4. In the released models the rows of condition tokens are zeros, which makes their queries
    and keys zero: attention to the condition does not depend on content. "identity" rows leave
    queries and keys as they are.
    """
    half = head_dim // 2
    frequencies = base ** -(torch.arange(0, half, 2, dtype=torch.float32) / half)
    height, width = grid
    row_angles = torch.arange(height)[:, None] * frequencies
    column_angles = torch.arange(width)[:, None] * frequencies
    angles = torch.cat(
        [
            row_angles[:, None].expand(height, width, -1),
            column_angles[None].expand(height, width, -1),
        ],
        dim=-1,
    ).flatten(0, 1)
    grid_rows = torch.stack([angles.cos(), angles.sin()], dim=-1)
    condition = torch.zeros(num_condition, half, 2)
    if condition_rows == "identity":
        condition[..., 0] = 1
    return torch.cat([condition, grid_rows])


def identity_table(length: int, head_dim: int) -> torch.Tensor:
    """Rows that leave queries and keys as they are, (length, head_dim // 2, 2) float32."""
    table = torch.zeros(length, head_dim // 2, 2)
    table[..., 0] = 1
    return table


def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotate interleaved pairs (2i, 2i + 1) of x (batch, length, heads, head_dim), in float32.

    table: rows of rotary_table, (length, head_dim // 2, 2) or (batch or 1, length, head_dim // 2,
    2). Returns the shape and dtype of x.
    """
    pairs = x.float().unflatten(-1, (-1, 2))
    cos, sin = table.unsqueeze(-3).unbind(-1)
    even, odd = pairs.unbind(-1)
    rotated = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return rotated.flatten(-2).type_as(x)
