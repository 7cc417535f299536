"""The table of released models: complete, sourced, and the same in the documents."""

import dataclasses
import re

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
    unpinned_text,
)
from core.weights import find_weights, hub_file
from tokenizer import VQConfig

MODELS = list(released_models().values())
DOCUMENT = ROOT / "configs" / "released" / "README.md"


def test_the_document_shows_the_table():
    _, table, after = DOCUMENT.read_text().split("<!-- table -->\n")
    assert table.strip() == released_table(MODELS), "python -m autoregressive.convert --list true"
    assert after.strip().startswith(unpinned_text(MODELS))


DISTANCES = ("gfid", "rfid")


@pytest.mark.parametrize("package", ["tokenizer", "autoregressive"])
def test_the_tables_of_the_packages_show_what_the_table_of_models_says(package):
    """Their rows: files (with {a,b} for several), ..., the distances of the first scores."""
    lines = (ROOT / package / "README.md").read_text().splitlines()
    rows = [line for line in lines if re.match(r"\| `\w+/\w+/", line)]
    assert rows
    by_place = {model.location: model for model in MODELS}
    for row in rows:
        columns = [text.strip() for text in row.strip("|").split("|")]
        numbers = []
        for place in expanded(columns[0].strip("`")):
            score = next(iter(by_place[place].scores), None)
            found = [v for k, v in score.metrics.items() if k in DISTANCES] if score else []
            numbers += [f"{value:.2f}" for value in found] or ["-"]
        assert columns[-1] == ", ".join(numbers), row


def expanded(text: str) -> list[str]:
    """a{b,c}d -> abd, acd."""
    match = re.fullmatch(r"(.*)\{(.*)\}(.*)", text)
    return [match[1] + part + match[3] for part in match[2].split(",")] if match else [text]


def test_what_is_not_pinned_is_said():
    model, other = MODELS[:2]
    assert "any of these files" in unpinned_text([model, other])
    pinned = dataclasses.replace(model, sha256="0" * 64, revision="abcdef0123")
    assert unpinned_text([pinned, other]).startswith(f"No sha256 is known for {other.name}:")
    assert unpinned_text([pinned]) == ""
    assert "@abcdef0 sha256 00000000" in released_table([pinned])


# A file at a commit, or a paper.
SOURCE = re.compile(r"(README|docs/|release).* at commit [0-9a-f]{7}|arXiv \d{4}\.\d{5}")


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_every_entry_fits_the_models_and_names_its_source(model):
    config = GPTConfig if model.kind == "gpt" else VQConfig
    config(**model.architecture)
    SamplingConfig(**model.sampling)
    assert SOURCE.search(model.source), model.source
    assert all(SOURCE.search(score.source) and score.metrics for score in model.scores)
    assert model.paper is None or re.fullmatch(r"arXiv \d{4}\.\d{5}", model.paper)
    assert model.kind == "tokenizer" or model.grid
    if model.tokenizer:
        assert find_released(model.tokenizer).kind == "tokenizer"


def test_a_name_brings_its_file_and_fields_and_a_local_path_wins(tmp_path, monkeypatch):
    model = find_released("llamagen_l_384")
    assert str(hub_file(model)) == "FoundationVision/LlamaGen/c2i_L_384.pt"
    assert released_architecture("llamagen_l_384")["grid"] == (24, 24)
    nowhere = dataclasses.replace(model, file=None, note="the source does not state the file")
    with pytest.raises(InputError, match="llamagen_l_384: the source does not state"):
        hub_file(nowhere)
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
