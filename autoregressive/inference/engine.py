"""The inference engine: a GPT with packed weights, a key-value cache, and CUDA graphs.

It is exact: a step computes what `GPT.forward` computes at one position. Guidance acts on hidden
states, which equals guiding the logits of a linear head; unconditional rows are dropped after the
last guided code. On a GPU the whole step, sampling included, is one CUDA graph on fixed buffers.
A step can verify several guessed codes (parallel_decoding/speculation.py). continuous.py and the
other files of parallel_decoding are other loops over the same steps.
"""

import copy
import functools
import weakref
from collections.abc import Callable, Iterator

import torch
from torch.nn import functional as F

from autoregressive.inference.generation import (
    GenerationRequest,
    GenerationState,
    Sampler,
    num_guided_codes,
)
from autoregressive.inference.kv_cache import (
    AttentionMetadata,
    Fp8Cache,
    Int8Cache,
    PrefixCache,
    VarlenCache,
)
from autoregressive.inference.packing import (
    aligned_head_dim,
    inference_block,
    inference_norm,
    raster_vectors,
)
from autoregressive.inference.parallel_decoding.speculation import accept, first_guesses
from autoregressive.inference.quantized_linear import QUANTIZED, DecodePrecision, pack
from autoregressive.models.gpt import GPT
from autoregressive.models.transformer import modulated, with_one
from core.distributed.parallel import compile_blocks

