"""The inference engine: a GPT with packed weights, a key-value cache, and CUDA graphs.

It is exact: a step computes what `GPT.forward` computes at one position. Guidance acts on hidden
states, which equals guiding the logits of a linear head; unconditional rows are dropped after the
last guided code. On a GPU the whole step, sampling included, is one CUDA graph on fixed buffers.
A step can verify several guessed codes (speculative Jacobi decoding, arXiv 2410.01699, with common
random numbers): guesses that equal the codes sampled at their positions are accepted.
"""

import copy
import functools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from autoregressive.inference.kv_cache import (
    AttentionMetadata,
    Fp8Cache,
    Int8Cache,
    PrefixCache,
    VarlenCache,
)
from autoregressive.inference.packing import aligned_head_dim, inference_block, inference_norm
from autoregressive.inference.quantized_linear import QUANTIZED, DecodePrecision, pack
from autoregressive.models.conditioning import Condition
from autoregressive.models.gpt import GPT, modulated
from core.distributed.parallel import compile_blocks

# Without lengths on the device, the prefix is rounded up to a multiple of this: fewer CUDA graphs;
# on CPUs fewer shapes, each of which leaves a kernel and fragmented memory behind.
GRAPH_BUCKET, CPU_BUCKET = 64, 16
QUANTIZED_CACHES = {"int8": Int8Cache, "fp8": Fp8Cache}

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

    def begin(self, request: GenerationRequest) -> None:
        """Reset the buffers for a new request."""
        self.codes.zero_()
        self.filled.zero_()
        self.cfg_scales[: self.num_codes] = torch.tensor(request.cfg_scales)
        self.sample_bits.copy_(request.sample_bits)
        self.forced_codes.fill_(-1)
        if request.forced_codes is not None:
            self.forced_codes[:, : self.num_codes] = request.forced_codes

    def modulate(self, computed: list[torch.Tensor]) -> None:
        """Keep each block's and the last norm's (rows, 1, parts * dim), the same at every step."""
        size = 2 * self.batch
        self.modulations = self.modulations or [c.new_zeros(size, *c.shape[1:]) for c in computed]
        for buffer, part in zip(self.modulations, computed, strict=True):
            buffer[: len(part)] = part

    def modulation(self, layer: int, rows: int) -> torch.Tensor | None:
        """What block `layer` (-1: the last norm) reads; None without adaln."""
        return self.modulations[layer][:rows] if self.modulations else None


