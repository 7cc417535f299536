import os

import pytest
import torch
from helpers.commands import run_module
from helpers.models import small

from core.config import InputError
from core.files import file_sha256
from tokenizer import VQModel
from tokenizer.models.pretrained import load_tokenizer


def test_a_bare_state_dict_loads_with_the_sha256_of_its_file(tmp_path):
    vq = small(channel_multipliers=(1, 2, 4), num_res_blocks=2)
    path = tmp_path / "vq.pt"
    for stored in (vq.state_dict(), {"state_dict": vq.state_dict()}):
        torch.save(stored, path)
        loaded, sha256, _ = load_tokenizer(path)
        assert loaded.config == vq.config
        assert sha256 == file_sha256(path)
        images = torch.rand(1, 3, 16, 16)
        assert torch.equal(loaded.encode(images), vq.encode(images))


def test_wrong_weights_are_refused_by_name(tmp_path):
    state = small().state_dict()
    del state["decoder.norm_out.bias"]
    torch.save({"model": state}, tmp_path / "broken.pt")
    with pytest.raises(InputError, match=r"decoder\.norm_out\.bias is missing"):
        VQModel.from_pretrained(tmp_path / "broken.pt")
    (tmp_path / "text.pt").write_text("not weights")
    with pytest.raises(InputError, match=r"text\.pt"):
        VQModel.from_pretrained(tmp_path / "text.pt")


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": small().state_dict(), "args": Malicious()}, "evil.pt")
    with pytest.raises(InputError, match="could run code"):
        VQModel.from_pretrained("evil.pt")
    assert not (tmp_path / "pwned").exists()


def test_the_command_converts_a_released_file(tmp_path):
    vq = small()
    torch.save({"model": vq.state_dict()}, tmp_path / "vq.pt")
    run_module("tokenizer.convert", "--source", tmp_path / "vq.pt", "--out", tmp_path / "ours")
    assert VQModel.from_pretrained(tmp_path / "ours").config == vq.config
