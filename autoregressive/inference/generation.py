"""What the inference engine is asked for, and the buffers in which it computes it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from autoregressive.inference.sampling_config import Guess, Rule
from autoregressive.models.conditioning import Condition

# (logits (n, vocab) float32, sample bits (n, 1) int64, positions (n, 1) int64) -> codes (n,)
Sampler = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class GenerationRequest:
    """A batch of images to sample.

    Args:
        condition: What each image is conditioned on.
        negative: What guidance leads away from; None: the null condition.
        cfg_scales: Guidance scale at each code; 1: no guidance.
        sample_bits: (batch, 1) int64, random bits of each image.
        sampler: Picks one code per row of logits. Hashable; equal samplers share CUDA graphs.
        forced_codes: (batch, num_codes) int64, codes to use instead of sampled ones; -1: sample.
        speculation_window: Codes verified per step; 1: no speculation.
        eager: Run without CUDA graphs; required if the sampler has side effects.
        guidance: Strength that a model with guidance_input gets as an input; None for others.
        speculative_rule: Which guesses are accepted. same_distribution needs a sampler with
            `probabilities`.
        speculative_guess: The guess at a position that no step has sampled yet.
        zipar_window: Codes of a row after which ZipAR begins the next row; None: raster order.
    """

    condition: Condition
    negative: Condition | None
    cfg_scales: list[float]
    sample_bits: torch.Tensor
    sampler: Sampler
    forced_codes: torch.Tensor | None = None
    speculation_window: int = 1
    eager: bool = False
    guidance: float | None = None
    speculative_rule: Rule = "same_images"
    speculative_guess: Guess = "first"
    zipar_window: int | None = None


def num_guided_codes(cfg_scales: list[float]) -> int:
    """Number of codes up to and including the last guided one."""
    return max((i + 1 for i, scale in enumerate(cfg_scales) if scale != 1), default=0)


class GenerationState:
    """Fixed buffers of one batch, which CUDA graphs read and write in place.

    codes: (batch, num_codes + window) int64; codes from index `filled` on are guesses.
    filled: (batch, 1) int64, number of final codes.
    prefix_lengths: (2 batch,) int64, valid condition tokens of each row.
    cfg_scales: (num_codes + window,) float32.
    sample_bits: (batch, 1) int64, random bits of each image.
    forced_codes: like codes; -1 where a code is sampled.
    rule, guess: How guesses are accepted and made; see speculation.py.
    proposals: (batch, window - 1, vocab) float32, for rule same_distribution: the distribution that
        each guess was drawn from.
    inputs: (num_codes,) int64, for ZipAR the positions that a step runs, for parallel regions the
        places of the codes that it samples.
    written: (num_codes,) bool, for ZipAR: the positions whose keys and values are stored.
    """

    def __init__(self, batch: int, num_codes: int, window: int, device: torch.device) -> None:
        def integers(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        self.batch, self.window, self.num_codes = batch, window, num_codes
        self.codes, self.forced_codes = (integers(batch, num_codes + window) for _ in range(2))
        self.filled, self.sample_bits = integers(batch, 1), integers(batch, 1)
        self.prefix_lengths = integers(2 * batch)
        self.cfg_scales = torch.ones(num_codes + window, device=device)
        self.offsets = torch.arange(window, device=device)
        self.modulations: list[torch.Tensor] = []
        self.rule: Rule = "same_images"
        self.guess: Guess = "first"
        self.proposals = torch.zeros(0, device=device)
        self.inputs, self.written = integers(num_codes), integers(num_codes).bool()

    def begin(self, request: GenerationRequest) -> None:
        """Reset the buffers for a new request."""
        for buffer in (self.codes, self.filled, self.written):
            buffer.zero_()
        self.rule, self.guess = request.speculative_rule, request.speculative_guess
        self.cfg_scales[: self.num_codes] = torch.tensor(request.cfg_scales)
        self.sample_bits.copy_(request.sample_bits)
        self.forced_codes.fill_(-1)
        if request.forced_codes is not None:
            self.forced_codes[:, : self.num_codes] = request.forced_codes

    @property
    def changed_by_a_step(self) -> tuple[torch.Tensor, ...]:
        """The buffers that a step changes."""
        return self.codes, self.filled, self.proposals

    def sample(
        self, sampler: Sampler, logits: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Logits (batch, n, vocab) at positions (batch, n) -> codes (batch, n), which are kept."""
        sample_bits = self.sample_bits.expand_as(positions).reshape(-1, 1)
        sampled = sampler(logits.flatten(0, 1), sample_bits, positions.reshape(-1, 1))
        forced = self.forced_codes.gather(1, positions)
        sampled = torch.where(forced < 0, sampled.view_as(positions), forced)
        self.codes.scatter_(1, positions, sampled)
        return sampled

    def modulate(self, computed: list[torch.Tensor]) -> None:
        """Keep each block's and the last norm's (rows, 1, parts * dim), the same at every step."""
        size = 2 * self.batch
        self.modulations = self.modulations or [c.new_zeros(size, *c.shape[1:]) for c in computed]
        for buffer, part in zip(self.modulations, computed, strict=True):
            buffer[: len(part)] = part

    def modulation(self, layer: int, rows: int) -> torch.Tensor | None:
        """What block `layer` (-1: the last norm) reads; None without adaln."""
        return self.modulations[layer][:rows] if self.modulations else None
