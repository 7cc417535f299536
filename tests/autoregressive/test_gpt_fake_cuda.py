"""The transformer on a CUDA device that does not exist: no host sync, nothing on a wrong device.

What FakeTensorMode cannot run, and a test on a real card must: CUDA graphs, streams, the backward
pass (the autograd engine opens the device) and values.
"""

import dataclasses
import itertools

import pytest
import torch
from helpers.fake_cuda import CUDA, HOST_READ, MIXED_DEVICES, fake_tensors, to_fake
from helpers.models import captions, tiny
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import TorchDispatchMode

from autoregressive.inference.engine import GenerationRequest, InferenceEngine, num_guided_codes
from autoregressive.inference.generate import generation_request
from autoregressive.inference.kv_cache import Fp8Cache, Int8Cache, PrefixCache, VarlenCache
from autoregressive.inference.parallel_decoding.regions import region_steps
from autoregressive.inference.parallel_decoding.zipar import zipar_steps
from autoregressive.inference.sampling_config import SamplingConfig
from autoregressive.models.conditioning import as_condition
from autoregressive.models.gpt import GPT
from autoregressive.objectives.build import LOSSES, build_objective
from autoregressive.objectives.config import ObjectiveConfig
from autoregressive.objectives.next_token import NextTokenLoss
from autoregressive.objectives.noisy_context import NoisyContextOptions
from core.distributed.world import World

with fake_tensors():  # older releases of torch lack the kernel
    VARLEN = VarlenCache.available(torch.empty(1, dtype=torch.bfloat16, device=CUDA))
LABELS = torch.tensor([0, 4, 2, 1])
PRECISIONS = ["fp32", "bf16", "int8", "fp8"]
CACHES = ["masked", "varlen", "int8", "fp8"]
SAMPLERS = {
    "greedy": {"greedy": True},
    "plain": {},
    "top_k": {"top_k": 9},
    "top_p": {"top_p": 0.9},
    "top_k_top_p": {"top_k": 9, "top_p": 0.9},
}


GUIDANCE = {
    "none": {"cfg_scale": 1.0},
    "constant": {"cfg_scale": 3.0},
    "interval": {"cfg_scale": 3.0, "cfg_interval": 4},
    "cosine": {"cfg_scale": 3.0, "cfg_schedule": "cosine", "cfg_start": 1},
}
RAR = {"family": "rar", "adaln": "full", "qk_norm": True, "num_kv_heads": 0}
# Not adaln: the engine converts its layers with Module.to, which refuses fake parameters.
VARIANTS = [
    {"qk_norm": True},
    {"guidance_input": True},
    {"num_kv_heads": 0},
    {"target_position": True},
]


def fake_gpt(condition: str = "class", **overrides) -> GPT:
    if condition == "text":
        overrides |= {"condition": "text", "text_dim": 12, "max_text_tokens": 9}
    return tiny(**{"dim": 64, "num_kv_heads": 2, **overrides})


def condition_of(gpt: GPT):
    return LABELS if gpt.config.condition == "class" else captions([3, 9, 5, 1], 12)


def request_of(gpt: GPT, sampler=None, forced=None, **sampling) -> GenerationRequest:
    """The checked request of four images, whose arguments the host has in its own memory."""
    settings = SamplingConfig(**sampling)
    request = generation_request(gpt, condition_of(gpt), settings, forced_codes=forced)
    # Graphs need a driver; a step is the same code without them.
    return dataclasses.replace(request, eager=True, sampler=sampler or request.sampler)


def two_steps(
    gpt: GPT, request: GenerationRequest, *engine: str | None, varlen: bool = True
) -> InferenceEngine:
    """The prefill and two steps on fake CUDA."""
    with fake_tensors((9, 0) if varlen else (7, 0)), torch.no_grad():
        built = InferenceEngine(to_fake(gpt), *engine)
        guided = num_guided_codes(request.cfg_scales) > 0
        state = built.begin(request)
        longest, ragged = built.prefill(request, state, guided)
        for step in (1, 2):
            length = longest + step + request.speculation_window - 1
            kv_end, masked = built.kv_extent(length, ragged or request.speculation_window > 1)
            assert masked or built.cache_type is VarlenCache
            kv_length = None if masked else length
            built.step(state, guided, kv_end, kv_length, request.sampler)
        assert state.codes.device == CUDA
        assert state.codes.dtype == torch.int64
    return built


