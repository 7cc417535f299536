"""What lower precision changes: the next-code distributions of two engines on the same codes."""

import itertools
from dataclasses import replace

import torch

from autoregressive.inference.engine import InferenceEngine
from autoregressive.inference.generate import generate_steps
from autoregressive.inference.generation import GenerationRequest, Sampler


@torch.no_grad()
def next_code_logits(
    engine: InferenceEngine, request: GenerationRequest, count: int, sampler: Sampler
) -> torch.Tensor:
    """Guided logits (batch, count, vocab) float32 of the first `count` codes.

    Each code is picked by `sampler`, and the logits of the next one follow from it.
    """
    logits_of_steps: list[torch.Tensor] = []
    batch = len(request.sample_bits)

    def record(
        logits: torch.Tensor, sample_bits: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        logits_of_steps.append(logits.unflatten(0, (batch, -1)))
        return sampler(logits, sample_bits, positions)

    one_by_one = replace(
        request, sampler=record, speculation_window=1, zipar_window=None, eager=True
    )
    for _ in itertools.islice(generate_steps(engine, one_by_one), count):
        pass
    return torch.cat(logits_of_steps, dim=1)[:, :count]


def compare(
    exact: InferenceEngine, other: InferenceEngine, request: GenerationRequest, count: int = 64
) -> dict[str, float]:
    """How far `other` is from `exact`, over codes that `exact` samples.

    kl: mean divergence KL(exact || other) of a code's guided distribution before any filter, in
    nats. same_likeliest: share of codes with the same likeliest entry, in [0, 1].
    """
    expected = next_code_logits(exact, request, count, request.sampler)
    codes = exact.states[len(request.sample_bits), 1].codes.clone()

    def force(
        logits: torch.Tensor, sample_bits: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        rows = codes.repeat_interleave(len(positions) // len(codes), dim=0)
        return rows.gather(1, positions)[:, 0]

    actual = next_code_logits(other, request, count, force)
    expected_log, actual_log = expected.log_softmax(-1), actual.log_softmax(-1)
    kl = (expected_log.exp() * (expected_log - actual_log)).sum(-1).mean()
    same = (expected.argmax(-1) == actual.argmax(-1)).float().mean()
    return {"kl": float(kl), "same_likeliest": float(same)}
