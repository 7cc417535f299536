"""T5 text encoders (through transformers): one feature vector per token of a caption."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.nn import functional as F

from core.config import InputError
from core.data.arrays import DAMAGE
from core.hub import HubFile, fetch

TOKENS_PER_BATCH = 1024  # padded tokens that the encoder sees at a time


class T5:
    """A frozen T5 encoder.

    dim: width of the features. identity: a hash that tells this encoder from others, independent
    of the dtype that it is loaded in. cut: how many captions so far were longer than `max_tokens`
    and were shortened.
    """

    def __init__(self, model: Any, tokenizer: Any, max_tokens: int) -> None:  # noqa: ANN401
        self.model, self.tokenizer, self.max_tokens = model, tokenizer, max_tokens
        self.dim, self.cut = int(model.config.d_model), 0
        self.identity = _identity(model)

    @torch.no_grad()
    def encode(self, captions: list[str]) -> list[torch.Tensor]:
        """Captions -> features (valid tokens, dim) of each, including the end-of-sentence token.

        Captions of similar length share a batch, which keeps padding small.
        """
        if not captions:
            return []
        tokens = [self._cut(ids) for ids in self.tokenizer(captions)["input_ids"]]
        order = sorted(range(len(tokens)), key=lambda i: -len(tokens[i]))
        found: list[torch.Tensor] = [torch.empty(0)] * len(tokens)
        start = 0
        while start < len(order):
            size = max(1, TOKENS_PER_BATCH // len(tokens[order[start]]))
            some = order[start : start + size]
            for i, features in zip(some, self._forward([tokens[i] for i in some]), strict=True):
                found[i] = features
            start += size
        return found

    def _cut(self, ids: list[int]) -> list[int]:
        if len(ids) > self.max_tokens:
            self.cut += 1
            ids = [*ids[: self.max_tokens - 1], ids[-1]]  # keep the end-of-sentence token
        return ids

    def _forward(self, tokens: list[list[int]]) -> list[torch.Tensor]:
        device = next(self.model.parameters()).device
        longest = max(map(len, tokens))
        ids = torch.zeros(len(tokens), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, part in enumerate(tokens):
            ids[row, : len(part)] = torch.tensor(part)
            mask[row, : len(part)] = 1
        out = self.model(input_ids=ids.to(device), attention_mask=mask.to(device))
        return [row[: len(part)] for row, part in zip(out.last_hidden_state, tokens, strict=True)]


def pad(features: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (tokens, dim) of n captions -> (n, T, dim) padded with zeros, lengths (n,) int64."""
    lengths = torch.tensor([len(part) for part in features])
    longest = int(lengths.max())
    return torch.stack([F.pad(f, (0, 0, 0, longest - len(f))) for f in features]), lengths


def load_t5(
    source: str | Path, device: torch.device, dtype: torch.dtype, max_tokens: int = 120
) -> T5:
    """Load the encoder half of a T5 and its tokenizer from a folder or the Hub.

    Raises InputError if they cannot be loaded.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoTokenizer, T5EncoderModel
    from transformers.utils import logging

    if Path(source).is_file():
        raise InputError(f"{source}: a file; give the folder of a T5, or its Hub id")
    if not Path(source).is_dir():
        fetch(HubFile(str(source), "config.json"))  # a missing one is noticed here, in one line
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source))
    except Exception as error:  # the tokenizers library raises it itself, for a file that is wrong
        raise _not_a_t5(source, error) from error
    try:
        model = T5EncoderModel.from_pretrained(str(source), dtype=dtype)
    except (*DAMAGE, AttributeError, ImportError, SafetensorError, StrictDataclassError) as error:
        raise _not_a_t5(source, error) from error
    model = model.to(device).eval().requires_grad_(False)  # pyright: ignore[reportArgumentType]
    return T5(model, tokenizer, max_tokens)


def _not_a_t5(source: str | Path, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:200]
    return InputError(f"{source}: not a T5 that can be loaded ({reason})")


def _identity(model: Any) -> str:  # noqa: ANN401 - a transformers model
    """A hash of the norms and the first block in bf16: hashing all weights would read 5 GB."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if parameter.ndim == 1 or ".block.0." in name:
            values = parameter.detach().to("cpu", torch.bfloat16).contiguous()
            digest.update(values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
