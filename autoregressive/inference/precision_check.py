"""What lower precision changes: the next-code distributions of two decoders on the same codes."""

import itertools
from dataclasses import replace

import torch

from autoregressive.inference.engine import GenerationRequest, InferenceEngine, Sampler


@torch.no_grad()
def next_code_logits(
    decoder: InferenceEngine, request: GenerationRequest, count: int, draw: Sampler
) -> torch.Tensor:
    """Guided logits (batch, count, vocab) float32 of the first codes, while `draw` draws them."""
    seen: list[torch.Tensor] = []

    def record(logits: torch.Tensor, noise: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        seen.append(logits)
        return draw(logits, noise, position)

    steps = decoder.steps(replace(request, draw=record, window=1, eager=True))
    for _ in itertools.islice(steps, count):
        pass
    return torch.stack(seen, dim=1)


def compare(
    exact: InferenceEngine, other: InferenceEngine, request: GenerationRequest, count: int = 64
) -> dict[str, float]:
    """How far `other` is from `exact` over codes that `exact` draws.

    kl: mean divergence KL(exact | other) of a code's guided distribution before any filter, in
    nats. same_likeliest: share of codes with the same likeliest entry.
    """
    wanted = next_code_logits(exact, request, count, request.draw)
    codes = exact.states[len(request.noise), 1].codes.clone()

    def force(logits: torch.Tensor, noise: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        return codes.gather(1, position)[:, 0]

    got = next_code_logits(other, request, count, force)
    wanted_log, got_log = wanted.log_softmax(-1), got.log_softmax(-1)
    kl = (wanted_log.exp() * (wanted_log - got_log)).sum(-1).mean()
    same = (wanted.argmax(-1) == got.argmax(-1)).float().mean()
    return {"kl": float(kl), "same_likeliest": float(same)}
