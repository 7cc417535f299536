"""Several codes per step: speculation that changes nothing or the images alone, and ZipAR."""

import itertools

import pytest
import torch
from helpers.models import captions, tiny

from autoregressive import generate
from autoregressive.inference.continuous import ContinuousBatch
from autoregressive.inference.engine import InferenceEngine
from autoregressive.inference.generate import (
    generate_rows,
    generate_steps,
    generation_request,
)
from autoregressive.inference.parallel_decoding.zipar import zipar_schedule
from autoregressive.inference.sampler import TopKTopPSampler
from autoregressive.inference.sampling_config import SamplingConfig
from autoregressive.models.conditioning import as_condition
from core.config import InputError
from core.rng import random_bits

LABELS = torch.arange(6) % 5
TEXT = {"condition": "text", "text_dim": 12, "max_text_tokens": 9}
SAME_DISTRIBUTION = {"speculation_window": 4, "speculative_rule": "same_distribution"}
MODELS = {"class": {}, "captions": TEXT, "target_position": {"target_position": True}}


@pytest.fixture(params=MODELS)
def model(request):
    """A model, and conditions for six images."""
    gpt = tiny(seed=6, **MODELS[request.param])
    if gpt.target_position is not None:
        torch.nn.init.normal_(gpt.target_position.weight)
    condition = captions([1, 7, 4, 9, 2, 3], 12) if request.param == "captions" else LABELS
    return gpt, condition


@pytest.mark.parametrize("window", [2, 5, 40])
@pytest.mark.parametrize("guess", ["first", "left", "above"])
def test_no_guess_changes_an_image(model, guess, window):
    gpt, condition = model
    settings = {"cfg_scale": 3.0, "cfg_interval": 6, "top_k": 9, "seed": 2}
    plain = generate(gpt, condition, **settings)
    ahead = {"speculation_window": window, "speculative_guess": guess}
    assert torch.equal(generate(gpt, condition, **settings, **ahead), plain)
    forced = plain.masked_fill(torch.rand(plain.shape) < 0.5, -1)
    again = generate(gpt, condition, **settings, **ahead, forced_codes=forced)
    assert torch.equal(again, generate(gpt, condition, **settings, forced_codes=forced))


def steps_of(gpt, **settings) -> int:
    engine = InferenceEngine(gpt)
    generate(engine, LABELS[:1], cfg_scale=1.0, **settings)
    return engine.steps_taken


@pytest.mark.parametrize(("guess", "axis"), [("left", 0), ("above", 1)])
def test_a_guess_saves_steps_where_codes_repeat_in_its_direction(guess, axis):
    gpt = tiny(target_position=True)
    for name, parameter in gpt.named_parameters():
        if "norm" not in name:
            parameter.data.zero_()
    place = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"))[axis]
    gpt.target_position.weight.data[:, :4] = torch.eye(4)[place.flatten()]
    gpt.output.weight.data[:4, :4] = torch.eye(4)
    settings = {"greedy": True, "speculation_window": 6}
    codes = generate(gpt, LABELS[:1], cfg_scale=1.0, speculative_guess=guess, **settings)
    assert torch.equal(codes[0], place)  # the row's number, or the column's
    first = steps_of(gpt, **settings)
    assert steps_of(gpt, speculative_guess=guess, **settings) < first


def test_the_rule_of_distributions_accepts_more_guesses():
    gpt = tiny(seed=3)
    gpt.output.weight.data.mul_(0.3)
    labels, filled = torch.arange(200) % 5, {}
    for rule in ("same_images", "same_distribution"):
        sampling = SamplingConfig(1.0, speculation_window=6, speculative_rule=rule)
        engine = InferenceEngine(gpt)
        steps = generate_steps(engine, generation_request(gpt, labels, sampling))
        for _ in itertools.islice(steps, 4):
            pass
        filled[rule] = engine.states[200, 6].filled.float().mean().item()
    assert filled["same_distribution"] > filled["same_images"] > 4


