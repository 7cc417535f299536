"""Continuous batching: images that begin at different times share the steps of one batch.

The batch has a fixed number of places. An image takes a free place, is sampled together with what
the other places hold, and leaves when it is finished. Every step has the same shapes, whatever the
places hold and however far their images are: it reads the whole cache, under a mask or up to each
row's length. So an image depends on its own request alone, bit for bit.
"""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import replace

import torch

from autoregressive.inference.engine import InferenceEngine
from autoregressive.inference.generation import (
    GenerationRequest,
    GenerationState,
    num_guided_codes,
)
from autoregressive.inference.kv_cache import PrefixCache, VarlenCache
from core.errors import InputError


class ContinuousBatch:
    """The places of one batch. All its images have equal settings, but their own seeds.

    Args:
        engine: Lends its weights and CUDA graphs; the batch has a cache of its own.
        places: Number of images that are sampled together.

    `done[place]` codes of `codes[place]` are final; 0 where a place has never been taken.
    Raises InputError for a model with parallel_regions.
    """

    def __init__(self, engine: InferenceEngine, places: int) -> None:
        config = engine.config
        if config.parallel_regions:
            raise InputError(
                "a model with parallel_regions samples several codes per step, but continuous "
                "batching one; use autoregressive.sample"
            )
        self.engine, self.num_codes, self.places = engine, config.num_codes, places
        capacity = config.num_condition + config.num_codes
        heads = config.kv_heads, engine.head_dim
        self.cache, self.prefix_cache = (
            engine.cache_type(config.num_layers, 2 * count, capacity, heads, engine.embedding)
            for count in (places, 1)
        )
        self.state, self.prefix = (
            GenerationState(count, config.num_codes, 1, engine.device) for count in (places, 1)
        )
        self.done = [0] * places
        self.settings: GenerationRequest | None = None

    @property
    def codes(self) -> torch.Tensor:
        """(places, num_codes) int64, one buffer that every step fills."""
        return self.state.codes[:, : self.num_codes]

    @torch.inference_mode()
    def reset(self, request: GenerationRequest) -> None:
        """Free all places, and take the scales and the sampler of a request.

        Raises InputError for a request that samples several codes of an image per step.
        """
        several = "speculation_window" if request.speculation_window > 1 else ""
        several = "zipar_window" if request.zipar_window else several
        if several:
            raise InputError(f"{several}: continuous batching samples one code per image and step")
        bits = torch.zeros(self.places, 1, dtype=torch.int64)
        self.settings = replace(request, sample_bits=bits, forced_codes=None)
        self.state.begin(self.settings)
        self.state.filled.fill_(self.num_codes)  # an empty place repeats its last code
        self.done = [0] * self.places

    @torch.inference_mode()
    def begin(self, place: int, request: GenerationRequest) -> None:
        """Run the condition of one image, sample its first code, and put it in a place.

        request: one image, with the settings of `reset`; captions padded to the longest.
        """
        assert self.settings is not None
        state, prefix = self.state, self.prefix
        prefix.begin(request)
        with self._using(self.prefix_cache):
            self.engine.prefill(request, prefix, num_guided_codes(request.cfg_scales) > 0)
        rows = [place, place + self.places]  # conditional and null
        for layer, new in zip(self.cache.layers, self.prefix_cache.layers, strict=True):
            for buffers, parts in zip(layer, new, strict=True):  # keys, then values
                for buffer, part in zip(buffers, parts, strict=True):
                    buffer[rows] = part
        if prefix.modulations and not state.modulations:
            state.modulations = [part.repeat(self.places, 1, 1) for part in prefix.modulations]
        for buffer, part in zip(state.modulations, prefix.modulations, strict=True):
            buffer[rows] = part
        state.prefix_lengths[rows] = prefix.prefix_lengths
        state.sample_bits[place], state.codes[place] = prefix.sample_bits[0], prefix.codes[0]
        state.filled[place] = self.done[place] = 1

    @torch.inference_mode()
    def step(self) -> None:
        """Sample the next code of every image that is not finished."""
        assert self.settings is not None
        engine, sampler, capacity = self.engine, self.settings.sampler, self.cache.capacity
        guided = num_guided_codes(self.settings.cfg_scales) > 0
        kv_length = capacity if engine.cache_type is VarlenCache else None  # None: under a mask
        step = functools.partial(engine.step, self.state, guided, capacity, kv_length, sampler)
        with self._using(self.cache):
            key = "continuous", self.places, guided, sampler
            engine.advance(key, self.state, step, self.settings.eager)
        self.done = [min(done + 1, self.num_codes) if done else 0 for done in self.done]

    @contextlib.contextmanager
    def _using(self, cache: PrefixCache) -> Iterator[None]:
        """Let the engine read and write this cache instead of its own."""
        kept, self.engine.cache = self.engine.cache, cache
        try:
            yield
        finally:
            self.engine.cache = kept
