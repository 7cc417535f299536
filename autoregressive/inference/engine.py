"""A decoder made ready for sampling: packed weights, caches that stay, one graph per step.

Exact: what a step computes is `GPT.forward` at one position. Guidance is mixed before the head,
which is linear, so the head does half the work; the null rows end with the guidance. On a GPU the
whole step, drawing included, is one CUDA graph that reads and writes fixed buffers, its position
among them, so that nothing waits for the host.

A step can also guess ahead (speculative Jacobi decoding, Teng et al., arXiv 2410.01699, with the
draws of an iteration and the next coupled by common noise): it reads the last code and `window` - 1
guesses, and draws the code after each. A guess that equals what was drawn in its place was right,
and so is the code drawn after it; the others are the next step's guesses. Because a code's noise
depends on its place alone, the picture is the one that plain sampling draws.
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
from autoregressive.inference.packing import Layer, Norm
from autoregressive.inference.quantized_linear import QUANTIZED, DecodePrecision, pack
from autoregressive.models.conditioning import Condition
from autoregressive.models.gpt import GPT
from core.distributed.parallel import compile_blocks

# Without device lengths the prefix is rounded up: few graphs, not one per code; and on CPUs few
# shapes, each of which leaves a kernel and holes in memory (10 GB at 576 codes of 32 images).
GRAPH_BUCKET, CPU_BUCKET = 64, 16
QUANTIZED_CACHES = {"int8": Int8Cache, "fp8": Fp8Cache}

# (logits (n, vocab) float32, random bits (n, 1) int64, positions (n, 1) int64) -> codes (n,)
Sampler = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class GenerationRequest:
    """A batch of pictures to draw.

    condition: what each is drawn under. negative: what guidance leads away from, None for the null
    condition. scales: guidance at each code, 1 for none. noise (batch, 1) int64: random bits.
    draw: one code per row of logits; hashable, equal ones share graphs. known (batch, codes)
    int64: codes that are given, -1 where there is none. window: codes drawn in a step. eager: no
    CUDA graphs, for a `draw` that does more than compute.
    """

    condition: Condition
    negative: Condition | None
    scales: list[float]
    noise: torch.Tensor
    draw: Sampler
    known: torch.Tensor | None = None
    window: int = 1
    eager: bool = False


def guided_codes(scales: list[float]) -> int:
    """How many codes it takes until guidance, given at each code, has ended."""
    return max((i + 1 for i, scale in enumerate(scales) if scale != 1), default=0)


class GenerationState:
    """The fixed buffers of one batch in the making; a graph reads and writes them in place.

    codes (batch, num_codes + window) int64, those from filled (batch, 1) int64 on are guesses;
    lengths (rows,) int64 of the prefixes; scales (codes,) float32 of guidance; noise (batch, 1)
    int64, the random bits of each sample; known, as codes: what is given, else -1.
    """

    def __init__(self, batch: int, num_codes: int, window: int, device: torch.device) -> None:
        def integers(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        self.batch, self.window, self.num_codes = batch, window, num_codes
        self.codes, self.known = (integers(batch, num_codes + window) for _ in range(2))
        self.filled, self.noise = integers(batch, 1), integers(batch, 1)
        self.lengths = integers(2 * batch)
        self.scales = torch.ones(num_codes + window, device=device)
        self.ahead = torch.arange(window, device=device)

    def begin(self, request: GenerationRequest) -> None:
        """Fill in what is asked for."""
        self.codes.zero_()
        self.filled.zero_()
        self.scales[: self.num_codes] = torch.tensor(request.scales)
        self.noise.copy_(request.noise)
        self.known.fill_(-1)
        if request.known is not None:
            self.known[:, : self.num_codes] = request.known


class InferenceEngine:
    """A GPT's weights, packed once, and the caches and graphs of sampling.

    precision: fp32 or bf16; with bf16 elsewhere, weights as int8, as int8 with activations likewise
        (w8a8, on CPUs) or as fp8 (on GPUs); None for the model's own dtype.
    cache: int8 or fp8 for keys and values of eight bits; None for the dtype of computation.
    compile: torch.compile each layer: seconds once, fewer kernels a step.
    device: where to decode; None for the model's.
    Raises InputError for a precision that the device does not have.
    """

    def __init__(
        self,
        gpt: GPT,
        precision: DecodePrecision | None = None,
        cache: str | None = None,
        compile: bool = False,
        device: torch.device | None = None,
    ) -> None:
        self.config, weight = gpt.config, gpt.tok_embeddings.weight
        self.device = device or weight.device
        dtype = weight.dtype
        if precision:
            dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        self.embedding = weight.detach().to(self.device, dtype)
        like = self.embedding[:0]
        varlen = VarlenCache if VarlenCache.available(like) else PrefixCache
        self.cache_type = QUANTIZED_CACHES[cache] if cache else varlen
        self.cls_embedding = gpt.cls_embedding
        if self.device != weight.device:
            self.cls_embedding = copy.deepcopy(gpt.cls_embedding).to(self.device)
        self.layers = [Layer(block, like, precision, self.cache_type) for block in gpt.blocks]
        self.norm = Norm(gpt.norm, like)
        self.output = pack(gpt.output.weight.detach().to(self.device), dtype, precision)
        pairs = (self.layers[0].head_dim - gpt.config.head_dim) // 2
        self.rotary = F.pad(gpt.rotary, (0, 0, 0, pairs)).to(self.device)
        self.compiled = compile
        self.quantized = precision in QUANTIZED or cache is not None
        self.described = _describe(self, precision, cache, compile)
        if compile:
            compile_blocks([*self.layers])
        self.cache: PrefixCache | None = None
        self.states: dict[tuple[int, int], GenerationState] = {}
        self.steps_taken = 0
        self.graphs: dict[tuple, torch.cuda.CUDAGraph] = {}

    @torch.no_grad()
    def steps(self, request: GenerationRequest) -> Iterator[tuple[torch.Tensor, int]]:
        """Draw code after code; yields codes (batch, num_codes) int64 and how many all rows have.

        The buffer that is yielded is the same at every step, and the next call's.
        """
        num_codes, window = self.config.num_codes, request.window
        guided_until = guided_codes(request.scales)
        state = self._begin(request)
        longest, ragged = self._prefill(request, state, guided_until > 0)
        codes, done = state.codes[:, :num_codes], 1
        yield codes, done
        furthest = 1
        while done < num_codes:
            guided = done < guided_until
            valid = longest + furthest + window - 1
            end, masked = self._extent(valid, ragged or window > 1)
            step = functools.partial(
                self._step, state, guided, end, None if masked else valid, request.draw
            )
            if self.device.type == "cuda" and not request.eager:
                key = (state.batch, window, guided, end, masked, request.draw)
                self._replay(key, state, step)
            else:
                step()
            self.steps_taken += 1
            if window == 1:
                done = furthest = done + 1
            else:
                done, furthest = int(state.filled.min()), int(state.filled.max())
            yield codes, done

    def _extent(self, valid: int, hides: bool) -> tuple[int, bool]:
        """How many slots a step attends to, of which `valid` are used, and whether under a mask."""
        assert self.cache is not None
        if self.cache_type is VarlenCache:
            return self.cache.capacity, False
        cuda = self.device.type == "cuda"
        if not cuda and self.compiled:
            return valid, hides
        bucket = GRAPH_BUCKET if cuda else CPU_BUCKET
        return min(-(-valid // bucket) * bucket, self.cache.capacity), hides or cuda

    def _begin(self, request: GenerationRequest) -> GenerationState:
        """The buffers of this batch; caches only grow, and graphs know their addresses."""
        config, batch, window = self.config, len(request.noise), request.window
        capacity = config.num_condition + config.num_codes + window - 1
        cache = self.cache
        if cache is None or cache.rows < 2 * batch or cache.capacity < capacity:
            self.graphs.clear()
            self.cache = self.cache_type(
                config.num_layers,
                2 * batch,
                capacity,
                (config.kv_heads, self.layers[0].head_dim),
                self.embedding,
            )
        key = batch, window
        if key not in self.states:
            self.states[key] = GenerationState(batch, config.num_codes, window, self.device)
        self.states[key].begin(request)
        return self.states[key]

    def _prefill(
        self, request: GenerationRequest, state: GenerationState, guided: bool
    ) -> tuple[int, bool]:
        """Read the condition, draw the first code -> the longest prefix, and if one is shorter."""
        assert self.cache is not None
        condition, negative = _to(request.condition, self.device), request.negative
        if guided:
            condition = _both(
                condition, condition if negative is None else _to(negative, self.device)
            )
        rows = (2 if guided else 1) * state.batch
        dropped = (torch.arange(rows, device=self.device) >= state.batch) & (negative is None)
        x = self.cls_embedding(condition, dropped).to(self.embedding.dtype)
        longest = x.shape[1]
        lengths = self.cls_embedding.lengths(condition)
        ragged = lengths is not None and bool((lengths != longest).any())
        state.lengths[:rows] = longest if lengths is None else lengths
        lengths = state.lengths[:rows]
        first = self.config.num_condition - longest
        place = AttentionMetadata(
            torch.arange(longest, device=self.device).expand(rows, -1),
            lengths.int(),
            self.rotary[first : first + longest].expand(rows, -1, -1, -1),
            longest,
            longest,
            None,
        )
        for layer, stores in zip(self.layers, self.cache.layers, strict=True):
            x = layer.prefill(x, *stores, place)
        last = self.norm(x)[torch.arange(rows, device=self.device), lengths - 1]
        self._draw(state, last[:, None], state.filled, guided, request.draw)
        state.filled.add_(1)
        # The first guesses: what is given, elsewhere the first code again.
        guesses = torch.where(state.known < 0, state.codes[:, :1], state.known)
        state.codes[:, 1:] = guesses[:, 1:]
        return longest, ragged

    def _step(
        self, state: GenerationState, guided: bool, end: int, valid: int | None, draw: Sampler
    ) -> None:
        """Read the last code and the guesses after it, draw the code after each."""
        assert self.cache is not None
        at = state.filled - 1 + state.ahead
        new = state.codes.gather(1, at)
        x, cells = self.embedding[new], self.config.num_condition + at
        if state.window > 1:
            cells = cells.clamp_(max=len(self.rotary) - 1)  # of rows that are done
        rotary = self.rotary[cells]
        if guided:
            x, rotary, at = x.repeat(2, 1, 1), rotary.repeat(2, 1, 1, 1), at.repeat(2, 1)
        slots = state.lengths[: len(x), None] + at
        hidden = None
        if valid is None:
            hidden = torch.arange(end, device=self.device) > slots[..., None]
        place = AttentionMetadata(
            slots, (slots[:, -1] + 1).int(), rotary, end, valid or end, hidden
        )
        for layer, stores in zip(self.layers, self.cache.layers, strict=True):
            x = layer(x, *stores, place)
        following = state.filled + state.ahead
        drawn = self._draw(state, self.norm(x), following, guided, draw)
        right = (drawn[:, :-1] == new[:, 1:]).cumprod(dim=1).sum(dim=1, keepdim=True)
        state.filled.add_(right + 1).clamp_(max=state.num_codes)

    def _draw(
        self,
        state: GenerationState,
        hidden: torch.Tensor,
        at: torch.Tensor,
        guided: bool,
        draw: Sampler,
    ) -> torch.Tensor:
        """Hidden (rows, n, dim) and places `at` (batch, n) -> their codes (batch, n), stored."""
        if guided:
            conditional, null = hidden.float().chunk(2)
            scale = state.scales[at][..., None]
            hidden = (null + scale * (conditional - null)).to(self.embedding.dtype)
        logits = self.output(hidden.flatten(0, 1)).float()
        noise = state.noise.expand_as(at).reshape(-1, 1)
        drawn = draw(logits, noise, at.reshape(-1, 1)).view_as(at)
        given = state.known.gather(1, at)
        drawn = torch.where(given < 0, drawn, given)
        state.codes.scatter_(1, at, drawn)
        return drawn

    def _replay(self, key: tuple, state: GenerationState, step: Callable[[], None]) -> None:
        """Run `step` as a CUDA graph, captured when its key is new."""
        if key not in self.graphs:
            changed = (state.codes, state.filled)
            before = [part.clone() for part in changed]
            stream = torch.cuda.Stream(self.device)
            stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(stream):
                for _ in range(2):  # compiles, and lets libraries allocate what they keep
                    step()
                    for part, old in zip(changed, before, strict=True):
                        part.copy_(old)
            torch.cuda.current_stream(self.device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # One pool for all: they run one after the other, and keep nothing outside the State.
            shared = next(iter(self.graphs.values())).pool() if self.graphs else None
            with torch.cuda.graph(graph, pool=shared):
                step()
            self.graphs[key] = graph
        self.graphs[key].replay()


def _describe(
    decoder: InferenceEngine, precision: str | None, cache: str | None, compiled: bool
) -> str:
    """How it decodes, in one line."""
    dtype = str(decoder.embedding.dtype).removeprefix("torch.")
    weights = f"{precision} weights, " if precision in QUANTIZED else ""
    kept = f"{cache} keys and values, " if cache else ""
    how = f"decoder: {dtype} on {decoder.device.type}, {weights}{kept}"
    how += f"{type(decoder.output).__name__} linears"
    if decoder.device.type == "cuda":
        reads = "device lengths" if decoder.cache_type is VarlenCache else "masked prefixes"
        how += f", attention over {reads}, one CUDA graph a step"
    return how + (", compiled layers" if compiled else "")


def _both(condition: Condition, away: Condition) -> Condition:
    """The condition's rows, followed by those that guidance leads away from."""
    if isinstance(condition, torch.Tensor):
        assert isinstance(away, torch.Tensor)
        return torch.cat([condition, away])
    longest = max(condition[0].shape[1], away[0].shape[1])
    features = [F.pad(f, (0, 0, 0, longest - f.shape[1])) for f, _ in (condition, away)]
    return torch.cat(features), torch.cat([condition[1], away[1]])


def _to(condition: Condition, device: torch.device) -> Condition:
    if isinstance(condition, torch.Tensor):
        return condition.to(device)
    return condition[0].to(device), condition[1].to(device)


_decoders: weakref.WeakKeyDictionary[GPT, tuple[list, InferenceEngine]] = (
    weakref.WeakKeyDictionary()
)


def engine_of(gpt: GPT) -> InferenceEngine:
    """The decoder of a model's present weights; kept for the next call in evaluation mode.

    A model in training mode gets a new one at each call: it would hold memory between the calls,
    and be out of date.
    """
    weights = [
        (p.data_ptr(), 0 if p.is_inference() else p._version)
        for p in (*gpt.parameters(), *gpt.buffers())
    ]
    if gpt in _decoders and _decoders[gpt][0] == weights:
        return _decoders[gpt][1]
    _decoders.pop(gpt, None)
    decoder = InferenceEngine(gpt)
    if not gpt.training:
        _decoders[gpt] = weights, decoder
    return decoder