def test_its_images_depend_neither_on_the_batch_nor_on_forced_codes_that_agree(model):
    gpt, condition = model
    settings = {"cfg_scale": 3.0, "cfg_interval": 6, "top_p": 0.9, **SAME_DISTRIBUTION}
    together = generate(gpt, condition, **settings)
    one = as_condition(condition)[torch.tensor([4])]
    alone = generate(gpt, one, **settings, sample_ids=torch.tensor([4]))
    assert torch.equal(alone[0], together[4])
    assert torch.equal(generate(gpt, condition, **settings), together)
    forced = together.clone()
    assert torch.equal(generate(gpt, condition, **settings, forced_codes=forced), together)
    forced[:, 2:] = -1
    some = generate(gpt, condition, **settings, forced_codes=forced)
    assert torch.equal(some[:, :2], together[:, :2])


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.7, "temperature": 1.4}], ids=str)
def test_the_sampler_draws_from_its_probabilities(options):
    sampler = TopKTopPSampler(**options)
    logits = 2 * torch.randn(1, 12, generator=torch.Generator().manual_seed(1))
    draws, bits = 40_000, random_bits(3, torch.arange(40_000)[:, None])
    drawn = sampler(logits.expand(draws, -1), bits, torch.zeros(draws, 1).long())
    share = drawn.bincount(minlength=12) / draws
    probabilities = sampler.probabilities(logits)[0]
    assert torch.equal(share > 0, probabilities > 0)
    torch.testing.assert_close(share, probabilities, atol=0.012, rtol=0)


@pytest.mark.parametrize("side", [16, 24, 32])
@pytest.mark.parametrize("window", [3, 4, 8, 100])
def test_zipar_takes_the_published_number_of_steps(side, window):
    steps = list(zipar_schedule((side, side), window))
    window = min(window, side)
    assert 1 + len(steps) == 2 * side + (side - 2) * window  # with the first code's
    sampled = [position for step in steps for position in step.sampled]
    assert sorted(sampled) == list(range(1, side**2))
    assert steps[-1].done == side**2


@pytest.mark.parametrize(("grid", "window"), [((1, 5), 2), ((5, 1), 1), ((3, 4), 1), ((4, 3), 2)])
def test_zipar_finishes_the_codes_that_it_says(grid, window):
    final = {0}
    for step in zipar_schedule(grid, window):
        assert all(source in final for _, source in step.placeholders)
        assert final.isdisjoint(step.sampled)
        final |= set(step.sampled)
        assert set(range(step.done)) <= final
        assert step.done == grid[0] * grid[1] or step.done not in final
    assert len(final) == grid[0] * grid[1]


@pytest.mark.parametrize("window", [4, 9])
def test_zipar_with_the_window_of_a_row_is_plain_sampling(model, window):
    gpt, condition = model
    settings = {"cfg_scale": 3.0, "cfg_interval": 6, "top_k": 9, "seed": 2}
    plain = generate(gpt, condition, **settings)
    assert torch.equal(generate(gpt, condition, **settings, zipar_window=window), plain)


@torch.no_grad()
def plain_zipar(gpt, condition, window: int, scale: float, grid: tuple[int, int]) -> torch.Tensor:
    """Greedy ZipAR written plainly: keys and values by position, one query at a time."""
    (rows, columns), batch = grid, len(condition)
    drop = torch.arange(2 * batch) >= batch
    x = gpt.cls_embedding(type(condition).cat([condition, condition]), drop)
    stored: list[dict[int, tuple]] = [{} for _ in gpt.blocks]

    def run(x, position: int) -> torch.Tensor:
        """The logits after the code at a position; -1: after the class."""
        rotary = gpt.rotary[position + 1].expand(2 * batch, 1, -1, -1)
        for block, memory in zip(gpt.blocks, stored, strict=True):

            def attend(q, k, v, memory=memory):
                memory[position] = k, v
                seen = [memory[p] for p in sorted(memory) if p <= position]
                keys, values = (torch.cat(parts, 1) for parts in zip(*seen, strict=True))
                q, keys, values = (part.transpose(1, 2) for part in (q, keys, values))
                return torch.nn.functional.scaled_dot_product_attention(
                    q, keys, values, scale=gpt.config.head_dim**-0.5
                ).transpose(1, 2)

            x = block(x, rotary, attend)
        logits = gpt.output(gpt.norm(x))[:, 0]
        conditional, null = logits.chunk(2)
        return null + scale * (conditional - null)

    def embed(codes) -> torch.Tensor:
        return gpt.tok_embeddings(codes).repeat(2, 1)[:, None]

    codes = torch.full((batch, rows * columns), -1)
    codes[:, 0] = run(x, -1).argmax(-1)
    counts, repeat = [1] + [0] * (rows - 1), []
    while counts[-1] < columns:
        opened = [
            r
            for r in range(rows)
            if counts[r] < columns
            and (r == 0 or counts[r - 1] >= (columns if r == 1 else min(window, columns)))
        ]
        found, inputs = {}, {}
        for r in opened:
            position = r * columns + counts[r]
            inputs[position - 1] = codes[:, position - 1]
            if (inputs[position - 1] < 0).any():
                inputs[position - 1] = codes[:, (r - 2) * columns + counts[r - 2] - 1]
        # All keys and values of a step exist before its attention, block by block; positions in
        # ascending order give the same, because a code sees only what is before it.
        for position in sorted([*inputs, *repeat]):
            known = inputs.get(position)
            logits = run(embed(codes[:, position] if known is None else known), position)
            if known is not None:
                found[position + 1] = logits.argmax(-1)
        for position, code in found.items():
            codes[:, position] = code
        for r in opened:
            counts[r] += 1
        repeat = [
            (r + 1) * columns - 1
            for r in opened
            if counts[r] == columns and r + 1 < rows and counts[r + 1] > 0
        ]
    return codes.unflatten(1, grid)


