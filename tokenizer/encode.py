r"""Encode images as codes in shards, to train the transformer on. Run it again to continue.

python -m tokenizer.encode --tokenizer runs/vq16 --data imagenet/train --out codes/imagenet256 \
    --crop ten --crop_ranges 1.1 1.05
torchrun --nproc-per-node 8 -m tokenizer.encode ...
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from core.config import InputError, parse_config, parse_first, run_command, save_config
from core.data.config import ImageTextConfig, check_image_size, check_num_workers
from core.distributed.config import DeviceName, Precision
from core.hub import Weights


@dataclass(frozen=True)
class EncodeConfig:
    """Which images and crops to encode, and the folder of the codes.

    Args:
        tokenizer: A run or checkpoint folder, a released file, or a Hub id.
        data: Images: a folder of class folders, a flat folder, a list file, tars, or a folder of
            jsonl files.
        pairs: Filters for tars and jsonl folders. pairs.source replaces `data` for a folder of
            images with captions, as in language.encode.
        out: The folder for codes_*.npy, labels_*.npy and index.json.
        image_size: Height and width of a crop, divisible by the tokenizer's downsampling; null for
            the size that the tokenizer was trained at.
        crop: center (one crop), or ten (corners and centre, and the five flipped).
        crop_ranges: For crop ten: the image is resized to cover image_size times each range, and
            ten crops are taken at each (the published recipe: [1.1, 1.05]).
        flip: For crop center: add the flipped crop.
        weights: The weights to load; auto takes the EMA weights if there are any.
        verify_weights: Compare the files of our checkpoints with their checksums.
        batch_size: Crops per forward pass on each process.
        shard_size: Images per shard. A killed run loses at most one shard per process.
        num_workers: Loader processes per rank.
        precision: bf16 or fp32 for the network; the codebook search is always in float32.
        device: auto, cpu, cuda or mps.
    """

    tokenizer: str
    out: Path
    data: Path | None = None
    pairs: ImageTextConfig = field(default_factory=ImageTextConfig)
    image_size: tuple[int, int] | None = None
    crop: Literal["center", "ten"] = "center"
    crop_ranges: tuple[float, ...] = (1.1,)
    flip: bool = False
    weights: Weights = "auto"
    verify_weights: bool = True
    batch_size: int = 128
    shard_size: int = 1000
    num_workers: int = 8
    precision: Precision = "fp32"
    device: DeviceName = "auto"

    def __post_init__(self) -> None:
        if (self.data is None) == (self.pairs.source is None):
            raise ValueError("give either data or pairs.source")
        if self.image_size:
            check_image_size(*self.image_size)
        check_num_workers(self.num_workers)
        if min(self.batch_size, self.shard_size) < 1:
            raise ValueError("batch_size and shard_size must be >= 1")
        if not self.crop_ranges or not 1 <= min(self.crop_ranges) <= max(self.crop_ranges) <= 16:
            raise ValueError(f"crop_ranges {self.crop_ranges}: give ranges in 1 .. 16")
        if self.flip and self.crop == "ten":
            raise ValueError("flip is for crop center; crop ten includes the flips")


parse_first(EncodeConfig, __name__)

import dataclasses
import math
import os
from collections import Counter

import numpy as np
from tqdm import tqdm

from core.data.image_text import ImageTextPairs
from core.data.loader import OrderedImages, ordered_batches
from core.data.open import open_images
from core.data.shards import ShardWriter, codes_dtype
from core.data.skip_log import Skipped, write_skipped
from core.distributed.world import World, distributed, dtype_of
from core.files import fingerprint_of_files
from core.lock import writer_lock
from tokenizer.crops import Crops, encode_crops
from tokenizer.models.config import choose_image_size
from tokenizer.models.pretrained import LoadedTokenizer, load_tokenizer

SKIPPED = {"skipped": list[list[str]]}  # the fact that a shard's marker records
# Copying a data set changes the times of its files, so that they alone refuse no folder.
OTHER_TIMES = (
    "the times of the images' files have changed since these codes were begun. Names, sizes and a "
    "sample of their content are the same; if you have replaced images, encode into another folder"
)


def encode(config: EncodeConfig, world: World) -> None:
    """Encode all images, each rank its own shards, then write the index."""
    images = open_images(config.data, config.pairs)
    loaded = load_tokenizer(config.tokenizer, config.weights, verify_weights=config.verify_weights)
    vq, identity = loaded.vq, loaded.identity()
    size, remark = choose_image_size(vq.config, config.image_size)
    config = dataclasses.replace(config, image_size=size)
    if remark and world.is_main:
        print(f"{config.tokenizer}: {remark}")
    vq = vq.for_inference(world.device, dtype_of(config.precision))
    ranges = config.crop_ranges if config.crop == "ten" else ()
    crops = Crops(*size, ranges, config.flip)
    downsample = vq.config.downsample
    settings = {
        "tokenizer": config.tokenizer,
        "tokenizer_sha256": identity,
        "vocab_size": vq.quantize.vocab_size,
        "downsample": downsample,
        "image_size": list(size),
        "grid": [side // downsample for side in size],
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
    # Older versions knew the tokenizer by its file, and the images by the time of their files.
    earlier = {"tokenizer_sha256": [loaded.sha256, loaded.source_sha256]}
    if isinstance(images, ImageTextPairs):
        settings["pairs_fingerprint"] = images.fingerprint
    if world.is_main:
        fingerprint = fingerprint_of_files(images.files)
        settings["images_fingerprint"] = fingerprint.content
        settings["images_times"] = fingerprint.times
        earlier["images_fingerprint"] = [None, fingerprint.times]
    remarks = {"images_times": OTHER_TIMES}
    writer = ShardWriter(
        config.out, len(images), config.shard_size, settings, world, earlier, remarks
    )
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
    finish(writer, images.fingerprint, loaded, world)


def write_shard(
    writer: ShardWriter,
    shard: int,
    crops: Crops,
    labels: np.ndarray,
    codes: list[np.ndarray],
    read: list[np.ndarray],
    skipped: list[Skipped],
) -> None:
    """Write one shard: the codes of the images that could be read, the names of the others."""
    dtype = codes_dtype(writer.settings["vocab_size"])
    empty = np.empty((0, crops.count, math.prod(writer.settings["grid"])), dtype)
    indices = np.concatenate(read) if read else np.empty(0, np.int64)
    arrays = {
        "codes": np.concatenate(codes) if codes else empty,
        "labels": labels[indices],
        "images": indices,
    }
    writer.write(shard, arrays, skipped=[list(item) for item in skipped])


def finish(writer: ShardWriter, fingerprint: str, tokenizer: LoadedTokenizer, world: World) -> None:
    """Write index.json and, if images were skipped, skipped.txt; print where they are."""
    world.barrier()
    skipped = [Skipped(*item) for marker in writer.markers(SKIPPED) for item in marker["skipped"]]
    reasons = dict(Counter(item.reason for item in skipped))
    if len(skipped) == writer.count:
        raise InputError(
            f"{writer.settings['data']}: no image can be read, so there are no codes "
            f"(the first is {skipped[0].path}: {skipped[0].reason})"
        )
    facts = {
        "codes_dtype": codes_dtype(writer.settings["vocab_size"]).name,
        "pairs_fingerprint": fingerprint,
        "tokenizer_file_sha256": tokenizer.sha256,
        **tokenizer_path(writer),
        "tokenizer_source_sha256": tokenizer.source_sha256,
        "skipped": len(skipped),
        "skipped_by_reason": reasons,
    }
    writer.finish(facts)
    if not world.is_main:
        return
    classes = writer.settings["num_classes"] or "no"
    print(f"{writer.folder}: {writer.count - len(skipped)} images, {classes} classes, index.json")
    if skipped:
        print(write_skipped(writer.folder / "skipped.txt", skipped))


def tokenizer_path(writer: ShardWriter) -> dict[str, str]:
    """Where the tokenizer is from the folder of the codes, so that both may move together."""
    tokenizer = Path(writer.settings["tokenizer"])
    if not tokenizer.exists():
        return {}  # a name, or an id on the Hub
    return {"tokenizer_path": os.path.relpath(tokenizer.resolve(), writer.folder.resolve())}


def main() -> None:
    """Entry point."""
    config = parse_config(EncodeConfig)
    with distributed(config.device) as world, writer_lock(config.out, world):
        encode(config, world)


if __name__ == "__main__":
    run_command(main)
