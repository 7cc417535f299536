"""What every condition must do: a null condition, batches, prefixes, the engine.

A new condition takes part with one line in CASES: fields of GPTConfig -> four conditions.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.models import captions, tiny

from autoregressive import GPT, generate
from autoregressive.models.conditioning import ClassCondition, Condition, TextCondition
from core.config import InputError

CASES: dict[str, tuple[dict[str, Any], Callable[[], Condition]]] = {
    "class": ({}, lambda: ClassCondition(torch.tensor([0, 4, 2, 4]))),
    "text": (
        {"condition": "text", "text_dim": 12, "max_text_tokens": 6},
        lambda: TextCondition(*captions([3, 6, 1, 2], 12)),
    ),
    "none": ({"condition": "none"}, lambda: ClassCondition(torch.zeros(4, dtype=torch.int64))),
}
CODES = torch.arange(64).view(4, 16) % 50


@pytest.fixture(params=CASES)
def case(request) -> tuple[GPT, Condition]:
    fields, conditions = CASES[request.param]
    gpt = tiny(**fields)
    for parameter in gpt.cls_embedding.parameters():
        torch.nn.init.normal_(parameter)
    return gpt, conditions()


@torch.no_grad()
def test_rows_parts_and_padding_give_the_logits_of_the_whole_batch(case):
    gpt, condition = case
    whole = gpt(CODES, condition)
    rows = torch.tensor([2, 0])
    torch.testing.assert_close(gpt(CODES[rows], condition[rows]), whole[rows])
    again = type(condition).cat([condition[rows], condition[rows]])
    torch.testing.assert_close(gpt(CODES[[2, 0, 2, 0]], again), whole[[2, 0, 2, 0]])
    torch.testing.assert_close(gpt(CODES, condition.pad(6)), whole)
    first = condition.repeat(4)
    assert len(first) == len(condition) == 4
    torch.testing.assert_close(gpt(CODES[[0, 0, 0, 0]], first), whole[:1].expand(4, -1, -1))


@torch.no_grad()
def test_a_dropped_condition_is_the_null_condition_whatever_it_was(case):
    gpt, condition = case
    dropped = torch.tensor([False, True, False, True])
    logits = gpt(CODES[[0, 0, 0, 0]], condition, dropped)
    if gpt.config.condition != "text":  # the null caption has the length of the one it replaces
        torch.testing.assert_close(logits[1], logits[3])
    whole = gpt(CODES[[0, 0, 0, 0]], condition)
    torch.testing.assert_close(logits[~dropped], whole[~dropped])
    if gpt.config.condition != "none":
        assert not torch.equal(logits[dropped], whole[dropped])


@torch.no_grad()
def test_the_engine_samples_what_the_model_predicts(case):
    gpt, condition = case
    codes = generate(gpt, condition, greedy=True, cfg_scale=1.0).flatten(1)
    assert torch.equal(gpt(codes, condition).argmax(-1), codes)
    examples = gpt.cls_embedding.examples(3)
    assert len(examples) == 3
    gpt.cls_embedding.check(examples)


def test_another_kind_of_condition_is_refused(case):
    gpt, _ = case
    labels, text = torch.tensor([0]), captions([2], 12)
    with pytest.raises(InputError, match="this model is conditioned on"):
        gpt.cls_embedding.check(
            ClassCondition(labels) if gpt.config.condition == "text" else TextCondition(*text)
        )
