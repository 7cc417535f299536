"""Models without a condition, the null class, and the tokenizer of a run's sample grids."""

import os

import pytest
import torch
from helpers.codes import write_codes
from helpers.local_hub import LocalHub
from helpers.models import small, tiny, write_models
from helpers.training import flags

from autoregressive import GPT, ImagePipeline, generate
from autoregressive.data.config import DataConfig
from autoregressive.data.open import open_data
from autoregressive.sampling.conditions import NoConditions
from autoregressive.sampling.config import ConditionConfig
from autoregressive.train import train
from autoregressive.training.config import TrainConfig
from autoregressive.training.validation import find_tokenizer
from core.config import InputError, parse_config
from tokenizer.models.pretrained import load_tokenizer


def test_the_null_class_is_not_a_label():
    with pytest.raises(InputError, match=r"labels must be in 0 \.\. 4"):
        generate(tiny(), torch.tensor([0, 5]))


def test_an_unconditional_model_samples_the_null_class_and_refuses_guidance(tmp_path):
    gpt = tiny(condition="none")
    assert gpt.config.num_classes == 0
    assert len(gpt.cls_embedding.embedding_table.weight) == 1
    codes = generate(gpt, torch.zeros(2, dtype=torch.int64))
    assert codes.shape == (2, 4, 4)
    with pytest.raises(InputError, match="unconditional"):
        generate(gpt, torch.zeros(2, dtype=torch.int64), cfg_scale=2.0)
    pipeline = ImagePipeline.from_pretrained(*map(str, write_models(tmp_path, gpt)))
    images = pipeline(None, num_images_per_prompt=3, progress=False).images
    assert len(images) == 3
    with pytest.raises(InputError, match="unconditional"):
        pipeline([1])


def test_a_sample_run_without_classes_has_no_labels():
    conditions = NoConditions(ConditionConfig(), 7)
    assert conditions.labels is None and conditions.count == 7
    assert conditions[torch.arange(3)].labels.tolist() == [0, 0, 0]
    with pytest.raises(InputError, match="unconditional"):
        NoConditions(ConditionConfig(classes=(1,)), 7)


def test_training_without_a_condition_ignores_the_classes(tmp_path, world):
    codes = write_codes(tmp_path / "codes")
    more = ("--data.condition", "none", "--training.num_steps", 2)
    arguments = [str(flag) for flag in flags(codes, tmp_path / "run", *more)]
    train(parse_config(TrainConfig, arguments), world)
    gpt = GPT.from_pretrained(tmp_path / "run")
    assert (gpt.config.condition, gpt.config.num_classes) == ("none", 0)


def test_images_without_classes_name_the_flag_that_trains_without_them(tmp_path, world):
    data = open_data(DataConfig((write_codes(tmp_path / "codes"),)), world, tmp_path)
    data.num_classes = 0
    with pytest.raises(InputError, match=r"--data\.condition none"):
        data.model_fields()


def test_the_tokenizer_of_the_codes_is_found_beside_them_from_any_folder(
    tmp_path, world, monkeypatch
):
    vq = small(vocab_size=32)
    vq.save_pretrained(tmp_path / "vq")
    identity = load_tokenizer(tmp_path / "vq").identity()
    facts = {"tokenizer": "vq", "tokenizer_sha256": identity, "tokenizer_path": "../vq"}
    config = DataConfig((write_codes(tmp_path / "codes", **facts),))
    data = open_data(config, world, tmp_path)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found, where = find_tokenizer(data, config, world)
    assert found is not None
    assert where == os.path.normpath(tmp_path / "vq")


def test_the_tokenizer_of_the_codes_is_found_on_the_hub(tmp_path, world, monkeypatch, capsys):
    vq = small(vocab_size=32)
    vq.save_pretrained(tmp_path / "vq")
    files = {path.name: path.read_bytes() for path in (tmp_path / "vq").iterdir()}
    identity = load_tokenizer(tmp_path / "vq").identity()
    facts = {"tokenizer": "owner/vq", "tokenizer_sha256": identity}
    codes = write_codes(tmp_path / "codes", **facts)
    arguments = flags(codes, tmp_path / "run", "--training.num_steps", 1)
    with LocalHub() as hub:
        hub.use(monkeypatch, tmp_path / "cache")
        hub.add("owner/vq", files)
        train(parse_config(TrainConfig, [str(flag) for flag in arguments]), world)
    said = capsys.readouterr().out
    assert "sample grids are decoded by owner/vq" in said
    assert (tmp_path / "run" / "samples" / "step_0000001.png").exists()
    assert said.rstrip().endswith("samples")


def test_a_run_without_sample_grids_says_why(tmp_path, world, monkeypatch, caplog, capsys):
    facts = {"tokenizer": "no/such-tokenizer"}
    codes = write_codes(tmp_path / "codes", **facts)
    arguments = flags(codes, tmp_path / "run", "--training.num_steps", 2)
    with LocalHub() as hub:
        hub.use(monkeypatch, tmp_path / "cache")
        train(parse_config(TrainConfig, [str(flag) for flag in arguments]), world)
    assert "no sample grids, because" in caplog.text
    assert "samples" not in capsys.readouterr().out
