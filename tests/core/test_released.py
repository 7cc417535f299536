"""The table of released models: complete, sourced, and the same in the document."""

import pytest
from helpers.paths import ROOT

from autoregressive import GPTConfig
from autoregressive.inference.sampling_config import SamplingConfig
from core.errors import InputError
from core.released import (
    find_released,
    read_released,
    released_architecture,
    released_models,
    released_table,
)
from core.weights import find_weights, hub_file
from tokenizer import VQConfig

MODELS = list(released_models().values())
DOCUMENT = ROOT / "configs" / "released" / "README.md"


def test_the_document_shows_the_table():
    between = DOCUMENT.read_text().split("<!-- table -->\n")[1]
    assert between.strip() == released_table(MODELS), "python -m autoregressive.convert --list true"


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_every_entry_fits_the_models_and_names_its_source(model):
    config = GPTConfig if model.kind == "gpt" else VQConfig
    config(**model.architecture)
    SamplingConfig(**model.sampling)
    assert model.source
    assert all(score.source and score.metrics for score in model.scores)
    assert model.kind == "tokenizer" or model.grid
    if model.tokenizer:
        assert find_released(model.tokenizer).kind == "tokenizer"


def test_a_name_brings_its_file_and_fields_and_a_local_path_wins(tmp_path, monkeypatch):
    model = find_released("llamagen_l_384")
    assert str(hub_file(model)) == "FoundationVision/LlamaGen/c2i_L_384.pt"
    assert released_architecture("llamagen_l_384")["grid"] == (24, 24)
    with pytest.raises(InputError, match="ibq_ar_b: the source does not state"):
        find_weights("ibq_ar_b", "")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llamagen_l_384").mkdir()
    assert find_weights("llamagen_l_384", "").is_dir()
    assert released_architecture("llamagen_l_384") == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("defaults: {}\nmodels: {a: {kind: gpt}}", "a: 'source'|a: .*source"),
        ("defaults: {source: x}\nmodels: {a: {kind: gpt, colour: red}}", "colour"),
        ("defaults: {source: x}\nmodels: {a: {kind: other}}", "kind is other"),
        ("models: {}", "not a table"),
    ],
)
def test_a_wrong_entry_is_refused_by_name(tmp_path, text, message):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        read_released(tmp_path)