@pytest.mark.parametrize("condition", ["class", "text"])
@pytest.mark.parametrize(("precision", "cache"), list(itertools.product(PRECISIONS, CACHES)))
@pytest.mark.parametrize("guided", [False, True])
def test_prefill_and_steps_in_every_precision_and_cache(condition, precision, cache, guided):
    gpt = fake_gpt(condition)
    request = request_of(gpt, cfg_scale=3.0 if guided else 1.0, top_k=9, top_p=0.9)
    stored = cache if cache in ("int8", "fp8") else None
    engine = two_steps(gpt, request, precision, stored, varlen=cache == "varlen")
    expected = {"int8": Int8Cache, "fp8": Fp8Cache, "varlen": VarlenCache, "masked": PrefixCache}
    if cache == "varlen" and (precision == "fp32" or not VARLEN):  # the kernel takes 16 bits
        cache = "masked"
    assert engine.cache_type is expected[cache]


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_prefill_and_steps_with_every_sampler_guidance_and_window(sampler, guidance, window):
    gpt = fake_gpt()
    settings = SAMPLERS[sampler] | GUIDANCE[guidance]
    two_steps(gpt, request_of(gpt, speculation_window=window, **settings), "bf16", None)


@pytest.mark.parametrize("guess", ["left", "above"])
@pytest.mark.parametrize("rule", ["same_images", "same_distribution"])
def test_prefill_and_steps_with_every_rule_and_guess(rule, guess):
    settings = {"speculation_window": 3, "speculative_rule": rule, "speculative_guess": guess}
    two_steps(fake_gpt(), request_of(fake_gpt(), **settings, top_k=9, top_p=0.9), "bf16", None)


@pytest.mark.parametrize("varlen", [True, False])
@pytest.mark.parametrize("condition", ["class", "text"])
def test_all_steps_of_zipar(condition, varlen):
    gpt = fake_gpt(condition)
    request = request_of(gpt, zipar_window=2, cfg_interval=4, top_k=9)
    with fake_tensors((9, 0) if varlen else (7, 0)), torch.no_grad():
        engine = InferenceEngine(to_fake(gpt), "bf16")
        assert (engine.cache_type is VarlenCache) == (varlen and VARLEN)
        *_, (codes, done) = zipar_steps(engine, request)
        assert (codes.device, done) == (CUDA, 16)


@pytest.mark.parametrize("varlen", [True, False])
@pytest.mark.parametrize("condition", ["class", "text"])
def test_all_steps_of_parallel_regions(condition, varlen):
    gpt = fake_gpt(condition, parallel_regions=4)
    request = request_of(gpt, cfg_interval=4, top_k=9)
    with fake_tensors((9, 0) if varlen else (7, 0)), torch.no_grad():
        engine = InferenceEngine(to_fake(gpt), "bf16")
        assert (engine.cache_type is VarlenCache) == (varlen and VARLEN)
        *_, (codes, done) = region_steps(engine, request)
        assert (codes.device, done) == (CUDA, 16)


@pytest.mark.parametrize("condition", ["class", "text"])
def test_prefill_and_steps_with_forced_codes(condition):
    gpt = fake_gpt(condition)
    forced = torch.full((4, 4, 4), -1)
    forced[:, :2] = 7
    two_steps(gpt, request_of(gpt, forced=forced), "bf16", None)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_prefill_and_steps_of_every_variant_of_the_model(variant):
    gpt = fake_gpt(**variant)
    two_steps(gpt, request_of(gpt))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("condition", ["class", "text"])
