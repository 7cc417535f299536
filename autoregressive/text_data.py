"""Codes and captions for training: codes of tokenizer.encode, features of language.encode."""

from typing import Any

import numpy as np
import torch

from autoregressive.conditioning import Text
from autoregressive.data import CAPTION_STREAM, CodeDataset, CodesConfig
from core.config import InputError
from core.distributed import choose_device
from core.randomness import random_uniform
from core.shards import ShardReader
from language.captions import clean_caption
from language.features import FeatureDataset
from language.t5 import load_t5


class TextDataset:
    """The pictures that have both codes and features, joined by their place among the pairs."""

    def __init__(self, config: CodesConfig) -> None:
        assert config.features is not None
        self.codes = CodeDataset(config)
        self.features = FeatureDataset(config.features)
        self.index = self.codes.index
        ours, theirs = (
            index.get("pairs_fingerprint") for index in (self.index, self.features.index)
        )
        if ours != theirs:
            raise InputError(
                f"{config.features}: captions of other pictures than {config.codes[0]} has; encode "
                "both from the same pairs"
            )
        ids = ShardReader(config.codes[0], "images")
        pairs = ids[np.arange(len(ids))]
        self.rows = np.flatnonzero(np.isin(pairs, self.features.ids))
        self.pairs = pairs[self.rows]
        if not len(self.rows):
            raise InputError(f"{config.features}: no picture of {config.codes[0]} has a caption")
        self.long = self._variant(config, config.caption)
        self.short = self._variant(config, config.short_caption or config.caption)
        self.short_rate = config.short_caption_rate if config.short_caption else 0.0

    def _variant(self, config: CodesConfig, name: str) -> int:
        variants = list(self.features.variants)
        if name not in variants:
            raise InputError(
                f"data.caption: {config.features} has no variant {name!r}, only {variants}"
            )
        return variants.index(name)

    def __len__(self) -> int:
        return len(self.rows)

    def model_fields(self) -> dict[str, Any]:
        """What the data decides of the model: fields of GPTConfig."""
        return {
            "condition": "text",
            "text_dim": self.features.dim,
            "max_text_tokens": self.features.max_tokens,
            "text_encoder": self.features.index.get("t5_identity", ""),
            **self.codes.code_fields(),
        }

    def batch(
        self, rows: np.ndarray, positions: np.ndarray, seed: int
    ) -> tuple[torch.Tensor, Text]:
        """Rows (n,) -> codes (n, tokens) int64, (features (n, T, dim), lengths (n,) int64).

        Which caption a sample shows depends on (seed, its position in the training order) alone.
        """
        codes = self.codes.code_batch(self.rows[rows], positions, seed)
        stream = torch.tensor([CAPTION_STREAM])
        uniform = random_uniform(seed, stream, torch.from_numpy(positions)).numpy()
        variants = np.where(uniform < self.short_rate, self.short, self.long)
        return codes, self.features.batch(self.pairs[rows], variants)

    def conditions(self, ids: np.ndarray) -> Text:
        """What image number ids (n,) of a sample shows: the captions in turn."""
        pairs = self.pairs[ids % len(self.pairs)]
        return self.features.batch(pairs, np.full(len(pairs), self.long))

    def encode(self, prompts: list[str]) -> Text:
        """Prompts as the text encoder of the features sees them."""
        device, index = choose_device("cpu"), self.features.index
        t5 = load_t5(index["t5"], device, torch.float32, self.features.max_tokens)
        if index["clean"] != "none":
            prompts = [clean_caption(text, index["clean"] == "reference") for text in prompts]
        return t5.batch(prompts)


Dataset = CodeDataset | TextDataset


def open_data(config: CodesConfig) -> Dataset:
    """Codes with classes, or with captions where the configuration names features."""
    return TextDataset(config) if config.features else CodeDataset(config)