# Without lengths on the device, the prefix is rounded up to a multiple of this: fewer CUDA graphs;
# on CPUs fewer shapes, each of which leaves a kernel and fragmented memory behind.
GRAPH_BUCKET, CPU_BUCKET = 64, 16
QUANTIZED_CACHES = {"int8": Int8Cache, "fp8": Fp8Cache}


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
        like = self.embedding[:0]
        self.raster_vectors = raster_vectors(gpt, like)
        self.learned = copy.deepcopy(gpt.learned)
        if self.learned is not None:
            self.learned = self.learned.to(like).requires_grad_(False)
        self.region_order, self.region_tokens = None, None  # see parallel_decoding/regions.py
        if gpt.spe_tok_embeddings is not None:
            self.region_order = gpt.spe_tok_embeddings.order(self.device)
            learned = gpt.spe_tok_embeddings.special_embeddings.weight
            self.region_tokens = learned.detach().to(like)
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
        assert self.config.parallel_regions is None  # see parallel_decoding/regions.py
        num_codes, window = self.config.num_codes, request.speculation_window
        guided_until = num_guided_codes(request.cfg_scales)
        state = self.begin(request)
        longest, ragged = self.prefill(request, state, guided_until > 0)
        codes, done, furthest = state.codes[:, :num_codes], 1, 1
        yield codes, done
        while done < num_codes:
            guided = done < guided_until
            length = longest + furthest + window - 1
            kv_end, masked = self.kv_extent(length, ragged or window > 1)
            kv_length = None if masked else length
            step = functools.partial(self.step, state, guided, kv_end, kv_length, request.sampler)
            rule = request.speculative_rule, request.speculative_guess
            key = (state.batch, window, guided, kv_end, masked, request.sampler, rule)
            self.advance(key, state, step, request.eager)
            if window == 1:
                done = furthest = done + 1
            else:
                done, furthest = int(state.filled.min()), int(state.filled.max())
            yield codes, done

    def kv_extent(self, length: int, needs_mask: bool) -> tuple[int, bool]:
        """How many cache slots a step reads, of which `length` are used, and whether it masks."""
        assert self.cache is not None
        if self.cache_type is VarlenCache:
            return self.cache.capacity, False
        cuda = self.device.type == "cuda"
        if not cuda and self.compiled:
            return length, needs_mask
        bucket = GRAPH_BUCKET if cuda else CPU_BUCKET
        return min(-(-length // bucket) * bucket, self.cache.capacity), needs_mask or cuda

    def begin(self, request: GenerationRequest) -> GenerationState:
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

    def prefill(
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
        if self.learned is None:
            state.modulate([part(x) for part in self.adaptive])
        else:  # the class, from which a step computes what its tokens' norms read
            state.modulate([x])
            x = self.learned.prefix(x)
        longest = x.shape[1]
        lengths, ragged = self.cls_embedding.lengths(condition), False
        if lengths is not None and self.device.type != "cuda":  # which masks, or reads the lengths
            ragged = bool((lengths != longest).any())
        state.prefix_lengths[:rows] = longest if lengths is None else lengths
        lengths = state.prefix_lengths[:rows]
        if self.raster_vectors is not None:
            x[torch.arange(rows, device=self.device), lengths - 1] += self.raster_vectors[0]
        first = self.config.num_condition - longest
        rotary = self.rotary[first : first + longest].expand(rows, -1, -1, -1)
        slots = torch.arange(longest, device=self.device).expand(rows, -1)
        scale, row_lengths = self.attention_scale, lengths.int()
        metadata = AttentionMetadata(scale, slots, row_lengths, longest, longest, None)
        self.cache.fit(rows, longest)
        given = self.conditions(state, slots)
        for i, (block, layer) in enumerate(zip(self.blocks, self.cache.layers, strict=True)):
            attend = functools.partial(self.cache_type.prefill, layer, metadata)
            # `forward` skips torch.compile: this runs once per image, with many lengths of text.
            modulation = state.modulation(i, rows) if given is None else given
            x = block.forward(x, rotary, attend, modulation)
        x = self.final_norm(state, x, given)
        last = x[torch.arange(rows, device=self.device), lengths - 1]
        logits = self.logits(state, last[:, None], state.filled, guided)
        state.sample(request.sampler, logits, state.filled)
        state.filled.add_(1)
        first_guesses(state, self.config.vocab_size)
        return longest, ragged

    def step(
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
        positions = state.filled - 1 + state.offsets
        inputs = state.codes.gather(1, positions)
        x = self.hidden(state, positions, guided, kv_end, kv_length)
        logits = self.logits(state, x, positions + 1, guided)
        accept(state, sampler, logits, inputs, self.config.grid[1])

    def hidden(
        self,
        state: GenerationState,
        positions: torch.Tensor,
        guided: bool,
        kv_end: int,
        kv_length: int | None,
        written: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the codes at grid positions (batch, n) -> hidden states (rows, n, dim).

        written: (num_codes,) bool, the positions to attend to, where some before a code's own have
        no keys and values yet; None: all before it.
        """
        x = self.embedding[state.codes.gather(1, positions)]
        rows = positions
        if state.window > 1:
            rows = rows.clamp(max=state.num_codes - 1)  # of finished images
        if self.raster_vectors is not None:
            x = x + self.raster_vectors[rows + 1]
        rotary = self.rotary[self.config.num_condition + rows]
        return self.run(state, x, rotary, positions, guided, kv_end, kv_length, written)

    def run(
        self,
        state: GenerationState,
        x: torch.Tensor,
        rotary: torch.Tensor,
        places: torch.Tensor,
        guided: bool,
        kv_end: int,
        kv_length: int | None,
        written: torch.Tensor | None = None,
        is_group: bool = False,
    ) -> torch.Tensor:
        """Run tokens (batch, n, dim) at these places behind the condition -> (rows, n, dim).

        rotary: (batch, n, head_dim // 2, 2). places: (batch, n) int64. written: as for `hidden`.
        is_group: The tokens see one another, and not only those before them.
        """
        assert self.cache is not None
        if guided:
            x, rotary = x.repeat(2, 1, 1), rotary.repeat(2, 1, 1, 1)
            places = places.repeat(2, 1)
        prefix_lengths = state.prefix_lengths[: len(x), None]
        slots, mask = prefix_lengths + places, None
        if kv_length is None:
            every = torch.arange(kv_end, device=self.device)
            seen = slots[:, -1:].expand_as(slots) if is_group else slots
            mask = every > seen[..., None]
            if written is not None:
                position = every - prefix_lengths
                empty = ~written[position.clamp(0, len(written) - 1)] & (position >= 0)
                mask |= empty[:, None]
        row_lengths = (slots[:, -1] + 1).int()
        metadata = AttentionMetadata(
            self.attention_scale, slots, row_lengths, kv_end, kv_length or kv_end, mask, is_group
        )
        self.cache.fit(len(x), kv_end)
        given = self.conditions(state, slots)
        for i, (block, layer) in enumerate(zip(self.blocks, self.cache.layers, strict=True)):
            attend = functools.partial(self.cache_type.attend, layer, metadata)
            modulation = state.modulation(i, len(x)) if given is None else given
            x = block(x, rotary, attend, modulation)
        return self.final_norm(state, x, given)

    def conditions(self, state: GenerationState, slots: torch.Tensor) -> torch.Tensor | None:
        """What the adaptive norms of tokens at cache slots (rows, n) read, in the family rar."""
        if self.learned is None:
            return None
        places = slots.clamp(max=len(self.learned.steps) - 1)  # of finished images
        return self.learned.conditions(state.modulations[0][: len(slots)], places)

    def final_norm(
        self, state: GenerationState, x: torch.Tensor, given: torch.Tensor | None
    ) -> torch.Tensor:
        """The last blocks' output -> the input of the head. given: what `conditions` returned."""
        if given is None:
            return modulated(self.norm(x), state.modulation(-1, len(x)))
        return with_one(modulated(self.norm(x), self.adaptive[-1](given)))

    def logits(
        self, state: GenerationState, hidden: torch.Tensor, positions: torch.Tensor, guided: bool
    ) -> torch.Tensor:
        """Hidden (rows, n, dim) before positions (batch, n) -> logits (batch, n, vocab) float32."""
        if guided:
            conditional, unconditional = hidden.float().chunk(2)
            scale = state.cfg_scales[positions][..., None]
            guided_hidden = unconditional + scale * (conditional - unconditional)
            hidden = guided_hidden.to(self.embedding.dtype)
        return self.output(hidden.flatten(0, 1)).float().unflatten(0, positions.shape)

    def advance(
        self, key: tuple, state: GenerationState, step: Callable[[], None], eager: bool = False
    ) -> None:
        """Run and count a step; on a GPU as the CUDA graph of this key, unless `eager`."""
        if self.device.type == "cuda" and not eager:
            self.replay(key, state, step)
        else:
            step()
        self.steps_taken += 1

    def replay(self, key: tuple, state: GenerationState, step: Callable[[], None]) -> None:
        """Run `step` as a CUDA graph; capture it first if its key is new."""
        if key not in self.graphs:
            changed = state.changed_by_a_step
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
