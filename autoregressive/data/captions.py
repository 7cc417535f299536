"""Training data with captions: codes of tokenizer.encode, features of language.encode."""

import gc
from typing import Any

import numpy as np
import torch

from autoregressive.data.codes import CodeDataset, chosen_captions
from autoregressive.data.config import DataConfig
from autoregressive.models.conditioning import TextCondition
from core.config import InputError
from core.data.shards import ShardReader
from core.distributed.world import choose_device
from language.features import DTYPES, FeatureDataset
from language.text_encoder import load_text_encoder


class TextDataset:
    """The images that have both codes and features, joined by their number among the pairs."""

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
                f"{config.features}: these captions belong to other images than {config.codes[0]}; "
                "encode both from the same pairs"
            )
        ids = ShardReader(config.codes[0], "images")
        pairs = ids[np.arange(len(ids))]
        self.rows = np.flatnonzero(np.isin(pairs, self.features.ids))
        self.pairs = pairs[self.rows]
        if not len(self.rows):
            raise InputError(f"{config.features}: no image of {config.codes[0]} has a caption")
        self.config = config
        chosen_captions(
            np.arange(1), 0, self.features.variants, config
        )  # raises InputError for unknown ones

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def crops(self) -> int:
        """Crops of an image, over all folders; a sample uses one of them at random."""
        return self.codes.crops

    def model_fields(self) -> dict[str, Any]:
        """The fields of GPTConfig that follow from the data."""
        return {
            "condition": "text",
            "text_dim": self.features.dim,
            "max_text_tokens": self.features.max_tokens,
            "text_encoder": self.features.index.get("t5_identity", ""),
            **self.codes.code_fields(),
        }

    def batch(
        self, rows: np.ndarray, positions: np.ndarray, seed: int
    ) -> tuple[torch.Tensor, TextCondition]:
        """Rows (n,) -> codes (n, tokens) int64, and the features of their captions.

        The choice of a caption depends only on (seed, position in the training order).
        """
        codes = self.codes.code_batch(self.rows[rows], positions, seed)
        variants = chosen_captions(positions, seed, self.features.variants, self.config)
        return codes, TextCondition(*self.features.batch(self.pairs[rows], variants))

    def conditions(self, ids: np.ndarray) -> TextCondition:
        """The captions of sampled images number ids (n,): all captions in turn."""
        pairs = self.pairs[ids % len(self.pairs)]
        long = self.features.variants.index(self.config.caption)
        return TextCondition(*self.features.batch(pairs, np.full(len(pairs), long)))

    def encode(self, prompts: list[str]) -> TextCondition:
        """Encode prompts with the text encoder of the features, in the features' own precision.

        The encoder is loaded for this call only, and freed after it.
        """
        device, index = choose_device("cpu"), self.features.index
        encoder = load_text_encoder(
            index["t5"], device, DTYPES[index["dtype"]], self.features.max_tokens, index["clean"]
        )
        encoded = TextCondition(*encoder.encode(prompts))
        del encoder
        gc.collect()  # transformers' modules may refer to each other
        return encoded
