"""Keys and values of the positions decoded so far: an argument of the model, allocated once."""

import torch


class KVCache:
    """Per-layer key and value buffers (batch, heads, capacity, head_dim), filled from the left."""

    def __init__(
        self,
        num_layers: int,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [torch.empty_like(keys) for keys in self.keys]
        self.length = 0

    def append(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store (batch, heads, new, head_dim) after the valid prefix -> views of all of it."""
        end = self.length + keys.shape[2]
        self.keys[layer][:, :, self.length : end] = keys
        self.values[layer][:, :, self.length : end] = values
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def advance(self, count: int) -> None:
        """Make `count` positions valid, after every layer has appended them."""
        self.length += count

    def keep_rows(self, count: int) -> None:
        """Drop all but the first `count` rows of the batch; a view, nothing moves."""
        self.keys = [keys[:count] for keys in self.keys]
        self.values = [values[:count] for values in self.values]
