"""ImagePipeline: from prompts or classes to PIL images."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers.models import tiny, write_models
from helpers.paths import ROOT

from autoregressive import ImagePipeline, generate
from autoregressive.inference.sampling_config import SamplingConfig
from core.config import InputError


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> ImagePipeline:
    paths = write_models(tmp_path_factory.mktemp("models"), tiny(vocab_size=50))
    return ImagePipeline.from_pretrained(*paths).prepare("fp32", device="cpu")


def test_importing_the_package_loads_neither_tokenizer_nor_text_encoder():
    heavy = "{'tokenizer', 'language', 'evaluations', 'transformers'}"
    code = f"import sys, autoregressive; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"


def test_images_do_not_depend_on_the_batch_and_equal_those_of_generate(pipeline):
    one = pipeline([3, "1"], cfg_scale=3.0, seed=5, num_images_per_prompt=2, progress=False)
    assert [image.size for image in one.images] == [(8, 8)] * 4
    labels = torch.tensor([3, 3, 1, 1])
    expected = generate(pipeline.gpt, labels, cfg_scale=3.0, seed=5)
    assert torch.equal(one.codes, expected)
    small = pipeline([3, 1], cfg_scale=3.0, seed=5, num_images_per_prompt=2, batch_size=3)
    assert torch.equal(small.codes, one.codes)
    pixels = pipeline.decode(expected).numpy()
    found = np.stack([np.asarray(image) for image in one.images])
    assert np.array_equal(found, pixels)


def test_images_are_computed_without_gradients(pipeline):
    codes = pipeline([1], progress=False).codes
    assert codes.is_inference()
    assert pipeline.decode(codes).is_inference()
    assert pipeline.sample(torch.tensor([1]), SamplingConfig()).is_inference()


def test_sampling_settings_travel_whole_and_arguments_replace_theirs(pipeline):
    sampling = SamplingConfig(cfg_scale=3.0, top_k=5, seed=9)
    whole = pipeline(2, sampling=sampling, progress=False).codes
    expected = generate(pipeline.gpt, torch.tensor([2]), cfg_scale=3.0, top_k=5, seed=9)
    assert torch.equal(whole, expected)
    other = pipeline(2, sampling=sampling, seed=1, progress=False).codes
    expected = generate(pipeline.gpt, torch.tensor([2]), cfg_scale=3.0, top_k=5, seed=1)
    assert torch.equal(other, expected)


def test_partial_grids_grow_row_by_row_into_the_image(pipeline):
    labels, sampling = torch.tensor([0, 4]), SamplingConfig()
    grids = list(pipeline.partial_grids(labels, sampling))
    assert [grid.shape for grid in grids] == [(2, rows, 4) for rows in (1, 2, 3, 4)]
    whole = pipeline.sample(labels, sampling)
    assert all(torch.equal(grid, whole[:, : grid.shape[1]]) for grid in grids)
    assert pipeline.decode(grids[1]).shape == (2, 4, 8, 3)
    assert pipeline.decode(whole, resize=16).shape == (2, 16, 16, 3)


def test_a_text_model_loads_its_encoder_on_the_first_prompt(tmp_path, tiny_t5):
    gpt = tiny(vocab_size=50, condition="text", text_dim=32, max_text_tokens=16)
    pipeline = ImagePipeline.from_pretrained(*write_models(tmp_path, gpt))
    pipeline.prepare("fp32", device="cpu", verbose=False)
    run = {"text_encoder": str(tiny_t5), "progress": False, "num_images_per_prompt": 2}
    sampling = SamplingConfig(top_k=0)
    plain = pipeline("a red cat", sampling=sampling, **run)
    assert len(plain.images) == 2
    away = pipeline(["a red cat"], sampling=sampling, negative_prompt="a dog", **run)
    assert not torch.equal(plain.codes, away.codes)


@pytest.mark.parametrize(
    ("given", "message"),
    [("cat", r"number in 0 \.\. 4"), ([], "at least one"), (7, r"0 \.\. 4")],
)
def test_what_is_no_class_is_refused_in_one_line(pipeline, given, message):
    with pytest.raises(InputError, match=message):
        pipeline(given, progress=False)
    with pytest.raises(InputError, match="needs a text model"):
        pipeline(1, negative_prompt="a dog", progress=False)


def test_models_of_different_codebooks_are_refused(tmp_path):
    with pytest.raises(InputError, match="vocabulary of 40"):
        ImagePipeline.from_pretrained(*write_models(tmp_path, tiny(vocab_size=40)))
