"""The embeddings of wordllama; most tests run on a made package of five words."""

import pytest
import torch
from helpers.wordllama import install_wordllama
from safetensors.torch import save_file

from core.config import InputError
from core.distributed.world import choose_device
from language.text_encoder import load_text_encoder
from language.wordllama import KEY, TOKENIZER, WEIGHTS, load_wordllama

CPU = choose_device("cpu")


@pytest.fixture
def package(tmp_path, monkeypatch):
    return install_wordllama(tmp_path, monkeypatch)


def test_a_caption_becomes_the_embeddings_of_its_tokens(package):
    encoder = load_text_encoder("wordllama", CPU, torch.float32, 16)
    assert encoder.dim == 2
    features, lengths = encoder.encode(["A Red cat", "dog", ""])
    assert lengths.tolist() == [4, 2, 1]
    assert features[0].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert features[1].tolist() == [[0, 1], [8, 9], [0, 0], [0, 0]]


def test_long_captions_are_cut_and_counted(package):
    encoder = load_wordllama(CPU, torch.bfloat16, max_tokens=3)
    short, long = encoder.encode(["red", "red cat dog cat"])
    assert (len(short), len(long), encoder.cut) == (2, 3, 1)
    assert short.dtype == torch.bfloat16


def test_its_identity_names_it_and_changes_with_the_embeddings(package):
    first = load_wordllama(CPU, torch.float32).identity
    assert first.startswith("wordllama-")
    assert load_wordllama(CPU, torch.bfloat16).identity == first
    save_file({KEY: torch.ones(5, 2)}, str(package / WEIGHTS))
    assert load_wordllama(CPU, torch.float32).identity != first


def test_a_missing_or_incomplete_package_is_one_line(package, monkeypatch):
    (package / TOKENIZER).unlink()
    with pytest.raises(InputError, match="contains no tokenizers"):
        load_wordllama(CPU, torch.float32)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"wordllama: needs .* requirements-extra.txt"):
        load_text_encoder("wordllama", CPU, torch.float32)


def test_a_folder_of_this_name_is_read_as_a_t5(monkeypatch):
    class T5Error(Exception):
        pass

    def load(source, *_):
        raise T5Error(source)

    monkeypatch.setattr("language.text_encoder.load_t5", load)
    with pytest.raises(T5Error, match=r"\./wordllama"):
        load_text_encoder("./wordllama", CPU, torch.float32)


def test_the_embeddings_of_the_real_package_know_that_a_cat_is_nearer_to_a_dog_than_to_a_bank():
    pytest.importorskip("wordllama")
    encoder = load_wordllama(CPU, torch.float32)
    assert encoder.dim == 256
    cat, dog, bank = (x[1] for x in encoder.encode(["cat", "dog", "bank"]))
    assert torch.cosine_similarity(cat, dog, 0) > torch.cosine_similarity(cat, bank, 0)
