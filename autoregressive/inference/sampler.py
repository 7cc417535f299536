"""From logits to codes: temperature, top-k, top-p, and one seeded sample."""

from dataclasses import dataclass

import numpy as np
import torch

from core.rng import random_bits, random_uniform


@dataclass(frozen=True)
class TopKTopPSampler:
    """Samples one code per row of logits; the fields are those of SamplingConfig, resolved.

    Hashable: equal samplers share CUDA graphs.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    greedy: bool = False

    def __call__(
        self, logits: torch.Tensor, sample_bits: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Logits (n, vocab) float32, random bits and positions (n, 1) int64 -> codes (n,) int64.

        Gumbel-max: the argmax of logits plus Gumbel noise, which depends only on (sample_bits,
        position, code). It is exact, needs no sum over the vocabulary, and rounding differences
        between batch sizes almost never change the result.
        """
        if self.greedy:
            return logits.argmax(dim=-1)
        logits = logits / max(self.temperature, 1e-5)
        bits = random_bits(sample_bits, positions)
        filters = 0 < self.top_k < logits.shape[-1] or self.top_p < 1
        if filters and logits.device.type == "cpu":
            # Noise only for the codes that pass the filters. On other devices, counting them would
            # make the host wait.
            threshold = logit_threshold(logits, self.top_k, self.top_p)
            row, entries = (logits >= threshold).nonzero(as_tuple=True)
            scores = gumbel(bits[row, 0], entries).add_(logits[row, entries])
            return (
                torch.full_like(logits, float("-inf")).index_put_((row, entries), scores).argmax(-1)
            )
        if filters:
            logits = filter_logits(logits, self.top_k, self.top_p)
        entries = torch.arange(logits.shape[-1], device=logits.device)
        return (logits + gumbel(bits, entries)).argmax(dim=-1)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (n, vocab) float32 -> the distribution that codes are drawn from, same shape.

        Not for greedy.
        """
        logits = logits / max(self.temperature, 1e-5)
        return filter_logits(logits, self.top_k, self.top_p).softmax(dim=-1)


def gumbel(bits: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise float32 from random bits and code numbers (int64, broadcast)."""
    uniform = random_uniform(bits, entries)
    return -torch.log(-torch.log1p(-uniform))


def filter_logits(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Logits (n, vocab) -> the same, with -inf for codes that top-k, then top-p remove.

    top_k 0 and top_p 1 keep all codes. Codes that tie with the last one kept are kept.
    """
    return logits.masked_fill(logits < logit_threshold(logits, top_k, top_p), float("-inf"))


def logit_threshold(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """The smallest logit that top-k, then top-p on the rest, keep: (n, vocab) -> (n, 1)."""
    vocab = logits.shape[-1]
    threshold, likeliest = torch.full_like(logits[:, :1], float("-inf")), None
    if 0 < top_k < vocab and top_p == 1:
        return _kth_largest(logits, top_k)
    if 0 < top_k < vocab:
        likeliest = logits.topk(top_k).values
        threshold = likeliest[:, -1:]
    if top_p == 1:
        return threshold
    total = logits.masked_fill(logits < threshold, float("-inf")).logsumexp(dim=-1, keepdim=True)
    if likeliest is None and logits.device.type == "cpu":
        likeliest = logits.topk(max(1, vocab // 16)).values
        if ((likeliest - total).exp().sum(-1) <= top_p).any():
            likeliest = None  # they do not reach top_p: sort the whole vocabulary
    if likeliest is None:
        likeliest = logits.sort(dim=-1, descending=True).values
    before = (likeliest - total).exp().cumsum(dim=-1)[:, :-1]
    # Keep the first code that crosses top_p.
    count = (before <= top_p).sum(dim=-1, keepdim=True)
    return likeliest.gather(1, count)


def _kth_largest(logits: torch.Tensor, k: int) -> torch.Tensor:
    """The k-th largest logit of each row, (n, vocab) -> (n, 1)."""
    if logits.device.type != "cpu":
        return logits.topk(k, sorted=False).values.amin(-1, keepdim=True)
    # numpy selects with vector instructions, nine times as fast as topk here.
    index = logits.shape[-1] - k
    return torch.from_numpy(np.partition(logits.numpy(), index, axis=-1)[:, index : index + 1])
