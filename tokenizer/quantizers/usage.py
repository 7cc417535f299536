"""How much of the codebook is used."""

import torch

from core.distributed.world import World


class CodebookUsage:
    """Counts how often each code occurs over a data set; no host sync until it is asked."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.counts = torch.zeros(vocab_size, dtype=torch.int64, device=device)

    def update(self, codes: torch.Tensor) -> None:
        """Count codes of any shape, int64."""
        codes = codes.flatten()
        # Not bincount: on CUDA it asks the device for the largest code, which is a host sync.
        self.counts.scatter_add_(0, codes, torch.ones_like(codes))

    def result(self, world: World) -> dict[str, float]:
        """Over all ranks: codebook_usage in [0, 1] (share of codes seen) and perplexity."""
        counts = world.sum(self.counts.clone()).double()
        share = counts / counts.sum().clamp(min=1)
        entropy = -(share * share.clamp(min=1e-300).log()).sum()
        return {
            "codebook_usage": float((counts > 0).double().mean()),
            "perplexity": float(entropy.exp()),
        }
