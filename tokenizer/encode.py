"""Turn images into code shards, once, for training the decoder; run it again and it continues.

python -m tokenizer.encode --tokenizer runs/vq16 --data imagenet/train --out codes/imagenet256 \
    --crop ten --crop_ranges [1.1,1.05]
torchrun --nproc-per-node 8 -m tokenizer.encode ...
"""

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms.functional import ten_crop
from tqdm import tqdm

from core.config import InputError, parse_config, run_command, save_config
from core.data.image_list import find_images
from core.data.image_text import ImageTextConfig, ImageTextPairs
from core.data.images import center_crop, pixels_to_images
from core.data.loader import OrderedImages, ordered_batches
from core.data.shards import ShardWriter
from core.data.skip_log import Skipped
from core.distributed.world import DeviceName, Precision, World, distributed, dtype_of
from core.weights import Weights
from tokenizer.models.pretrained import load_tokenizer
from tokenizer.models.vq_model import VQModel


@dataclass(frozen=True)
class EncodeConfig:
    """Which images, which crops of them, and where the codes go.

    Args:
        tokenizer: A run or checkpoint folder, a released file, or a Hub id.
        data: Images: a folder of class folders, a flat folder, or a list file.
        pairs: Instead of `data`: pictures with captions, as language.encode reads them.
        out: The folder to write codes_*.npy, labels_*.npy and index.json to.
        image_size: Height and width of a crop, divisible by the tokenizer's downsampling.
        crop: center, one crop; or ten, the corners and the centre and all five flipped.
        crop_ranges: For crop ten: images are first covered to image_size times each range; their
            crops follow one another (the published recipe: [1.1, 1.05]).
        flip: For crop center: add the flipped crop.
        weights: Which weights to take; auto prefers averaged ones.
        batch_size: Crops encoded at a time on each process.
        shard_size: Images a shard: what a killed run loses at most, on each process.
        num_workers: Loader processes per rank.
        precision: bf16 or fp32 for the network; the code search is always in float32.
        device: auto, cpu, cuda or mps.
    """

    tokenizer: str
    out: Path
    data: Path | None = None
    pairs: ImageTextConfig = field(default_factory=ImageTextConfig)
    image_size: tuple[int, int] = (256, 256)
    crop: Literal["center", "ten"] = "center"
    crop_ranges: tuple[float, ...] = (1.1,)
    flip: bool = False
    weights: Weights = "auto"
    batch_size: int = 128
    shard_size: int = 1000
    num_workers: int = 8
    precision: Precision = "fp32"
    device: DeviceName = "auto"

    def __post_init__(self) -> None:
        if (self.data is None) == (self.pairs.source is None):
            raise ValueError("give data or pairs.source, one of them")
        if min(self.batch_size, self.shard_size) < 1 or self.num_workers < 0:
            raise ValueError("batch_size and shard_size must be >= 1, num_workers >= 0")
        if not self.crop_ranges or min(self.crop_ranges) < 1:
            raise ValueError(f"crop_ranges {self.crop_ranges}: give ranges of 1 or more")
        if self.flip and self.crop == "ten":
            raise ValueError("flip is for crop center; ten crops hold the flips already")


