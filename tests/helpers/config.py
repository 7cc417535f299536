"""A small config dataclass."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Inner:
    """Inner.

    Args:
        lr: A rate.
        kind: One of two.
    """

    lr: float = 1e-4
    kind: Literal["a", "b"] = "a"

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"inner.lr is {self.lr}, must be > 0")
