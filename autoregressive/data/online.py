"""Images and captions encoded during training, without codes or features on disk."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autoregressive.data.codes import chosen_captions
from autoregressive.data.config import DataConfig
from autoregressive.models.conditioning import TextCondition
from core.config import InputError
from core.data.image_text import CaptionError, ImageTextPairs
from core.data.images import ImageError, image_to_pixels, pixels_to_images, random_crop
from core.data.skip_log import SkipLog, Skipped
from core.distributed.world import World
from language.text_encoder import load_text_encoder
from tokenizer.models.pretrained import load_tokenizer

TRIES = 100  # unusable pairs in a row before training stops with an error


class OnlineDataset:
    """The pairs of a source. An unusable pair is reported and replaced by a random other one."""

    def __init__(self, config: DataConfig, world: World, out: Path) -> None:
        online = config.online
        if not online.tokenizer:
            raise InputError("data.online.tokenizer: give the tokenizer that encodes the images")
        self.config, self.pairs, self.device = config, ImageTextPairs(online.pairs), world.device
        loaded = load_tokenizer(online.tokenizer)
        self.vq, self.sha256 = loaded.vq, loaded.identity()
        self.vq.for_inference(world.device, torch.float32)
        self.encoder = load_text_encoder(
            online.t5, world.device, torch.bfloat16, online.max_tokens, online.clean
        )
        self.skips = SkipLog(out / f"skipped_rank{world.rank}.txt")
        self.threads = ThreadPoolExecutor(online.num_workers)
        self.index = {
            "tokenizer": online.tokenizer,
            "tokenizer_sha256": self.sha256,
            "tokenizer_file_sha256": loaded.sha256,
            "tokenizer_source_sha256": loaded.source_sha256,
        }
        chosen_captions(
            np.arange(1), 0, online.pairs.variants, config
        )  # raises InputError for unknown ones

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def crops(self) -> None:
        """Every sample is another random crop."""
        return None

    def model_fields(self) -> dict[str, Any]:
        """The fields of GPTConfig that follow from the data."""
        online, downsample = self.config.online, self.vq.config.downsample
        if any(side % downsample for side in online.image_size):
            raise InputError(f"data.online.image_size must be divisible by {downsample}")
        return {
            "condition": "text",
            "text_dim": self.encoder.dim,
            "max_text_tokens": online.max_tokens,
            "text_encoder": self.encoder.identity,
            "vocab_size": self.vq.config.vocab_size,
            "grid": tuple(side // downsample for side in online.image_size),
            "tokenizer_sha256": self.sha256,
        }

    @torch.no_grad()
    def batch(
        self, rows: np.ndarray, positions: np.ndarray, seed: int
    ) -> tuple[torch.Tensor, TextCondition]:
        """Pairs (n,) -> codes (n, tokens) int64, and the features of their captions.

        Crop, flip and caption depend only on (seed, position in the training order).
        """
        variants = chosen_captions(positions, seed, self.config.online.pairs.variants, self.config)
        asked = zip(rows.tolist(), positions.tolist(), variants.tolist(), strict=True)
        tasks = [self.threads.submit(self._sample, *one, seed) for one in asked]
        found = [task.result() for task in tasks]
        for _, _, skipped in found:
            self.skips.add(skipped)
        pixels = torch.from_numpy(np.stack([pixels for pixels, _, _ in found]))
        codes = self.vq.encode(pixels_to_images(pixels.to(self.device)))
        captions = self.encoder.encode_cleaned([caption for _, caption, _ in found])
        return codes.flatten(1), TextCondition(*captions)

    def _sample(
        self, row: int, position: int, variant: int, seed: int
    ) -> tuple[np.ndarray, str, list[Skipped]]:
        """Pixels of a random crop, the caption, and the pairs that were skipped."""
        random, skipped = np.random.default_rng((seed, position)), []
        online = self.config.online
        while True:
            try:
                captions = self.encoder.captions(self.pairs, row)
                image = self.pairs.load(row)
                crop = random_crop(image, *online.image_size, random, online.crop_scale)
                return image_to_pixels(crop), captions[variant], skipped
            except (CaptionError, ImageError) as error:
                reason = error.reason if isinstance(error, ImageError) else str(error)
                skipped.append(Skipped(self.pairs.name(row), reason))
            if len(skipped) == TRIES:
                raise InputError(
                    f"{TRIES} pairs in a row cannot be used, the last is {skipped[-1].path}: "
                    f"{skipped[-1].reason}"
                )
            row = int(random.integers(len(self.pairs)))

    def conditions(self, ids: np.ndarray) -> TextCondition:
        """The captions of sampled images number ids (n,): all captions in turn."""
        long = self.config.online.pairs.variants.index(self.config.caption)
        rows = (ids % len(self.pairs)).tolist()
        captions = [self._sample(row, row, long, 0)[1] for row in rows]
        return TextCondition(*self.encoder.encode_cleaned(captions))

    def encode(self, prompts: list[str]) -> TextCondition:
        """Encode prompts with the text encoder of the captions."""
        return TextCondition(*self.encoder.encode(prompts))