class InferenceEngine:
    """A GPT with weights that are packed once, and the caches and CUDA graphs of sampling.

    Args:
        gpt: The model. Later changes of its weights do not reach the engine.
        precision: fp32 or bf16; or bf16 with quantised weights: int8, w8a8 (int8 weights and
            activations, on CPUs), fp8 (on GPUs). None: the model's own dtype.
        cache: int8 or fp8 for 8-bit keys and values; None: the dtype of computation.
        compile: torch.compile each block: takes seconds once, then launches fewer kernels.
        device: Where to sample; None: the model's device.

    Raises InputError for a precision that the device does not support.
    """

    def __init__(
        self,
        gpt: GPT,
        precision: DecodePrecision | None = None,
        cache: str | None = None,
        compile: bool = False,
        device: torch.device | None = None,
    ) -> None:
        gpt = gpt.merged()
        self.config, weight = gpt.config, gpt.tok_embeddings.weight
        self.device = device or weight.device
        chosen = torch.float32 if precision == "fp32" else torch.bfloat16
        dtype = chosen if precision else weight.dtype
        self.embedding = weight.detach().to(self.device, dtype)
        like, self.targets = self.embedding[:0], None  # of the next codes; zeros after the last
        if gpt.target_position is not None:
            table = gpt.target_position.weight.detach()
            self.targets = F.pad(table, (0, 0, 0, len(table))).to(like)
        varlen = VarlenCache if VarlenCache.available(like) else PrefixCache
        self.cache_type = QUANTIZED_CACHES[cache] if cache else varlen
        self.cls_embedding, self.t_embedder = gpt.cls_embedding, gpt.t_embedder
        self.adaptive = copy.deepcopy(gpt.adaptive).to(like)
        if self.device != weight.device:
            self.cls_embedding = copy.deepcopy(gpt.cls_embedding).to(self.device)
            self.t_embedder = gpt.t_embedder and copy.deepcopy(gpt.t_embedder).to(self.device)
        self.blocks = [inference_block(block, self.config, like, precision) for block in gpt.blocks]
        self.norm = inference_norm(gpt.norm, like)
        self.output = pack(gpt.output.weight.detach().to(self.device), dtype, precision)
        self.head_dim = aligned_head_dim(gpt.config)
        self.attention_scale = gpt.config.head_dim**-0.5
        padding = (self.head_dim - gpt.config.head_dim) // 2
        self.rotary = F.pad(gpt.rotary, (0, 0, 0, padding)).to(self.device)
        self.compiled = compile
        self.quantized = precision in QUANTIZED or cache is not None
        self.described = _describe(self, precision, cache, compile)
        if compile:
            compile_blocks([*self.blocks])
        self.cache: PrefixCache | None = None
        self.states: dict[tuple[int, int], GenerationState] = {}
        self.steps_taken = 0
        self.graphs: dict[tuple, torch.cuda.CUDAGraph] = {}

    @torch.no_grad()
    def steps(self, request: GenerationRequest) -> Iterator[tuple[torch.Tensor, int]]:
        """Sample step by step; yields codes (batch, num_codes) int64 and how many are final.

        Every step, and the next call, yields the same buffer.
        """
        num_codes, window = self.config.num_codes, request.speculation_window
        guided_until = num_guided_codes(request.cfg_scales)
        state = self._begin(request)
        longest, ragged = self._prefill(request, state, guided_until > 0)
        codes, done, furthest = state.codes[:, :num_codes], 1, 1
        yield codes, done
        while done < num_codes:
            guided = done < guided_until
            length = longest + furthest + window - 1
            kv_end, masked = self._kv_extent(length, ragged or window > 1)
            kv_length = None if masked else length
            step = functools.partial(self._step, state, guided, kv_end, kv_length, request.sampler)
            if self.device.type == "cuda" and not request.eager:
                key = (state.batch, window, guided, kv_end, masked, request.sampler)
                self._replay(key, state, step)
            else:
                step()
            self.steps_taken += 1
            if window == 1:
                done = furthest = done + 1
            else:
                done, furthest = int(state.filled.min()), int(state.filled.max())
            yield codes, done

    def _kv_extent(self, length: int, needs_mask: bool) -> tuple[int, bool]:
        """How many cache slots a step reads, of which `length` are used, and whether it masks."""
        assert self.cache is not None
        if self.cache_type is VarlenCache:
            return self.cache.capacity, False
        cuda = self.device.type == "cuda"
        if not cuda and self.compiled:
            return length, needs_mask
        bucket = GRAPH_BUCKET if cuda else CPU_BUCKET
        return min(-(-length // bucket) * bucket, self.cache.capacity), needs_mask or cuda

    def _begin(self, request: GenerationRequest) -> GenerationState:
        """The buffers of this batch size. Caches only grow, because graphs keep their addresses."""
        config, batch = self.config, len(request.sample_bits)
        window = request.speculation_window
        capacity, cache = config.num_condition + config.num_codes + window - 1, self.cache
        if cache is None or cache.rows < 2 * batch or cache.capacity < capacity:
            self.graphs.clear()
            heads = config.kv_heads, self.head_dim
            fitted = self.device.type == "cpu" and not self.compiled
            self.cache = self.cache_type(
                config.num_layers, 2 * batch, capacity, heads, self.embedding, fitted
            )
        key = batch, window
        if key not in self.states:
            self.states[key] = GenerationState(batch, config.num_codes, window, self.device)
        self.states[key].begin(request)
        return self.states[key]

    def _prefill(
        self, request: GenerationRequest, state: GenerationState, guided: bool
    ) -> tuple[int, bool]:
        """Run the condition tokens, sample the first code.

        Returns the longest prefix of the batch, and whether any prefix is shorter.
        """
        assert self.cache is not None
        condition, negative = request.condition.to(self.device), request.negative
        if guided:
            away = condition if negative is None else negative.to(self.device)
            condition = type(condition).cat([condition, away])  # pyright: ignore[reportArgumentType]
        rows = (2 if guided else 1) * state.batch
        drop = (torch.arange(rows, device=self.device) >= state.batch) & (negative is None)
        x = self.cls_embedding(condition, drop)
        if self.t_embedder is not None and request.guidance is not None:
            x = x + self.t_embedder(torch.full((rows,), request.guidance, device=self.device))
        x = x.to(self.embedding.dtype)
        state.modulate([part(x) for part in self.adaptive])
        longest = x.shape[1]
        lengths, ragged = self.cls_embedding.lengths(condition), False
        if lengths is not None and self.device.type != "cuda":  # which masks, or reads the lengths
            ragged = bool((lengths != longest).any())
        state.prefix_lengths[:rows] = longest if lengths is None else lengths
        lengths = state.prefix_lengths[:rows]
        if self.targets is not None:
            x[torch.arange(rows, device=self.device), lengths - 1] += self.targets[0]
        first = self.config.num_condition - longest
        rotary = self.rotary[first : first + longest].expand(rows, -1, -1, -1)
        slots = torch.arange(longest, device=self.device).expand(rows, -1)
        scale, row_lengths = self.attention_scale, lengths.int()
        metadata = AttentionMetadata(scale, slots, row_lengths, longest, longest, None)
        self.cache.fit(rows, longest)
        for i, (block, layer) in enumerate(zip(self.blocks, self.cache.layers, strict=True)):
            attend = functools.partial(self.cache_type.prefill, layer, metadata)
            # `forward` skips torch.compile: this runs once per image, with many lengths of text.
            x = block.forward(x, rotary, attend, state.modulation(i, rows))
        x = modulated(self.norm(x), state.modulation(-1, rows))
        last = x[torch.arange(rows, device=self.device), lengths - 1]
        self._sample(state, last[:, None], state.filled, guided, request.sampler)
        state.filled.add_(1)
        # The first guesses: forced codes, elsewhere the first code.
        guesses = torch.where(state.forced_codes < 0, state.codes[:, :1], state.forced_codes)
        state.codes[:, 1:] = guesses[:, 1:]
        return longest, ragged

    def _step(
        self,
        state: GenerationState,
        guided: bool,
        kv_end: int,
        kv_length: int | None,
        sampler: Sampler,
    ) -> None:
        """Run the last code and the guesses after it, sample the code after each.

        kv_length: None if the slots in use are not the same in every row: attend under a mask.
        """
        assert self.cache is not None
        positions = state.filled - 1 + state.offsets
        inputs = state.codes.gather(1, positions)
        x, rotary_rows = self.embedding[inputs], self.config.num_condition + positions
        if self.targets is not None:
            x = x + self.targets[positions + 1]
        if state.window > 1:
            rotary_rows = rotary_rows.clamp_(max=len(self.rotary) - 1)  # of finished rows
        rotary = self.rotary[rotary_rows]
        if guided:
            x, rotary = x.repeat(2, 1, 1), rotary.repeat(2, 1, 1, 1)
            positions = positions.repeat(2, 1)
        slots = state.prefix_lengths[: len(x), None] + positions
        mask = None
        if kv_length is None:
            mask = torch.arange(kv_end, device=self.device) > slots[..., None]
        row_lengths = (slots[:, -1] + 1).int()
        metadata = AttentionMetadata(
            self.attention_scale, slots, row_lengths, kv_end, kv_length or kv_end, mask
        )
        self.cache.fit(len(x), kv_end)
        for i, (block, layer) in enumerate(zip(self.blocks, self.cache.layers, strict=True)):
            attend = functools.partial(self.cache_type.attend, layer, metadata)
            x = block(x, rotary, attend, state.modulation(i, len(x)))
        next_positions = state.filled + state.offsets
        x = modulated(self.norm(x), state.modulation(-1, len(x)))
        sampled = self._sample(state, x, next_positions, guided, sampler)
        accepted = (sampled[:, :-1] == inputs[:, 1:]).cumprod(dim=1).sum(dim=1, keepdim=True)
        state.filled.add_(accepted + 1).clamp_(max=state.num_codes)

    def _sample(
        self,
        state: GenerationState,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        guided: bool,
        sampler: Sampler,
    ) -> torch.Tensor:
        """Hidden (rows, n, dim), positions (batch, n) -> codes (batch, n), stored in the state."""
        if guided:
            conditional, unconditional = hidden.float().chunk(2)
            scale = state.cfg_scales[positions][..., None]
            guided_hidden = unconditional + scale * (conditional - unconditional)
            hidden = guided_hidden.to(self.embedding.dtype)
        logits = self.output(hidden.flatten(0, 1)).float()
        sample_bits = state.sample_bits.expand_as(positions).reshape(-1, 1)
        sampled = sampler(logits, sample_bits, positions.reshape(-1, 1)).view_as(positions)
        forced = state.forced_codes.gather(1, positions)
        sampled = torch.where(forced < 0, sampled, forced)
        state.codes.scatter_(1, positions, sampled)
        return sampled

    def _replay(self, key: tuple, state: GenerationState, step: Callable[[], None]) -> None:
        """Run `step` as a CUDA graph; capture it first if its key is new."""
        if key not in self.graphs:
            changed = (state.codes, state.filled)
            before = [part.clone() for part in changed]
            stream = torch.cuda.Stream(self.device)
            stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(stream):
                for _ in range(2):  # compiles, and lets libraries allocate their workspaces
                    step()
                    for part, old in zip(changed, before, strict=True):
                        part.copy_(old)
            torch.cuda.current_stream(self.device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # All graphs share a memory pool: they run one at a time, and no result outlives a run.
            shared = next(iter(self.graphs.values())).pool() if self.graphs else None
            with torch.cuda.graph(graph, pool=shared):
                step()
            self.graphs[key] = graph
        self.graphs[key].replay()


def _describe(
    engine: InferenceEngine, precision: str | None, cache: str | None, compiled: bool
) -> str:
    """How the engine computes, in one line."""
    dtype = str(engine.embedding.dtype).removeprefix("torch.")
    weights = f"{precision} weights, " if precision in QUANTIZED else ""
    stored = f"{cache} keys and values, " if cache else ""
    line = f"transformer: {dtype} on {engine.device.type}, {weights}{stored}"
    line += f"{type(engine.output).__name__} linears"
    if engine.device.type == "cuda":
        varlen = engine.cache_type is VarlenCache
        line += f", {'variable-length' if varlen else 'masked'} attention, one CUDA graph per step"
    return line + (", compiled blocks" if compiled else "")


_engines: weakref.WeakKeyDictionary[GPT, tuple[list, InferenceEngine]] = weakref.WeakKeyDictionary()


def engine_of(gpt: GPT) -> InferenceEngine:
    """The engine of a model's current weights; kept for the next call in evaluation mode.

    A model in training mode gets a new engine at each call: a kept one would hold memory between
    calls and be out of date.
    """
    weights = [
        (p.data_ptr(), 0 if p.is_inference() else p._version)
        for p in (*gpt.parameters(), *gpt.buffers())
    ]
    if gpt in _engines and _engines[gpt][0] == weights:
        return _engines[gpt][1]
    _engines.pop(gpt, None)
    engine = InferenceEngine(gpt)
    if not gpt.training:
        _engines[gpt] = weights, engine
    return engine
