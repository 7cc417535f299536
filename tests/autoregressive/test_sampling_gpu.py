"""The sampler's CUDA graphs, device-length attention and weight-only products."""

import dataclasses

import pytest
import torch
from helpers.models import tiny

from autoregressive import generate
from autoregressive.inference.engine import InferenceEngine
from autoregressive.inference.generate import generation_request
from autoregressive.inference.precision_check import compare
from autoregressive.inference.sampling_config import SamplingConfig

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
