"""Codes and captions for training: codes of tokenizer.encode, features of language.encode."""

from typing import Any

import numpy as np
import torch

from autoregressive.data.codes import CodeDataset, chosen_captions
from autoregressive.data.config import DataConfig
from core.config import InputError
from core.data.shards import ShardReader
from core.distributed.world import choose_device
from language.captions import cleaned
from language.features import FeatureDataset
from language.t5 import load_t5


class TextDataset:
    """The pictures that have both codes and features, joined by their place among the pairs."""

    def __init__(self, config: DataConfig) -> None:
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
        self.config = config
        chosen_captions(np.arange(1), 0, self.features.variants, config)  # refuses unknown ones

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
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Rows (n,) -> codes (n, tokens) int64, (features (n, T, dim), lengths (n,) int64).

        Which caption a sample shows depends on (seed, its position in the training order) alone.
        """
        codes = self.codes.code_batch(self.rows[rows], positions, seed)
        variants = chosen_captions(positions, seed, self.features.variants, self.config)
        return codes, self.features.batch(self.pairs[rows], variants)

    def conditions(self, ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """What image number ids (n,) of a sample shows: the captions in turn."""
        pairs = self.pairs[ids % len(self.pairs)]
        long = self.features.variants.index(self.config.caption)
        return self.features.batch(pairs, np.full(len(pairs), long))

    def encode(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts as the text encoder of the features sees them."""
        device, index = choose_device("cpu"), self.features.index
        t5 = load_t5(index["t5"], device, torch.float32, self.features.max_tokens)
        return t5.batch(cleaned(prompts, index["clean"]))
