"""Token embeddings of wordllama: real text features in 19 MB, without a T5 and without a download.

They are the input embeddings of a Llama 2, reduced to 256 dimensions and trained on for sentence
similarity (github.com/dleemiller/WordLlama, MIT). A token's features do not depend on the other
tokens, so the transformer itself must learn how words combine.
"""

import importlib.util
from pathlib import Path
from typing import Any

import torch

from core.config import InputError
from core.files import file_sha256
from core.weights import load_tensors

NAME = "wordllama"  # where a T5's folder or Hub id is expected, this name selects these embeddings
WEIGHTS, KEY = Path("weights") / "l2_supercat_256.safetensors", "embedding.weight"
TOKENIZER = Path("tokenizers") / "l2_supercat_tokenizer_config.json"


class WordLlama:
    """A table of token embeddings. The attributes are those of language.t5.T5.

    model: the table. identity: names the embeddings and the start of their file's sha256.
    """

    def __init__(
        self,
        model: torch.nn.Embedding,
        tokenizer: Any,  # noqa: ANN401 - of the package tokenizers
        max_tokens: int,
        identity: str,
    ) -> None:
        self.model, self.tokenizer, self.max_tokens = model, tokenizer, max_tokens
        self.dim, self.cut, self.identity = model.embedding_dim, 0, identity

    @torch.no_grad()
    def encode(self, captions: list[str]) -> list[torch.Tensor]:
        """Captions -> features (valid tokens, dim) of each, of about unit variance.

        The first token is the start-of-sentence token, which is all of an empty caption.
        """
        device = self.model.weight.device
        found = []
        for encoding in self.tokenizer.encode_batch(captions):
            self.cut += len(encoding.ids) > self.max_tokens
            ids = torch.tensor(encoding.ids[: self.max_tokens], device=device)
            found.append(self.model(ids))
        return found


def load_wordllama(device: torch.device, dtype: torch.dtype, max_tokens: int = 120) -> WordLlama:
    """Load the embeddings of the installed package; raises InputError if it is missing.

    The files are read directly: importing the package would configure the root logger.
    """
    from tokenizers import Tokenizer

    spec = importlib.util.find_spec("wordllama")
    if spec is None or spec.origin is None:
        raise InputError(
            f"{NAME}: needs the package of this name: pip install -r requirements-extra.txt"
        )
    folder = Path(spec.origin).parent
    if missing := [name for name in (WEIGHTS, TOKENIZER) if not (folder / name).is_file()]:
        raise InputError(f"{folder}: contains no {missing[0]}; install wordllama 0.4.0.post1")
    table = load_tensors(folder / WEIGHTS)[KEY].to(device, dtype)
    model = torch.nn.Embedding.from_pretrained(table, freeze=True)
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    identity = f"{NAME}-{file_sha256(folder / WEIGHTS)[:16]}"
    return WordLlama(model, tokenizer, max_tokens, identity)
