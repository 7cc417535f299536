"""Sampling on a card: CUDA graphs, attention over lengths, lower precision, two streams."""

import dataclasses

import pytest
import torch
from helpers.models import captions, tiny, write_models

from autoregressive import generate
from autoregressive.inference.engine import InferenceEngine
from autoregressive.inference.generate import generation_request
from autoregressive.inference.kv_cache import PrefixCache, VarlenCache
from autoregressive.inference.precision_check import compare
from autoregressive.inference.sampling_config import SamplingConfig
from autoregressive.sampling.loop import decode_batches, sample_batches
from autoregressive.sampling.pipeline import ImagePipeline

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LABELS = torch.tensor([0, 4, 2, 1])
CUDA = torch.device("cuda")


@pytest.mark.parametrize("settings", [{"greedy": True}, {"top_k": 9, "cfg_interval": 4}], ids=str)
def test_codes_equal_those_of_the_cpu(settings):
    gpt = tiny(seed=4, dim=64)
    expected = generate(gpt, LABELS, cfg_scale=3.0, seed=1, **settings)
    decoder = InferenceEngine(gpt, device=CUDA)
    for _ in range(2):  # the second replays the graphs of the first
        drawn = generate(decoder, LABELS, cfg_scale=3.0, seed=1, **settings).cpu()
        assert (drawn == expected).float().mean() > 0.98


@pytest.mark.parametrize("compiled", [False, True])
def test_graphs_draw_what_eager_steps_draw(compiled):
    gpt = tiny(seed=4, dim=64, num_kv_heads=2)
    decoder = InferenceEngine(gpt, "bf16", compile=compiled, device=CUDA)
    request = generation_request(gpt, LABELS, SamplingConfig(cfg_interval=4))
    *_, (codes, _) = decoder.steps(dataclasses.replace(request, eager=True))
    eager = codes.clone()
    *_, (codes, _) = decoder.steps(request)
    assert torch.equal(codes, eager)
    held = torch.cuda.memory_allocated()
    for _ in range(20):
        *_, (codes, _) = decoder.steps(request)
    assert torch.cuda.memory_allocated() == held
    assert torch.equal(codes, eager)


@pytest.mark.parametrize(("precision", "cache"), [("int8", None), ("fp8", None), ("bf16", "int8")])
def test_lower_precision_changes_the_distribution_a_little(precision, cache):
    gpt = tiny(seed=2, dim=64)
    with torch.no_grad():
        gpt.output.weight.mul_(0.1)
    request = generation_request(gpt, LABELS, SamplingConfig())
    exact, other = (
        InferenceEngine(gpt, *how, device=CUDA) for how in (("bf16",), (precision, cache))
    )
    assert compare(exact, other, request, count=16)["kl"] < 0.05


@pytest.mark.parametrize("condition", ["class", "text"])
def test_attention_over_the_lengths_in_use_is_that_under_a_mask(monkeypatch, condition):
    text = {"condition": "text", "text_dim": 12, "max_text_tokens": 9}
    gpt = tiny(seed=2, dim=64, num_kv_heads=2, **(text if condition == "text" else {}))
    with torch.no_grad():
        gpt.output.weight.mul_(0.1)
    given = LABELS if condition == "class" else captions([3, 9, 5, 1], 12)
    request = generation_request(gpt, given, SamplingConfig(cfg_scale=3.0))
    varlen = InferenceEngine(gpt, "bf16", device=CUDA)
    if varlen.cache_type is not VarlenCache:
        pytest.skip("this torch or this card has no such kernel")
    monkeypatch.setattr(VarlenCache, "available", lambda like: False)
    masked = InferenceEngine(gpt, "bf16", device=CUDA)
    assert masked.cache_type is PrefixCache
    assert compare(masked, varlen, request, count=16)["kl"] < 0.01


def test_images_decoded_on_a_second_stream_are_those_decoded_in_order(tmp_path):
    models = write_models(tmp_path, tiny(vocab_size=50, dim=64))
    pipeline = ImagePipeline.from_pretrained(*map(str, models), device=CUDA)
    sampling, ids = SamplingConfig(cfg_scale=2.0), torch.arange(40)

    def batches():
        return sample_batches(pipeline, lambda part: part % 5, ids, 8, sampling)

    overlapped = list(decode_batches(pipeline, batches()))
    assert pipeline.overlap.stream is not None
    in_order = [(part, codes, pipeline.decode(codes).cpu()) for part, codes in batches()]
    for (part, codes, pixels), ours in zip(in_order, overlapped, strict=True):
        assert torch.equal(part, ours.ids)
        assert torch.equal(codes.cpu(), ours.codes)
        assert torch.equal(pixels, ours.pixels)
