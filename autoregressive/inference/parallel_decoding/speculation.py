"""Speculative Jacobi decoding: which guessed codes a step accepts, and what it guesses next.

A step runs the last final code and window - 1 guesses after it (arXiv 2410.01699). The code sampled
after each of them is final up to the first wrong guess, and the guess of the next step behind it.

Every position has its own random numbers, those of plain sampling, so that a code sampled again at
the next step seldom changes.
Rule same_images: a guess is right if it is the code sampled at its position. The images are those
of plain sampling.
Rule same_distribution: a guess x is accepted with probability min(1, p(x) / q(x)), with p the
distribution of its position now and q the one that it was drawn from; the first rejected one is
drawn from max(p - q, 0) instead. A position is verified once, and what came before it never
depended on its random numbers: so images have the distribution of plain sampling. They are others,
and depend on the window and the guesses. The rule accepts 1 - TV(p, q) of the guesses, the other at
least (1 - TV) / (1 + TV).
"""

import torch

from autoregressive.inference.generation import GenerationState, Sampler
from autoregressive.inference.sampler import TopKTopPSampler, gumbel
from core.rng import random_bits, random_uniform


def first_guesses(state: GenerationState, vocab_size: int) -> None:
    """After the first code: guess the forced codes, and elsewhere the first code."""
    guesses = torch.where(state.forced_codes < 0, state.codes[:, :1], state.forced_codes)
    state.codes[:, 1:] = guesses[:, 1:]
    if state.rule == "same_distribution":
        shape = state.batch, state.window - 1, vocab_size
        if state.proposals.shape != shape:
            state.proposals = state.proposals.new_zeros(shape)
        guessed = state.codes[:, 1 : state.window, None]
        state.proposals.zero_().scatter_(2, guessed, 1.0)


def accept(
    state: GenerationState,
    sampler: Sampler,
    logits: torch.Tensor,
    inputs: torch.Tensor,
    columns: int,
) -> None:
    """Sample after each input, keep the codes that are final, and guess the next ones.

    logits: (batch, window, vocab) float32, after inputs (batch, window) int64, of which the first
    is final and the others are guesses. columns: codes of a row of the grid.
    """
    positions = state.filled + state.offsets
    if state.rule == "same_images":
        sampled = state.sample(sampler, logits, positions)
        accepted = (sampled[:, :-1] == inputs[:, 1:]).cumprod(dim=1).sum(dim=1, keepdim=True)
        probability = None
    else:
        assert isinstance(sampler, TopKTopPSampler)
        accepted, probability = _accept_by_ratio(state, sampler, logits, inputs[:, 1:], positions)
    last = positions[:, -1:]
    state.filled.add_(accepted + 1).clamp_(max=state.num_codes)
    if state.guess != "first":
        _guess(state, last, columns)
    if probability is not None:
        _propose(state, probability, accepted)


def _accept_by_ratio(
    state: GenerationState,
    sampler: TopKTopPSampler,
    logits: torch.Tensor,
    guesses: torch.Tensor,
    positions: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Accepted guesses (batch, 1), and the distributions (batch, window, vocab); codes are kept."""
    probability = sampler.probabilities(logits.flatten(0, 1)).view_as(logits)
    forced = state.forced_codes.gather(1, positions)[..., None]
    certain = torch.zeros_like(probability).scatter_(2, forced.clamp(min=0), 1.0)
    probability = torch.where(forced < 0, probability, certain)
    # Each position has one number per code, one for its verification, and those of a second draw.
    vocab = logits.shape[-1]
    every = torch.arange(vocab, device=logits.device)
    bits = random_bits(state.sample_bits, positions)[..., None]
    sampled = (probability.log() + gumbel(bits, every)).argmax(-1)
    chosen, chance = guesses[..., None], random_uniform(bits[:, :-1], every[-1] + 1)
    wanted, proposed = probability[:, :-1].gather(2, chosen), state.proposals.gather(2, chosen)
    accepted = (chance * proposed < wanted)[..., 0].cumprod(dim=1).sum(dim=1, keepdim=True)
    rejected = accepted.clamp(max=state.window - 2)[..., None]
    rows = rejected.expand(-1, -1, vocab)
    excess = (probability.gather(1, rows) - state.proposals.gather(1, rows)).clamp_(min=0)
    # Where rounding leaves nothing, both distributions are the same.
    excess = torch.where(excess.sum(-1, keepdim=True) > 0, excess, probability.gather(1, rows))
    second = gumbel(random_bits(bits.gather(1, rejected), every[-1] + 2), every)
    again = (excess.log() + second).argmax(-1)
    here = (state.offsets == accepted) & (accepted < state.window - 1)
    sampled = torch.where(here, again, sampled)
    sampled[:, :-1] = torch.where(state.offsets[:-1] < accepted, guesses, sampled[:, :-1])
    state.codes.scatter_(1, positions, sampled)
    return accepted, probability


def _propose(state: GenerationState, probability: torch.Tensor, accepted: torch.Tensor) -> None:
    """Keep the distribution of each guess of the next step: certainty where nothing was drawn."""
    index = state.offsets[:-1] + accepted + 1
    rows = index.clamp(max=state.window - 1)[..., None].expand(-1, -1, probability.shape[-1])
    drawn = probability.gather(1, rows)
    guessed = state.codes.gather(1, state.filled + state.offsets[:-1])[..., None]
    certain = torch.zeros_like(drawn).scatter_(2, guessed, 1.0)
    state.proposals.copy_(torch.where((index < state.window)[..., None], drawn, certain))


def _guess(state: GenerationState, last: torch.Tensor, columns: int) -> None:
    """Fill the positions after `last` (batch, 1), the last sampled one, that the next step runs.

    left: the last code of their row; at the beginning of a row, the code above. above: the code
    above; in the first row, the code to the left. A source that is not sampled yet is replaced by
    the code at `last`.
    """
    positions = state.filled + state.offsets[:-1]
    if state.guess == "left":
        row_start = positions // columns * columns
        source = torch.where(row_start > last, row_start - columns, last)
    else:
        up = (positions - last + columns - 1) // columns  # rows up to a sampled code
        source = positions - up * columns
        source = torch.where(source < 0, last, source)
    codes = state.codes.gather(1, torch.minimum(source, last))
    forced = state.forced_codes.gather(1, positions)
    codes = torch.where(forced < 0, codes, forced)
    kept = state.codes.gather(1, positions)
    state.codes.scatter_(1, positions, torch.where(positions > last, codes, kept))