def test_the_forward_pass_of_training_under_autocast(condition, precision):
    """Forward only: the backward pass of fake CUDA tensors needs a driver."""
    gpt, dtypes = fake_gpt(condition), []
    gpt.layers[0].attention.wqkv.register_forward_hook(lambda *of: dtypes.append(of[-1].dtype))
    assert training_loss(gpt, precision).dtype == torch.float32
    assert dtypes == [torch.bfloat16 if precision == "bf16" else torch.float32]


def training_loss(gpt: GPT, precision: str) -> torch.Tensor:
    objective, world = NextTokenLoss(gpt.train(), 24), World(0, 1, CUDA)
    with fake_tensors():
        to_fake(objective)
        codes = torch.zeros(4, 16, dtype=torch.int64, device=CUDA)
        condition = as_condition(condition_of(gpt)).to(CUDA)
        with world.autocast(precision):
            loss = objective(codes, condition, torch.zeros(4, dtype=torch.bool, device=CUDA))
        assert loss.device == CUDA
    return loss


@pytest.mark.parametrize("variant", [{"qk_norm": True}, {"adaln": "full"}, RAR], ids=str)
def test_the_forward_pass_of_training_of_every_variant(variant):
    training_loss(fake_gpt(**variant), "bf16")


class HostCopies(TorchDispatchMode):
    """Raises at a copy from the host to the device, which makes the host wait."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        sources = [x for x in arguments if isinstance(x, torch.Tensor)]
        copies = function.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
        if copies and result.device == CUDA and sources[-1].device != CUDA:
            raise AssertionError("a copy from the host")
        return result


OBJECTIVES = {
    "next_token": {},
    "next_patch": {},
    "noisy_context": {"noisy_context": NoisyContextOptions(embedding_weight=0)},
    "guidance_free": {},
    "random_order": {},
}


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_no_objective_waits_for_a_copy_from_the_host(kind):
    config = ObjectiveConfig(kind, **OBJECTIVES[kind])
    gpt = fake_gpt(**LOSSES[config.kind].model_fields)
    objective = build_objective(config, gpt.train(), 24, 0, None, 7)
    objective.begin_step(0.3)
    with fake_tensors():
        to_fake(objective)
        codes = torch.zeros(4, 16, dtype=torch.int64, device=CUDA)
        labels, dropped = codes[:, 0], torch.zeros(4, dtype=torch.bool, device=CUDA)
        with HostCopies():
            assert objective(codes, labels, dropped, labels).device == CUDA
        with pytest.raises(AssertionError, match="a copy"), HostCopies():
            torch.zeros(3).to(CUDA)


# The tests above can fail: what they look for, planted.


def reads_a_value(logits, sample_bits, positions):
    codes = logits.argmax(-1)
    return codes + codes[0].item()


def asks_about_values(logits, sample_bits, positions):
    codes = logits.argmax(-1)
    return codes if (codes > 3).any() else codes + 1


def uses_a_cpu_tensor(logits, sample_bits, positions):
    return logits.add(torch.zeros(logits.shape[-1])).argmax(-1)


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (reads_a_value, HOST_READ),
        (asks_about_values, HOST_READ),
        (uses_a_cpu_tensor, MIXED_DEVICES),
    ],
)
def test_a_planted_host_read_or_cpu_tensor_in_sampling_fails(sampler, message):
    gpt = fake_gpt()
    with pytest.raises((RuntimeError, DataDependentOutputException), match=message):
        two_steps(gpt, request_of(gpt, sampler), "bf16", None)


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (lambda x: x * x.mean().item(), HOST_READ),
        (lambda x: x + torch.ones(x.shape[-1]), MIXED_DEVICES),
    ],
)
def test_a_planted_host_read_or_cpu_tensor_in_training_fails(plant, message):
    gpt = fake_gpt()
    gpt.norm.register_forward_hook(lambda module, inputs, output: plant(output))
    with pytest.raises((RuntimeError, DataDependentOutputException), match=message):
        training_loss(gpt, "bf16")