@dataclass(frozen=True)
class Crops:
    """The crops of one picture as pixels (crops, height, width, 3) uint8."""

    height: int
    width: int
    ranges: tuple[float, ...]  # empty for the centre crop alone
    flip: bool

    @property
    def count(self) -> int:
        """Crops per picture."""
        return 10 * len(self.ranges) if self.ranges else 1 + self.flip

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Crop a picture."""
        if not self.ranges:
            crops = [center_crop(image, self.height, self.width)]
            crops += [ImageOps.mirror(crops[0])] if self.flip else []
        else:
            crops = []
            for ratio in self.ranges:
                covered = center_crop(image, int(self.height * ratio), int(self.width * ratio))
                # torchvision's annotations know tensors alone; it crops pictures as well.
                size = [self.height, self.width]
                crops += ten_crop(covered, size)  # pyright: ignore[reportArgumentType]
        return np.stack([np.asarray(crop) for crop in crops])


def encode(config: EncodeConfig, world: World) -> None:
    """Encode all images, this rank's shards on this rank, then write the index."""
    images = find_images(config.data) if config.data else ImageTextPairs(config.pairs)
    vq, sha256 = load_tokenizer(config.tokenizer, config.weights)
    check_sizes(config, vq)
    vq = vq.for_inference(world.device, dtype_of(config.precision))
    ranges = config.crop_ranges if config.crop == "ten" else ()
    crops = Crops(*config.image_size, ranges, config.flip)
    downsample = vq.config.downsample
    settings = {
        "tokenizer": config.tokenizer,
        "tokenizer_sha256": sha256,
        "vocab_size": vq.config.vocab_size,
        "downsample": downsample,
        "image_size": list(config.image_size),
        "grid": [side // downsample for side in config.image_size],
        "crop": config.crop,
        "crops": crops.count,
        "crop_ranges": list(crops.ranges),
        "flips": config.flip or config.crop == "ten",
        "precision": config.precision,
        "data": str(config.data or config.pairs.source),
        "classes": list(images.classes),
        "num_classes": len(images.classes),
        "images": len(images),
    }
    if isinstance(images, ImageTextPairs):
        settings["pairs_fingerprint"] = images.fingerprint
    writer = ShardWriter(config.out, len(images), config.shard_size, settings, world)
    todo = writer.begin()
    if world.is_main:
        save_config(config, config.out / "config.yaml")
    dataset = OrderedImages(images, crops)
    per_batch = max(1, config.batch_size // crops.count)
    total = sum(len(writer.items(shard)) for shard in todo)
    with tqdm(total=total, unit="image", disable=not world.is_main) as bar:
        for shard in todo:
            codes, read, skipped = [], [], []
            items = list(writer.items(shard))
            for batch in ordered_batches(dataset, items, per_batch, config.num_workers):
                skipped += batch.skipped
                if batch.pixels is not None:
                    codes.append(encode_crops(vq, batch.pixels, config.batch_size))
                    read.append(batch.indices)
                bar.update(len(batch.indices) + len(batch.skipped))
            write_shard(writer, shard, crops, images.labels, codes, read, skipped)
    finish(writer, world)


def check_sizes(config: EncodeConfig, vq: VQModel) -> None:
    """Raise InputError where the tokenizer cannot encode crops of this size as uint16."""
    downsample = vq.config.downsample
    if any(side < 1 or side % downsample for side in config.image_size):
        raise InputError(f"image_size {config.image_size} must be divisible by {downsample}")
    if vq.config.vocab_size > 2**16:
        raise InputError(f"a codebook of {vq.config.vocab_size} codes does not fit into uint16")


@torch.no_grad()
def encode_crops(vq: VQModel, pixels: torch.Tensor, batch_size: int) -> np.ndarray:
    """Pixels (n, crops, height, width, 3) uint8 -> codes (n, crops, tokens) uint16."""
    device = vq.quant_conv.weight.device
    codes = [
        vq.encode(pixels_to_images(part.to(device))).flatten(1)
        for part in pixels.flatten(0, 1).split(batch_size)
    ]
    return torch.cat(codes).view(*pixels.shape[:2], -1).cpu().numpy().astype(np.uint16)


def write_shard(
    writer: ShardWriter,
    shard: int,
    crops: Crops,
    labels: np.ndarray,
    codes: list[np.ndarray],
    read: list[np.ndarray],
    skipped: list[Skipped],
) -> None:
    """Write one shard: the pictures that could be read, and the names of the others."""
    empty = np.empty((0, crops.count, math.prod(writer.settings["grid"])), np.uint16)
    indices = np.concatenate(read) if read else np.empty(0, np.int64)
    arrays = {
        "codes": np.concatenate(codes) if codes else empty,
        "labels": labels[indices],
        "images": indices,
    }
    writer.write(shard, arrays, skipped=[list(item) for item in skipped])


def finish(writer: ShardWriter, world: World) -> None:
    """Write index.json and, where pictures were skipped, skipped.txt; say what came out."""
    world.barrier()
    skipped = [Skipped(*item) for marker in writer.markers() for item in marker["skipped"]]
    reasons = dict(Counter(item.reason for item in skipped))
    writer.finish({"skipped": len(skipped), "skipped_by_reason": reasons})
    if not world.is_main:
        return
    print(f"{writer.folder}: {writer.count - len(skipped)} images, index.json")
    if skipped:
        path = writer.folder / "skipped.txt"
        path.write_text("".join(f"{item.path}\t{item.reason}\n" for item in skipped))
        print(f"{path}: {len(skipped)} pictures skipped ({reasons})")


def main() -> None:
    """Entry point."""
    config = parse_config(EncodeConfig)
    with distributed(config.device) as world:
        encode(config, world)


if __name__ == "__main__":
    run_command(main)
