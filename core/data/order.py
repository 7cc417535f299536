"""The seeded order of training samples; a position in it is one integer."""

import numpy as np

from core.config import InputError
from core.distributed.world import World


class ShuffledOrder:
    """An endless order over `size` samples: every epoch is another seeded permutation."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self._epochs: dict[int, np.ndarray] = {}

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        """Positions (n,) in the endless sequence -> sample numbers (n,) int64."""
        epochs, offsets = positions // self.size, positions % self.size
        result = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            result[here] = self._permutation(int(epoch))[offsets[here]]
        return result

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            # A batch may contain the end of one epoch and the start of the next.
            self._epochs = {k: v for k, v in self._epochs.items() if k >= epoch - 1}
            random = np.random.default_rng((self.seed, epoch))
            self._epochs[epoch] = random.permutation(self.size)
        return self._epochs[epoch]


def local_positions(
    first: int, batch_size: int, accumulation: int, world: World
) -> list[np.ndarray]:
    """This rank's share of the global batch at position `first`: one array per micro-batch.

    Micro-batch m of rank r is chunk m * world.size + r, so that any number of ranks and of
    accumulation steps sees the same samples in one optimizer step.
    """
    chunks = np.arange(first, first + batch_size).reshape(accumulation * world.size, -1)
    return [chunks[m * world.size + world.rank] for m in range(accumulation)]


def check_batch_size(batch_size: int, accumulation: int, world: World) -> None:
    """Raise InputError unless the global batch splits evenly over ranks and accumulation steps."""
    if batch_size <= 0 or batch_size % (accumulation * world.size):
        raise InputError(
            f"batch_size {batch_size} must be a positive multiple of gradient_accumulation "
            f"{accumulation} x {world.size} processes"
        )
