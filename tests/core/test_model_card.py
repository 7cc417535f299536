"""Models go to a hub on loopback with their card, and come back with equal weights."""

import json
from pathlib import Path

import pytest
import torch
from helpers.local_hub import LocalHub
from helpers.models import tiny, write_models
from huggingface_hub import ModelCard
from PIL import Image

from autoregressive import GPT
from autoregressive.convert import ConvertConfig, convert
from autoregressive.models.pretrained import load_gpt
from core.checksums import FileSums, write_checksums
from core.config import InputError
from core.model_card import CardConfig
from tokenizer import VQModel
from tokenizer.convert import ConvertConfig as TokenizerConfig
from tokenizer.convert import convert as convert_tokenizer
from tokenizer.models.pretrained import load_tokenizer


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with LocalHub() as server:
        server.use(monkeypatch, tmp_path / "cache")
        yield server


def equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    other_state = other.state_dict()
    return all(torch.equal(value, other_state[key]) for key, value in one.state_dict().items())


def write_run(folder: Path) -> Path:
    """A training run's folder, as autoregressive.train leaves it."""
    write_models(folder, tiny(vocab_size=50))
    checkpoint = folder / "run" / "checkpoints" / "step_0000040"
    checkpoint.parent.mkdir(parents=True)
    (folder / "gpt").rename(checkpoint)
    write_checksums(checkpoint, {path.name: FileSums.of(path) for path in checkpoint.iterdir()})
    (folder / "run" / "config.yaml").write_text(
        "data: {codes: [codes/digits]}\ntraining: {num_steps: 40, batch_size: 8}\nout: run\n"
    )
    return folder / "run"


def write_results(folder: Path, sha256: str) -> Path:
    """What a scored sample run leaves."""
    folder.mkdir()
    scores = {"proxy_fd": 1.25, "n": 30, "note": "NOT FID", "reference": "real.npz"}
    settings = {"sampling": {"cfg_scale": 2.0}}
    (folder / "scores.json").write_text(json.dumps({**scores, "settings": settings}))
    (folder / "settings.json").write_text(json.dumps({"gpt_sha256": sha256}))
    Image.new("RGB", (8, 8)).save(folder / "samples.png")
    return folder


def test_a_run_goes_to_the_hub_with_its_card_and_comes_back_with_equal_weights(
    hub, tmp_path, capsys
):
    run = write_run(tmp_path)
    gpt, sha256 = load_gpt(run)
    results = write_results(tmp_path / "samples", sha256)
    card = CardConfig(results=(results,), dataset="handwritten digits", licence="mit")
    convert(ConvertConfig(source=str(run), push_to="owner/digits", card=card))
    assert hub.url in capsys.readouterr().out
    files = hub.repositories["owner/digits"].branches["main"]
    assert set(files) == {
        "config.yaml",
        "model.safetensors",
        "checksums.json",
        "README.md",
        "training.yaml",
        "0_samples.png",
    }
    assert equal(gpt, GPT.from_pretrained("owner/digits"))
    stored = ModelCard(files["README.md"].decode())
    stored.validate()
    facts = stored.data.to_dict()
    assert facts["license"] == "mit"
    assert facts["model-index"][0]["results"][0]["metrics"][0]["type"] == "proxy_fd"
    for shown in (
        'GPT.from_pretrained("owner/digits")',
        "Trained on handwritten digits.",
        "step_0000040",
        "codes/digits",
        "| proxy_fd | 1.25 |",
        "- note: NOT FID",
        "- sampling: {'cfg_scale': 2.0}",
        "![samples](0_samples.png)",
        sha256,
    ):
        assert shown in stored.text, shown
    assert "| FID |" not in stored.text


def test_a_tokenizer_goes_to_a_branch_and_comes_back(hub, tmp_path):
    _, source = write_models(tmp_path, tiny(vocab_size=50))
    out = tmp_path / "out"
    convert_tokenizer(TokenizerConfig(source=str(source), out=out, push_to="owner/vq@v1"))
    again = VQModel.from_pretrained("owner/vq", revision="v1")
    assert equal(load_tokenizer(source).vq, again)
    card = ModelCard.load(out / "README.md")
    card.validate()
    assert "None were measured" in card.text
    assert "Not recorded." in card.text


def test_scores_of_other_weights_and_wrong_targets_are_refused_before_anything_is_written(
    hub, tmp_path
):
    run, out = write_run(tmp_path), tmp_path / "out"
    other = CardConfig(results=(write_results(tmp_path / "other", "0" * 64),))
    nothing = CardConfig(results=(tmp_path,))
    unnamed = write_results(tmp_path / "unnamed", "")
    (unnamed / "settings.json").unlink()
    wrong = [
        ({"push_to": "owner/x", "card": other}, "measured on weights with sha256 000000000000"),
        ({"push_to": "owner/x", "card": nothing}, r"scores\.json: no such file"),
        ({"push_to": "owner/x", "card": CardConfig(results=(unnamed,))}, "does not say which"),
        ({"push_to": "name"}, "must be owner/name"),
        ({"push_to": "owner/x/file"}, "must be owner/name"),
        ({"push_to": "own er/x"}, "push_to: Repo id must"),
        ({"push_to": f"owner/{'x' * 200}"}, "push_to: Repo id must"),
    ]
    for changes, message in wrong:
        with pytest.raises(InputError, match=message):
            convert(ConvertConfig(source=str(run), out=out, **changes))
    assert not out.exists()
    assert hub.repositories == {}


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("scores.json", "[1]", r"scores\.json: holds a list"),
        ("scores.json", '{"settings": 3}', r"scores\.json: settings is 3"),
        ("scores.json", '{"gpt_sha256": 3}', "measured on weights with sha256 3"),
        ("scores.json", '{"settings": {"samples": "a\\u0000b"}}', "does not say|cannot be read"),
        ("settings.json", "[]", r"settings\.json: holds a list"),
    ],
)
def test_damaged_results_are_refused_before_anything_is_written(hub, tmp_path, file, text, message):
    run, out = write_run(tmp_path), tmp_path / "out"
    results = write_results(tmp_path / "results", load_gpt(run).sha256)
    (results / file).write_text(text)
    if file == "scores.json":
        (results / "settings.json").unlink()
    card = CardConfig(results=(results,))
    with pytest.raises(InputError, match=message):
        convert(ConvertConfig(source=str(run), out=out, push_to="owner/x", card=card))
    assert not out.exists()


@pytest.mark.parametrize("text", ["a: [", "\0", "a: &a [*a]"])
def test_a_damaged_configuration_of_the_run_is_refused_before_anything_is_written(
    hub, tmp_path, text
):
    run, out = write_run(tmp_path), tmp_path / "out"
    (run / "config.yaml").write_text(text)
    with pytest.raises(InputError, match=r"run/config\.yaml: not YAML"):
        convert(ConvertConfig(source=str(run), out=out, push_to="owner/x"))
    assert not out.exists()
    assert hub.repositories == {}
