import json
import shutil

import pytest
import torch

from core.config import InputError
from core.distributed.world import choose_device
from language import t5 as t5_module
from language.t5 import load_t5, pad

CPU = choose_device("cpu")
CAPTIONS = ["a cat", "a red cat on a blue mat in the sun", "dog", "the dog and the cat run"]


@pytest.fixture
def encoder(tiny_t5):
    return load_t5(tiny_t5, CPU, torch.float32, max_tokens=20)


def test_features_equal_those_of_transformers(encoder, tiny_t5):
    from transformers import AutoTokenizer, T5EncoderModel

    tokenizer = AutoTokenizer.from_pretrained(str(tiny_t5))
    model = T5EncoderModel.from_pretrained(str(tiny_t5)).eval()
    given = tokenizer(CAPTIONS, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(given.input_ids, attention_mask=given.attention_mask).last_hidden_state
    for found, row, mask in zip(
        encoder.encode(CAPTIONS), expected, given.attention_mask, strict=True
    ):
        torch.testing.assert_close(found, row[mask.bool()], rtol=1e-5, atol=1e-5)


def test_batching_by_length_changes_nothing(encoder, monkeypatch):
    alone = [encoder.encode([caption])[0] for caption in CAPTIONS]
    for tokens in (8192, 24):
        monkeypatch.setattr(t5_module, "TOKENS_PER_BATCH", tokens)
        for one, many in zip(alone, encoder.encode(CAPTIONS), strict=True):
            torch.testing.assert_close(one, many, rtol=1e-5, atol=1e-5)
    features, lengths = pad(encoder.encode(CAPTIONS))
    assert features.shape == (4, lengths.max(), encoder.dim)
    assert not features[2, lengths[2] :].any()


def test_long_captions_are_cut_and_counted_and_keep_their_end(encoder):
    long = "a cat " * 40
    short, cut = encoder.encode(["a cat", long])
    assert (len(cut), encoder.cut) == (20, 1)
    assert len(short) < 20


def test_an_encoder_is_told_from_others_in_any_dtype(encoder, tiny_t5):
    assert load_t5(tiny_t5, CPU, torch.bfloat16).identity == encoder.identity
    with torch.no_grad():
        next(p for n, p in encoder.model.named_parameters() if ".block.0." in n).add_(1)
    assert t5_module._identity(encoder.model) != encoder.identity


def test_a_missing_encoder_is_one_line(tmp_path):
    with pytest.raises(InputError, match="neither a local path"):
        load_t5(tmp_path / "nowhere", CPU, torch.float32)
    with pytest.raises(InputError, match="not a T5 that can be loaded"):
        load_t5(tmp_path, CPU, torch.float32)
    (tmp_path / "config.json").write_text('{"model_type": "t5", "d_model": "x"}')
    with pytest.raises(InputError, match=r"not a T5 that can be loaded .*d_model"):
        load_t5(tmp_path, CPU, torch.float32)


def test_a_damaged_tokenizer_is_one_line(tiny_t5, tmp_path):
    folder = shutil.copytree(tiny_t5, tmp_path / "t5")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**tokenizer, "version": "x"}))
    with pytest.raises(InputError, match=r"not a T5 .*Unknown tokenizer version"):
        load_t5(folder, CPU, torch.float32)
