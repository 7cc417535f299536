"""Sampling and inpainting with prompts: files of prompts, layouts, text encoders."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.models import tiny, write_models
from helpers.wordllama import install_wordllama
from PIL import Image

from autoregressive.inference.sampling_config import ComputeConfig, SamplingConfig
from autoregressive.inpaint import InpaintConfig, inpaint
from autoregressive.sample import SampleConfig
from autoregressive.sampling.conditions import read_prompts
from autoregressive.sampling.config import ConditionConfig
from autoregressive.sampling.run import sample
from core.config import InputError
from core.data.config import ImageTextConfig
from core.data.shards import ShardReader, read_index
from core.distributed.world import choose_device
from language.encode import EncodeConfig, encode
from language.features import FeatureDataset
from language.text_encoder import load_text_encoder

COMPUTE = ComputeConfig(precision="fp32", device="cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_t5) -> dict[str, str]:
    """A small text model, trained (as it says) with the features of tiny_t5, and a tokenizer."""
    encoder = load_text_encoder(tiny_t5, choose_device("cpu"), torch.float32)
    text = {"condition": "text", "text_dim": encoder.dim, "max_text_tokens": 16}
    gpt = tiny(vocab_size=50, text_encoder=encoder.identity, **text)
    gpt, vq = write_models(tmp_path_factory.mktemp("models"), gpt)
    return {"gpt": str(gpt), "tokenizer": str(vq)}


def prompts(t5: Path, **changes: object) -> ConditionConfig:
    return ConditionConfig(text_encoder=str(t5), text_encoder_precision="fp32", **changes)


def settings(models, out: Path, conditions: ConditionConfig, **changes: object) -> SampleConfig:
    return SampleConfig(**models, out=out, conditions=conditions, compute=COMPUTE, **changes)


def test_prompts_become_images_in_the_layouts_that_scorers_read(models, tiny_t5, tmp_path, world):
    records = [{"tag": "one", "prompt": "a red cat"}, {"tag": "two", "prompt": "a blue dog"}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    conditions = prompts(tiny_t5, prompts=path, images_per_prompt=4)
    for layout in ("flat", "geneval", "dpg"):
        run = {"png": True, "batch_size": 3, "shard_size": 4, "layout": layout}
        sample(settings(models, tmp_path / layout, conditions, **run), world)
    index = read_index(tmp_path / "flat")
    assert index["prompts"] == ["a red cat", "a blue dog"]
    assert index["count"] == 8
    assert (index["sampling"]["cfg_scale"], index["sampling"]["top_k"]) == (7.5, 1000)
    assert (index["negative_prompt"], index["t5"]) == ("", str(tiny_t5))
    assert len(list((tmp_path / "flat" / "png").glob("*.png"))) == 8
    second = tmp_path / "geneval" / "png" / "00001"
    assert json.loads((second / "metadata.jsonl").read_text()) == records[1]
    assert sorted(p.name for p in (second / "samples").iterdir())[-1] == "0003.png"
    images = [tmp_path / "flat" / "png" / "000005.png", second / "samples" / "0001.png"]
    assert np.array_equal(*(np.asarray(Image.open(path)) for path in images))
    assert Image.open(tmp_path / "dpg" / "png" / "00001.png").size[0] > 16
    with np.load(tmp_path / "flat" / "samples.npz", allow_pickle=False) as file:
        assert file.files == ["arr_0"]


def test_a_negative_prompt_changes_the_image(models, tiny_t5, tmp_path, world):
    plain = settings(
        models,
        tmp_path / "plain",
        prompts(tiny_t5, prompt="a red cat"),
        sampling=SamplingConfig(top_k=0),
    )
    sample(plain, world)
    away = prompts(tiny_t5, prompt="a red cat", negative_prompt="a dog in the sun")
    sample(dataclasses.replace(plain, out=tmp_path / "away", conditions=away), world)
    one, two = (ShardReader(tmp_path / name, "codes")[np.array([0])] for name in ("plain", "away"))
    assert not np.array_equal(one, two)


def test_a_text_model_needs_prompts_and_no_classes(models, tiny_t5, tmp_path, world):
    with pytest.raises(InputError, match=r"give conditions.prompts or conditions.prompt"):
        sample(settings(models, tmp_path / "out", prompts(tiny_t5)), world)
    with pytest.raises(InputError, match="classes need a class model"):
        sample(settings(models, tmp_path / "out", prompts(tiny_t5, classes=(1,))), world)
    assert not (tmp_path / "out").exists()


def test_another_text_encoder_is_refused(models, tiny_t5, tmp_path, world):
    from transformers import T5EncoderModel

    model = T5EncoderModel.from_pretrained(str(tiny_t5))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    for path in tiny_t5.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="trained with another text encoder"):
        sample(settings(models, tmp_path / "out", prompts(tmp_path, prompt="a cat")), world)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("p.txt", "one\n\n two \n", ["one", "two"]),
        ("p.tsv", "Prompt\tCategory\none\tx\n", ["one"]),
        ("p.csv", 'caption\n"one, two"\n', ["one, two"]),
        ("p.jsonl", '{"prompt": "one"}\n', ["one"]),
    ],
)
def test_prompt_files_of_every_kind_are_read(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text)
    found = read_prompts(ConditionConfig(prompts=tmp_path / name))
    assert [prompt.text for prompt in found] == expected
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "17.txt").write_text("of a folder")
    assert read_prompts(ConditionConfig(prompts=tmp_path / "folder"))[0].name == "17"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "\n", "contains no prompt"),
        ("p.jsonl", "no", "JSON"),
        ("p.tsv", "a\nb\n", "no text"),
    ],
)
def test_bad_prompt_files_are_one_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read_prompts(ConditionConfig(prompts=tmp_path / name))


def test_inpainting_keeps_the_codes_outside_the_region(models, tiny_t5, tmp_path, world):
    (tmp_path / "images").mkdir()
    for i in range(4):
        noise = np.random.default_rng(i).integers(0, 256, (12, 10, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "images" / f"{i}.png")
    conditions = prompts(tiny_t5, prompt="a red cat", images_per_prompt=4)
    run = {**models, "images": tmp_path / "images", "conditions": conditions, "compute": COMPUTE}
    rows = InpaintConfig(**run, keep_rows=2, out=tmp_path / "rows")
    inpaint(rows, world)
    region = dataclasses.replace(
        rows, keep_rows=None, region=(2, 0, 4, 4), num_images=3, out=tmp_path / "region"
    )
    inpaint(region, world)
    images = [
        [np.asarray(Image.open(path)) for path in sorted((out / "png").glob("*.png"))]
        for out in (rows.out, region.out)
    ]
    assert [len(found) for found in images] == [4, 3]
    # The same grid positions were sampled, with the same seeds.
    assert all(np.array_equal(*pair) for pair in zip(images[0][:3], images[1], strict=True))
    index = json.loads((rows.out / "index.json").read_text())
    assert (index["count"], index["skipped"]) == (4, [])
    assert (rows.out / "completions.png").is_file()


def test_impossible_inpainting_is_refused_in_one_line(models, tiny_t5, tmp_path, world):
    image = tmp_path / "images" / "0.png"
    image.parent.mkdir()
    Image.new("RGB", (8, 8)).save(image)
    conditions = prompts(tiny_t5, prompt="a red cat")
    run = {**models, "images": image.parent, "conditions": conditions, "compute": COMPUTE}
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"region: .* grid of 4 x 4"):
        inpaint(InpaintConfig(**run, region=(0, 0, 9, 9), out=out), world)
    Image.new("RGB", (8, 8)).save(image.with_name("1.png"))
    with pytest.raises(InputError, match="1 prompts for 2 images"):
        inpaint(InpaintConfig(**run, keep_rows=1, out=out), world)
    assert not out.exists()
    with pytest.raises(ValueError, match="either keep_rows or region"):
        InpaintConfig(**run, out=out)
    with pytest.raises(ValueError, match="either keep_rows or region"):
        InpaintConfig(**run, out=out, keep_rows=1, region=(0, 0, 1, 1))


def test_a_model_names_wordllama_in_its_config_and_follows_typed_prompts(
    tmp_path, monkeypatch, world
):
    install_wordllama(tmp_path, monkeypatch)
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    Image.new("RGB", (20, 20)).save(pairs / "a.png")
    (pairs / "a.txt").write_text("a red cat")
    text = EncodeConfig(tmp_path / "text", "wordllama", pairs=ImageTextConfig(pairs), max_tokens=4)
    encode(text, world)
    features = FeatureDataset(tmp_path / "text")
    identity = features.index["t5_identity"]
    assert identity.startswith("wordllama-")
    assert features.batch(np.array([0]), np.array([0]))[1].tolist() == [4]
    gpt = tiny(
        vocab_size=50, text_encoder=identity, condition="text", text_dim=2, max_text_tokens=4
    )
    gpt, vq = write_models(tmp_path, gpt)
    models = {"gpt": str(gpt), "tokenizer": str(vq)}
    codes = {}
    for prompt in ("red cat", "dog"):
        out = tmp_path / prompt
        typed = ConditionConfig(prompt=prompt, text_encoder="wordllama")
        sample(settings(models, out, typed), world)
        codes[prompt] = ShardReader(out, "codes")[np.array([0])]
        assert read_index(out)["t5"] == "wordllama"
    assert not np.array_equal(codes["red cat"], codes["dog"])
