"""A made package wordllama of five words, with the files that language.wordllama reads."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from language.wordllama import KEY, TOKENIZER, WEIGHTS

WORDS = {"<s>": 0, "<unk>": 1, "red": 2, "cat": 3, "dog": 4}
TABLE = torch.arange(10.0).reshape(5, 2)  # the embedding of each word


def install_wordllama(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write the package into `folder`, which goes to the front of sys.path -> the package."""
    package = folder / "wordllama"
    for path in (WEIGHTS, TOKENIZER):
        (package / path).parent.mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    save_file({KEY: TABLE.half()}, str(package / WEIGHTS))
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(package / TOKENIZER))
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "wordllama", raising=False)
    return package