@pytest.mark.parametrize(("grid", "window"), [((4, 4), 1), ((5, 4), 2), ((4, 6), 3), ((3, 5), 4)])
def test_zipar_is_its_plain_algorithm(grid, window):
    gpt = tiny(seed=8, grid=grid)
    expected = plain_zipar(gpt, as_condition(LABELS), window, 2.0, grid)
    settings = {"cfg_scale": 2.0, "greedy": True, "zipar_window": window}
    assert torch.equal(generate(gpt, LABELS, **settings), expected)
    assert not torch.equal(expected, generate(gpt, LABELS, cfg_scale=2.0, greedy=True))


def test_zipar_images_do_not_depend_on_the_batch_and_come_row_by_row(model):
    gpt, condition = model
    settings = {"cfg_scale": 3.0, "cfg_interval": 6, "zipar_window": 2, "seed": 1}
    together = generate(gpt, condition, **settings)
    one = as_condition(condition)[torch.tensor([4])]
    alone = generate(gpt, one, **settings, sample_ids=torch.tensor([4]))
    assert torch.equal(alone[0], together[4])
    rows = list(generate_rows(gpt, generation_request(gpt, condition, SamplingConfig(**settings))))
    assert [part.shape[1] for part in rows] == [1, 2, 3, 4]
    assert all(torch.equal(part, together[:, : part.shape[1]]) for part in rows)
    forced = together.clone()
    forced[:, :, 1:] = -1
    some = generate(gpt, condition, **settings, forced_codes=forced)
    assert torch.equal(some[:, :, 0], together[:, :, 0])


def test_what_cannot_be_combined_is_refused_by_name():
    for wrong, message in (
        ({"speculative_rule": "same_distribution"}, "speculative_rule.*speculation_window"),
        ({"speculative_guess": "left"}, "speculative_guess left needs speculation_window"),
        ({**SAME_DISTRIBUTION, "greedy": True}, "greedy"),
        ({"zipar_window": 4, "speculation_window": 2}, "zipar_window and speculation_window"),
        ({"zipar_window": 0}, "zipar_window is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            SamplingConfig(**wrong)
    engine = InferenceEngine(tiny())
    for several in ({"zipar_window": 1}, {"speculation_window": 2}):
        request = generation_request(engine, LABELS[:1], SamplingConfig(**several))
        with pytest.raises(InputError, match=f"{next(iter(several))}: continuous batching"):
            ContinuousBatch(engine, 2).reset(request)


def test_folders_of_before_go_on_and_new_settings_are_recorded():
    before = SamplingConfig(speculation_window=4, speculative_guess="left").settings("class")
    assert before == SamplingConfig(speculation_window=4).settings("class")
    assert not {"zipar_window", "speculative_rule", "speculative_guess"} & set(before)
    assert SamplingConfig(zipar_window=3).settings("class")["zipar_window"] == 3
    recorded = SamplingConfig(**SAME_DISTRIBUTION).settings("class")
    assert recorded["speculative_rule"] == "same_distribution"
