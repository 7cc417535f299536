import pytest
import torch
from helpers.models import tiny

from autoregressive import generate
from autoregressive.inference.engine import InferenceEngine
from autoregressive.inference.sampler import TopKTopPSampler, filter_logits
from core.config import InputError
from core.rng import random_bits


def test_top_k_keeps_ties():
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0, 0.0]])
    kept = filter_logits(logits, top_k=2, top_p=1.0).isfinite()
    assert kept.tolist() == [[True, False, True, True, False]]


def test_top_p_keeps_the_first_code_that_crosses_it():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert filter_logits(logits, 0, 0.6).isfinite().tolist() == [[True, True, False, False]]
    assert filter_logits(logits, 0, 0.01).isfinite().tolist() == [[True, False, False, False]]


def test_top_p_works_on_what_top_k_leaves():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    # Of the two left, the first has 4/7 > 0.5 of the mass.
    assert filter_logits(logits, 2, 0.5).isfinite().tolist() == [[True, False, False, False]]


def draw(
    logits: torch.Tensor, drawing: TopKTopPSampler, seed: int, ids: torch.Tensor, position: int
) -> torch.Tensor:
    return drawing(logits, random_bits(seed, ids[:, None]), torch.full((len(ids), 1), position))


@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_p": 0.7}, {"temperature": 2.0}])
def test_draws_follow_the_exact_distribution(settings):
    drawing = TopKTopPSampler(**settings)
    logits = torch.randn(12, generator=torch.Generator().manual_seed(0)) * 1.5
    draws = 20_000
    codes = draw(logits.repeat(draws, 1), drawing, seed=0, ids=torch.arange(draws), position=3)
    kept = filter_logits(logits[None] / drawing.temperature, drawing.top_k, drawing.top_p)[0]
    expected = kept.softmax(-1) * draws
    seen = torch.bincount(codes, minlength=12)
    assert (seen[expected == 0] == 0).all()
    inside = expected > 0
    chi_square = ((seen - expected)[inside] ** 2 / expected[inside]).sum().item()
    assert chi_square < 35  # the 99.9 % point of 11 degrees of freedom is 31.3


def test_noise_differs_by_seed_sample_and_position():
    logits = torch.zeros(1, 1000)
    ids = torch.tensor([0])
    first = draw(logits, TopKTopPSampler(), 0, ids, 0)
    assert first != draw(logits, TopKTopPSampler(), 1, ids, 0)
    assert first != draw(logits, TopKTopPSampler(), 0, ids + 1, 0)
    assert first != draw(logits, TopKTopPSampler(), 0, ids, 1)


@pytest.mark.parametrize("cfg_interval", [-1, 3])
def test_a_sample_does_not_depend_on_its_batch(cfg_interval):
    gpt = tiny()
    labels = torch.arange(8) % 5

    def sample(batch_size: int) -> torch.Tensor:
        parts = [
            generate(
                gpt, labels[ids], cfg_scale=3.0, cfg_interval=cfg_interval, seed=5, sample_ids=ids
            )
            for ids in torch.arange(8).split(batch_size)
        ]
        return torch.cat(parts)

    whole = sample(8)
    assert whole.shape == (8, 4, 4)
    assert torch.equal(whole, sample(3))
    assert torch.equal(whole, sample(1))


def plain_greedy(gpt, labels: torch.Tensor, cfg_scale: float, guided: int) -> torch.Tensor:
    """Greedy guided decoding without any cache, by the definition."""
    codes = torch.zeros(len(labels), 16, dtype=torch.int64)
    null = torch.full_like(labels, gpt.config.num_classes)
    for position in range(16):
        with torch.no_grad():
            logits = gpt(codes, labels)[:, position]
            if position < guided:
                away = gpt(codes, null)[:, position]
                logits = away + cfg_scale * (logits - away)
        codes[:, position] = logits.argmax(-1)
    return codes


@pytest.mark.parametrize(("cfg_interval", "guided"), [(-1, 16), (0, 2), (5, 7)])
def test_guidance_covers_the_first_code_and_the_interval_after_it(cfg_interval, guided):
    gpt = tiny(seed=3)
    labels = torch.tensor([0, 1, 2])
    codes = generate(gpt, labels, cfg_scale=4.0, cfg_interval=cfg_interval, greedy=True)
    assert torch.equal(codes.flatten(1), plain_greedy(gpt, labels, 4.0, guided))


def test_no_null_rows_are_computed_without_guidance():
    gpt = InferenceEngine(tiny())
    sizes = []
    gpt.norm.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    generate(gpt, torch.tensor([0, 1]), cfg_scale=1.0)
    assert set(sizes) == {2}
    sizes.clear()
    generate(gpt, torch.tensor([0, 1]), cfg_scale=2.0, cfg_interval=2)
    assert sizes == [4] * 4 + [2] * 12


def test_generation_leaves_the_training_mode_as_it_was():
    gpt = tiny(token_dropout=0.5).train()
    labels = torch.tensor([1])
    assert torch.equal(generate(gpt, labels), generate(gpt, labels))
    assert gpt.training


def test_bad_requests_are_refused():
    gpt = tiny()
    with pytest.raises(InputError, match=r"0 \.\. 4"):
        generate(gpt, torch.tensor([9]))
    with pytest.raises(InputError, match="classes"):
        generate(gpt, (torch.zeros(1, 2, 3), torch.tensor([2])))
    for wrong in ({"cfg_scale": 0.5}, {"top_p": 0.0}, {"top_k": -2}, {"cfg_interval": -2}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            generate(gpt, torch.tensor([1]), **wrong)
