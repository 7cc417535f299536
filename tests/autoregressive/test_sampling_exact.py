"""The fast sampler draws what the plain algorithm draws, with the same distribution."""

import gc
import itertools

import pytest
import torch
from helpers.models import captions, tiny
from scipy.stats import chi2

from autoregressive import generate
from autoregressive.inference.engine import InferenceEngine, engine_of
from autoregressive.inference.generate import generate_rows, generate_steps, generation_request
from autoregressive.inference.precision_check import compare
from autoregressive.inference.quantized_linear import Int8Prepacked, WeightOnly, pack, quantize
from autoregressive.inference.sampler import gumbel
from autoregressive.inference.sampling_config import SamplingConfig
from benchmarks.support import reference_sampler
from core.config import InputError
from core.rng import random_bits

LABELS = torch.tensor([0, 4, 2])
SETTINGS = [
    {"greedy": True},
    {},
    {"cfg_interval": 3, "top_k": 20},
    {"top_p": 0.8, "temperature": 1.3},
    {"top_k": 30, "top_p": 0.9},
    {"cfg_schedule": "cosine", "cfg_power": 2.0},
    {"cfg_schedule": "linear", "cfg_start": 2, "cfg_interval": 9},
    {"cfg_scale": 1.0},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("model", [{}, {"num_kv_heads": 2, "dim": 48}])
def test_seeded_codes_equal_those_of_the_plain_algorithm(settings, model):
    gpt = tiny(seed=4, **model)
    config = SamplingConfig(**{"cfg_scale": 3.0, "top_k": 0, "seed": 7, **settings})

    def draw(probabilities: torch.Tensor, position: int) -> torch.Tensor:
        noise = random_bits(7, torch.arange(3)[:, None], torch.tensor([[position]]))
        return (probabilities.log() + gumbel(noise, torch.arange(50))).argmax(-1)

    expected = reference_sampler.generate(gpt, LABELS, config, draw)
    assert torch.equal(generate(gpt, LABELS, **vars(config)), expected)


def joint_distribution(gpt, label: int, config: SamplingConfig) -> torch.Tensor:
    """The probability of every image of 3 codes, from teacher forcing and guided logits."""
    vocab = gpt.config.vocab_size
    images = torch.cartesian_prod(*[torch.arange(vocab)] * 3)
    labels = torch.full((len(images),), label)
    with torch.no_grad():
        conditional, null = gpt(images, labels), gpt(images, torch.full_like(labels, 5))
    scale = torch.tensor(config.cfg_scales(3))[:, None]
    guided = null + scale * (conditional - null)
    steps = [reference_sampler.probabilities(guided[:, position], config) for position in range(3)]
    chosen = torch.stack(steps, 1).gather(2, images[..., None])[..., 0]
    return chosen.double().prod(1)


def check_chi_square(codes: torch.Tensor, expected: torch.Tensor) -> None:
    """Images (n, 3) of 6 codes against the expected number of each of the 216."""
    seen = torch.bincount((codes * torch.tensor([36, 6, 1])).sum(1), minlength=216).double()
    assert seen[expected == 0].sum() == 0
    rare = expected < 10  # one bin, so that chi-square holds
    seen = torch.cat([seen[~rare], seen[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    kept = expected > 0
    chi_square = ((seen - expected)[kept] ** 2 / expected[kept]).sum().item()
    assert chi_square < chi2.ppf(0.9999, int(kept.sum()) - 1)


@pytest.mark.parametrize(
    ("cfg_scale", "cfg_interval", "top_k", "top_p"),
    itertools.product([1.0, 3.0], [-1, 0], [0, 4], [1.0, 0.8]),
)
def test_images_follow_the_exact_distribution(cfg_scale, cfg_interval, top_k, top_p):
    gpt = tiny(seed=1, vocab_size=6, grid=(1, 3))
    with torch.no_grad():
        gpt.output.weight.mul_(0.3)  # so that guidance leaves several codes likely
    config = SamplingConfig(cfg_scale, cfg_interval, top_k=top_k, top_p=top_p, seed=11)
    draws = 20_000
    codes = generate(gpt, torch.full((draws,), 2), **vars(config)).flatten(1)
    check_chi_square(codes, joint_distribution(gpt, 2, config) * draws)


def pointers(decoder: InferenceEngine) -> list[int]:
    return [part.data_ptr() for pair in decoder.cache.layers for store in pair for part in store]


@pytest.mark.slow
def test_twenty_calls_allocate_and_compile_nothing_new():
    gpt = tiny()

    def call(seed: int) -> None:
        generate(gpt, LABELS, cfg_scale=2.0, cfg_interval=4, top_k=9, seed=seed)

    def held() -> tuple[int, int]:
        gc.collect()
        tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor]
        return len(tensors), sum(t.nbytes for t in tensors if t.layout == torch.strided)

    call(0)
    decoder, compiled = engine_of(gpt), torch._dynamo.utils.counters["stats"].copy()
    buffers = pointers(decoder)
    before = held()
    for seed in range(20):
        call(seed)
    assert held() == before
    assert engine_of(gpt) is decoder
    assert pointers(decoder) == buffers
    assert torch._dynamo.utils.counters["stats"] == compiled


def test_changed_weights_are_packed_again():
    gpt = tiny()
    before = generate(gpt, LABELS, greedy=True)
    with torch.no_grad():
        gpt.tok_embeddings.weight.neg_()
        gpt.layers[0].feed_forward.w1.weight.neg_()
    after = generate(gpt, LABELS, greedy=True)
    assert not torch.equal(before, after)
    assert torch.equal(after, generate(InferenceEngine(gpt), LABELS, greedy=True))


def test_a_model_in_training_keeps_no_decoder():
    gpt = tiny().train()
    assert engine_of(gpt) is not engine_of(gpt)


def test_captions_of_different_lengths_do_not_depend_on_their_batch():
    gpt = tiny(condition="text", text_dim=12, max_text_tokens=9)
    features, lengths = captions([1, 7, 4], text_dim=12)
    ids = torch.arange(3)
    together = generate(gpt, (features, lengths), cfg_scale=3.0, cfg_interval=6, top_k=10)
    for i in range(3):
        alone = (features[i : i + 1], lengths[i : i + 1])
        settings = {"cfg_scale": 3.0, "cfg_interval": 6, "top_k": 10}
        one = generate(gpt, alone, sample_ids=ids[i : i + 1], **settings)
        assert torch.equal(one[0], together[i])


def test_an_image_can_be_shown_row_by_row():
    gpt, config = tiny(), SamplingConfig(top_k=5)
    rows = list(generate_rows(gpt, generation_request(gpt, LABELS, config)))
    assert [tuple(part.shape) for part in rows] == [(3, n, 4) for n in (1, 2, 3, 4)]
    assert torch.equal(rows[-1], generate(gpt, LABELS, top_k=5))
    assert torch.equal(rows[1], rows[-1][:, :2])


def test_guidance_schedules():
    def scales(**settings: object) -> list[float]:
        return SamplingConfig(cfg_scale=3.0, **settings).cfg_scales(8)

    assert scales() == [3.0] * 8
    assert scales(cfg_interval=1) == [3.0] * 3 + [1.0] * 5
    assert scales(cfg_start=2, cfg_interval=3) == [1.0] * 2 + [3.0] * 3 + [1.0] * 3
    assert scales(cfg_schedule="linear") == [1 + 2 * i / 8 for i in range(8)]
    cosine = scales(cfg_schedule="cosine")
    assert cosine[0] == 1
    assert cosine[4] == pytest.approx(2)
    power = scales(cfg_schedule="cosine", cfg_power=2.75)
    assert all(late < early for late, early in zip(power[1:], cosine[1:], strict=True))


def test_int8_loses_only_what_the_weights_lose():
    weight, x = torch.randn(48, 64), torch.randn(5, 1, 64) * torch.logspace(-2, 2, 5)[:, None, None]
    codes, scales = quantize(weight, torch.int8)
    assert (codes * scales[:, None] - weight).abs().max() <= scales.max() / 2 * 1.001
    exact = torch.nn.functional.linear(x, codes * scales[:, None])
    for layer in (pack(weight, torch.float32, "int8"), WeightOnly(weight, x.dtype, torch.int8)):
        assert ((layer(x) - exact).norm(dim=-1) / exact.norm(dim=-1)).max() < 2e-4
    assert isinstance(pack(weight, torch.float32, "int8"), Int8Prepacked)


def test_w8a8_rounds_each_row_of_activations_by_itself():
    weight, x = torch.randn(48, 64), torch.randn(5, 64) * torch.logspace(-2, 2, 5)[:, None]
    (codes, scales), (rows, row_scales) = quantize(weight, torch.int8), quantize(x, torch.int8)
    expected = (rows.float() @ codes.float().T) * scales * row_scales[:, None]
    result = pack(weight, torch.float32, "w8a8")(x)
    # A value halfway between two codes may go either way.
    assert ((result - expected).norm(dim=-1) / expected.norm(dim=-1)).max() < 2e-3


@pytest.mark.parametrize("precision", ["bf16", "int8", "w8a8"])
def test_lower_precision_draws_nearly_the_same_codes(precision):
    gpt, labels = tiny(vocab_size=20), torch.arange(200) % 5
    exact, codes = (generate(d, labels, seed=3) for d in (gpt, InferenceEngine(gpt, precision)))
    # First codes only: a code that differs changes the codes after it.
    assert (codes[:, 0, 0] == exact[:, 0, 0]).float().mean() > 0.95


def test_fp8_is_refused_on_a_cpu():
    with pytest.raises(InputError, match="fp8"):
        InferenceEngine(tiny(), "fp8")


@pytest.mark.parametrize("window", [2, 5, 40])
@pytest.mark.parametrize(
    "settings", [{"greedy": True}, {"top_k": 9}, {"cfg_interval": 4, "top_p": 0.9}], ids=str
)
def test_guessing_ahead_draws_the_same_images(window, settings):
    gpt = tiny(seed=6)
    labels = torch.arange(20) % 5
    plain = generate(gpt, labels, cfg_scale=3.0, seed=2, **settings)
    assert torch.equal(
        generate(gpt, labels, cfg_scale=3.0, seed=2, speculation_window=window, **settings), plain
    )


@pytest.mark.parametrize(
    ("rule", "guess", "window", "grid"),
    [
        ("same_images", "first", 2, (1, 3)),
        ("same_distribution", "first", 2, (1, 3)),
        ("same_distribution", "left", 3, (1, 3)),
        ("same_distribution", "above", 4, (3, 1)),
    ],
)
def test_guessing_ahead_follows_the_exact_distribution(rule, guess, window, grid):
    gpt = tiny(seed=1, vocab_size=6, grid=grid)
    with torch.no_grad():
        gpt.output.weight.mul_(0.3)
    speculation = {"speculative_rule": rule, "speculative_guess": guess}
    config = SamplingConfig(
        3.0, top_k=4, top_p=0.9, seed=12, speculation_window=window, **speculation
    )
    draws = 20_000
    codes = generate(gpt, torch.full((draws,), 2), **vars(config)).flatten(1)
    check_chi_square(codes, joint_distribution(gpt, 2, config) * draws)


def test_guessing_ahead_takes_fewer_steps_where_guesses_are_right():
    gpt = tiny(vocab_size=50)
    with torch.no_grad():
        gpt.output.weight.zero_()  # all codes are alike: the likeliest is always the same
    config = SamplingConfig(1.0, greedy=True, speculation_window=4)
    steps = list(generate_steps(gpt, generation_request(gpt, LABELS, config)))
    assert len(steps) == 1 + 4  # the first code, then 15 by four


def test_known_codes_and_guesses_go_together():
    gpt = tiny(seed=3)
    plain = generate(gpt, LABELS, seed=5)
    known = plain.clone()
    known[:, 1:] = -1
    again = generate(gpt, LABELS, seed=5, forced_codes=known, speculation_window=6)
    assert torch.equal(again, plain)


@pytest.mark.parametrize("kept", ["int8", "fp8"])
def test_eight_bit_keys_and_values_change_the_distribution_a_little(kept):
    gpt = tiny(seed=2, num_kv_heads=2)
    with torch.no_grad():
        gpt.output.weight.mul_(0.1)
    exact, other = InferenceEngine(gpt), InferenceEngine(gpt, cache=kept)
    request = generation_request(gpt, LABELS, SamplingConfig())
    change = compare(exact, other, request, count=16)
    assert 0 < change["kl"] < {"int8": 1e-3, "fp8": 2e-2}[kept]
    assert change["same_likeliest"] > 0.8
    assert other.cache.layers[0][0][0].element_size() == 1
    assert compare(exact, InferenceEngine(gpt), request, count=16)["kl"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "int8", "w8a8"])
def test_compiled_layers_draw_the_same_codes_and_compile_once(precision):
    gpt, labels = tiny(vocab_size=20), torch.arange(200) % 5
    decoder = InferenceEngine(gpt, precision, compile=True)
    codes = generate(decoder, labels, seed=3)
    eager = generate(InferenceEngine(gpt, precision), labels, seed=3)
    assert torch.equal(codes[:, 0, 0], eager[:, 0, 0])
    assert (codes == eager).float().mean() > 0.9  # rounding moves a code, and those after it
    compiled = torch._dynamo.utils.counters["stats"].copy()
    for seed in range(20):
        generate(decoder, labels, seed=seed)
    assert torch._dynamo.utils.counters["stats"] == compiled


def test_a_masked_prefix_longer_than_what_is_valid_changes_nothing(monkeypatch):
    # What a GPU attends to without device lengths, so that few graphs serve all positions.
    gpt = tiny(seed=2, num_kv_heads=2)
    exact = generate(gpt, LABELS, seed=4, cfg_interval=5)
    decoder = InferenceEngine(gpt)
    monkeypatch.setattr(
        decoder, "kv_extent", lambda length, needs_mask: (decoder.cache.capacity, True)
    )
    assert torch.equal(generate(decoder, LABELS, seed=4, cfg_interval=5), exact)
