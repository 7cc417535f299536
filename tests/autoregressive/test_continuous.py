"""Continuous batching: an image is the same whenever it joins, and whatever it joins."""

import pytest
import torch
from helpers.fill import fill_
from helpers.models import captions, tiny

from autoregressive.inference.continuous import ContinuousBatch
from autoregressive.inference.engine import InferenceEngine
from autoregressive.inference.generate import generation_request, sample_codes
from autoregressive.inference.sampling_config import SamplingConfig
from autoregressive.models.conditioning import as_condition

LONGEST = 8
MODELS = {
    "classes": {},
    "grouped heads, qk_norm": {"num_kv_heads": 2, "qk_norm": True},
    "guidance as an input, adaptive norms": {"guidance_input": True, "adaln": "full"},
    "target positions": {"target_position": True},
    "captions": {"condition": "text", "text_dim": 32, "max_text_tokens": LONGEST},
}
SETTINGS = {"cfg_schedule": "cosine", "top_k": 30}


def requests_of(engine: InferenceEngine, count: int, **settings):
    """Images of their own seeds, each a request of one."""
    text = engine.config.condition == "text"
    condition = captions([3, 8, 1, 5, 7, 2], 32) if text else torch.arange(6) % 5
    condition = as_condition(condition).pad(LONGEST)
    for i in range(count):
        sampling = SamplingConfig(seed=i, **{**SETTINGS, **settings})
        yield generation_request(engine, condition[torch.tensor([i])], sampling, torch.tensor([i]))


def sampled(engine: InferenceEngine, requests, joins: list[int], places: int) -> list[list[int]]:
    """The codes of requests of which request i begins before step joins[i], in any free place."""
    batch, held, found = ContinuousBatch(engine, places), {}, {}
    batch.reset(requests[0])
    for step in range(1000):
        for i, request in enumerate(requests):
            if joins[i] == step:
                place = next(place for place in reversed(range(places)) if place not in held)
                batch.begin(place, request)
                held[place] = i
        batch.step()
        for place in [p for p in held if batch.done[p] == batch.num_codes]:
            found[held.pop(place)] = batch.codes[place].tolist()
        if len(found) == len(requests):
            break
    return [found[i] for i in range(len(requests))]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("name", MODELS)
def test_an_image_is_the_same_bit_for_bit_whenever_it_joins(name, precision):
    engine = InferenceEngine(fill_(tiny(**MODELS[name])), precision)
    requests = list(requests_of(engine, 6))
    together = sampled(engine, requests, [0, 0, 3, 7, 16, 20], places=4)
    alone = [sampled(engine, [request], [0], places=4)[0] for request in requests]
    assert together == alone
    assert len({tuple(codes) for codes in together}) == 6


@pytest.mark.parametrize("name", MODELS)
def test_its_codes_are_those_of_sample_codes(name):
    engine = InferenceEngine(fill_(tiny(**MODELS[name])), "fp32")
    requests = list(requests_of(engine, 4))
    joined = sampled(engine, requests, [0, 2, 3, 9], places=3 + 1)
    for i, request in enumerate(requests):
        sampling = SamplingConfig(seed=i, **SETTINGS)
        wanted = sample_codes(engine, request.condition, sampling, torch.tensor([i]))
        assert joined[i] == wanted.flatten().tolist()


def test_the_engine_goes_on_with_a_cache_of_its_own():
    engine = InferenceEngine(tiny(), "fp32")
    labels = torch.tensor([1, 2])
    before = sample_codes(engine, labels, SamplingConfig(seed=3))
    own = engine.cache
    sampled(engine, list(requests_of(engine, 2)), [0, 1], places=2)
    assert engine.cache is own
    assert torch.equal(sample_codes(engine, labels, SamplingConfig(seed=3)), before)
