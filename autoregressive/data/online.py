"""Pictures and captions encoded while training: no codes or features on disk."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autoregressive.data.codes import chosen_captions
from autoregressive.data.config import DataConfig
from core.config import InputError
from core.data.image_text import CaptionError, ImageTextPairs
from core.data.images import ImageError, image_to_pixels, pixels_to_images, random_crop
from core.data.skip_log import SkipLog, Skipped
from core.distributed.world import World
from language.captions import all_captions, cleaned
from language.t5 import load_t5
from tokenizer.models.pretrained import load_tokenizer

TRIES = 100  # bad pairs in a row before a data set is given up


class OnlineDataset:
    """The pairs of a source. One that cannot be used gives its place to another, and is named."""

    def __init__(self, config: DataConfig, world: World, out: Path) -> None:
        live = config.live
        if not live.tokenizer:
            raise InputError("data.live.tokenizer: give the tokenizer that encodes the pictures")
        self.config, self.pairs, self.device = config, ImageTextPairs(live.pairs), world.device
        self.vq, self.sha256 = load_tokenizer(live.tokenizer)
        self.vq.for_inference(world.device, torch.float32)
        self.t5 = load_t5(live.t5, world.device, torch.bfloat16, live.max_tokens)
        self.skips = SkipLog(out / f"skipped_rank{world.rank}.txt")
        self.threads = ThreadPoolExecutor(live.num_workers)
        self.index = {"tokenizer": live.tokenizer, "tokenizer_sha256": self.sha256}
        chosen_captions(np.arange(1), 0, live.pairs.variants, config)  # refuses unknown ones

    def __len__(self) -> int:
        return len(self.pairs)

    def model_fields(self) -> dict[str, Any]:
        """What the data decides of the model: fields of GPTConfig."""
        live, downsample = self.config.live, self.vq.config.downsample
        if any(side % downsample for side in live.image_size):
            raise InputError(f"data.live.image_size must be divisible by {downsample}")
        return {
            "condition": "text",
            "text_dim": self.t5.dim,
            "max_text_tokens": live.max_tokens,
            "text_encoder": self.t5.identity,
            "vocab_size": self.vq.config.vocab_size,
            "grid": tuple(side // downsample for side in live.image_size),
            "tokenizer_sha256": self.sha256,
        }

    @torch.no_grad()
    def batch(
        self, rows: np.ndarray, positions: np.ndarray, seed: int
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Pairs (n,) -> codes (n, tokens) int64, (features (n, T, dim), lengths (n,) int64).

        Crop, flip and caption depend on (seed, the position in the training order) alone.
        """
        variants = chosen_captions(positions, seed, self.config.live.pairs.variants, self.config)
        asked = zip(rows.tolist(), positions.tolist(), variants.tolist(), strict=True)
        tasks = [self.threads.submit(self._sample, *one, seed) for one in asked]
        found = [task.result() for task in tasks]
        for _, _, skipped in found:
            self.skips.add(skipped)
        pixels = torch.from_numpy(np.stack([pixels for pixels, _, _ in found]))
        codes = self.vq.encode(pixels_to_images(pixels.to(self.device)))
        return codes.flatten(1), self.t5.batch([caption for _, caption, _ in found])

    def _sample(
        self, row: int, position: int, variant: int, seed: int
    ) -> tuple[np.ndarray, str, list[Skipped]]:
        """Pixels of a random crop, the caption, and what was skipped on the way."""
        random, skipped = np.random.default_rng((seed, position)), []
        live = self.config.live
        while True:
            try:
                captions = all_captions(self.pairs, row, live.clean)
                image = self.pairs.load(row)
                crop = random_crop(image, *live.image_size, random, live.crop_scale)
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

    def conditions(self, ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """What image number ids (n,) of a sample shows: the captions in turn."""
        long = self.config.live.pairs.variants.index(self.config.caption)
        rows = (ids % len(self.pairs)).tolist()
        return self.t5.batch([self._sample(row, row, long, 0)[1] for row in rows])

    def encode(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts as the captions are encoded."""
        return self.t5.batch(cleaned(prompts, self.config.live.clean))
