"""Fixtures that several test files use. What is not a fixture is in helpers/."""

from pathlib import Path

import pytest
import torch
from helpers.paths import GOLDENS

from core.distributed.world import World, choose_device


@pytest.fixture
def goldens() -> Path:
    """The folder of the published code's recorded outputs (see its README)."""
    return GOLDENS


@pytest.fixture
def world() -> World:
    """A world of one process on the CPU."""
    return World(0, 1, choose_device("cpu"))


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small T5 encoder with random weights and a real tokenizer file, made on the spot."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp("tiny_t5")
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    text = ["a red cat and the blue dog run on a mat in the sun", "abcdefghijklmnopqrstuvwxyz."]
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"d_model": 32, "d_kv": 16, "num_heads": 2, "num_layers": 2, "d_ff": 64}
    T5EncoderModel(T5Config(vocab_size=120, **shape)).save_pretrained(folder)
    return folder


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of test_page_browser.py, which makes the README's screenshot of the page."""
    parser.addoption("--page_models", help="folder with gpt/ and tokenizer/ to serve")
    parser.addoption("--page_screenshot", help="file to write a screenshot of the page to")
