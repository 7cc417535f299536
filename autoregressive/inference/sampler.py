"""From logits to codes: temperature, top-k, top-p, and one seeded draw."""

from dataclasses import dataclass

import numpy as np
import torch

from core.rng import random_bits, random_uniform


@dataclass(frozen=True)
class TopKTopPSampler:
    """How a code is drawn; see SamplingConfig. Equal ones draw alike, so that graphs are shared."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    greedy: bool = False

    def __call__(
        self, logits: torch.Tensor, noise: torch.Tensor, position: torch.Tensor
    ) -> torch.Tensor:
        """Logits (n, vocab) float32, random bits and positions (n, 1) int64 -> codes (n,) int64.

        Gumbel-max with noise from (noise, position, code): exact, needs no sum over the
        vocabulary, and rounding differences between batch sizes almost never change the winner.
        """
        if self.greedy:
            return logits.argmax(dim=-1)
        logits = logits / max(self.temperature, 1e-5)
        noise = random_bits(noise, position)
        filters = 0 < self.top_k < logits.shape[-1] or self.top_p < 1
        if filters and logits.device.type == "cpu":
            # Noise for those alone that can win; elsewhere their number would be a host sync.
            least = logit_threshold(logits, self.top_k, self.top_p)
            row, entries = (logits >= least).nonzero(as_tuple=True)
            scores = gumbel(noise[row, 0], entries).add_(logits[row, entries])
            return (
                torch.full_like(logits, float("-inf")).index_put_((row, entries), scores).argmax(-1)
            )
        if filters:
            logits = filter_logits(logits, self.top_k, self.top_p)
        entries = torch.arange(logits.shape[-1], device=logits.device)
        return (logits + gumbel(noise, entries)).argmax(dim=-1)


def gumbel(noise: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise float32 of each code, from random bits; int64, broadcast together."""
    uniform = random_uniform(noise, entries)
    return -torch.log(-torch.log1p(-uniform))


def filter_logits(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Set what top-k, then top-p on the rest, leave out to -inf: (n, vocab) -> the same.

    Codes that tie with the last one kept are kept.
    """
    return logits.masked_fill(logits < logit_threshold(logits, top_k, top_p), float("-inf"))


def logit_threshold(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """The least logit that top-k, then top-p on the rest, keep: (n, vocab) -> (n, 1)."""
    vocab = logits.shape[-1]
    least, likeliest = torch.full_like(logits[:, :1], float("-inf")), None
    if 0 < top_k < vocab and top_p == 1:
        return _kth_largest(logits, top_k)
    if 0 < top_k < vocab:
        likeliest = logits.topk(top_k).values
        least = likeliest[:, -1:]
    if top_p == 1:
        return least
    total = logits.masked_fill(logits < least, float("-inf")).logsumexp(dim=-1, keepdim=True)
    if likeliest is None and logits.device.type == "cpu":
        likeliest = logits.topk(max(1, vocab // 16)).values
        if ((likeliest - total).exp().sum(-1) <= top_p).any():
            likeliest = None  # they do not reach top_p: sort them all
    if likeliest is None:
        likeliest = logits.sort(dim=-1, descending=True).values
    before = (likeliest - total).exp().cumsum(dim=-1)[:, :-1]
    # The first code that crosses top_p stays.
    count = (before <= top_p).sum(dim=-1, keepdim=True)
    return likeliest.gather(1, count)


def _kth_largest(logits: torch.Tensor, k: int) -> torch.Tensor:
    """(n, vocab) -> (n, 1)."""
    if logits.device.type != "cpu":
        return logits.topk(k, sorted=False).values.amin(-1, keepdim=True)
    # numpy selects with vector instructions: nine times as fast as topk here.
    place = logits.shape[-1] - k
    return torch.from_numpy(np.partition(logits.numpy(), place, axis=-1)[:, place : place + 1])
