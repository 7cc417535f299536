"""Encode captions into feature shards for training. Run it again to continue after a stop.

python -m language.encode --t5 google/flan-t5-xl --pairs.source laion-coco --out features/laion
torchrun --nproc-per-node 8 -m language.encode ...
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from core.config import InputError, parse_config, parse_first, run_command, save_config
from core.data.config import Cleaning, ImageTextConfig
from core.distributed.config import DeviceName


@dataclass(frozen=True)
class EncodeConfig:
    """Settings of language.encode.

    Args:
        t5: Text encoder: a folder or a Hub id (FLAN-T5, T5 v1.1, any T5), or wordllama: token
            embeddings that come in a package (requirements-extra.txt).
        reference_features: Instead of encoding, pack the reference's folder of one .npy per
            caption into shards. For image-text pairs in the reference's jsonl folders.
        out: Output folder: features_*.npy, lengths_*.npy, ids_*.npy and index.json.
        pairs: Images with captions, and the variants of each caption.
        max_tokens: Longer captions are cut and counted.
        clean: clean (keeps captions in any script), reference (the published rules), or none.
        shard_size: Pairs per shard; a killed run loses at most one shard per process.
        precision: Precision of the encoder and of the features. Some T5 sizes overflow in fp16.
        device: auto, cpu, cuda or mps.
    """

    out: Path
    t5: str = "google/flan-t5-xl"
    reference_features: Path | None = None
    pairs: ImageTextConfig = field(default_factory=ImageTextConfig)
    max_tokens: int = 120
    clean: Cleaning = "clean"
    shard_size: int = 1000
    precision: Literal["bf16", "fp16"] = "bf16"
    device: DeviceName = "auto"

    def __post_init__(self) -> None:
        if min(self.max_tokens, self.shard_size) < 1:
            raise ValueError("max_tokens and shard_size must be >= 1")
        if self.reference_features and len(self.pairs.variants) > 1:
            raise ValueError("reference_features contain one variant of each caption")


parse_first(EncodeConfig, __name__)

from collections import Counter

import numpy as np
import torch
from tqdm import tqdm

from core.data.image_text import CaptionError, ImageTextPairs
from core.data.shards import ShardWriter
from core.data.skip_log import Skipped, write_skipped
from core.distributed.world import World, distributed
from core.lock import writer_lock
from language.features import DTYPES, ReferenceFeatures
from language.text_encoder import TextEncoder, load_text_encoder

MARKER_FACTS = {"skipped": list[list[str]], "cut": int}  # what a shard's marker records


def encode(config: EncodeConfig, world: World) -> None:
    """Encode all captions, each rank its own shards, then write index.json."""
    pairs = ImageTextPairs(config.pairs)
    encoder = (
        ReferenceFeatures(config.reference_features, config.max_tokens)
        if config.reference_features
        else load_text_encoder(
            config.t5, world.device, DTYPES[config.precision], config.max_tokens, config.clean
        )
    )
    settings = {
        "t5": config.t5,
        "t5_identity": encoder.identity,
        "dim": encoder.dim,
        "max_tokens": config.max_tokens,
        "dtype": config.precision,
        "clean": config.clean,
        "variants": list(config.pairs.variants),
        "pairs": str(config.pairs.source),
        "pairs_fingerprint": pairs.fingerprint,
    }
    writer = ShardWriter(config.out, len(pairs), config.shard_size, settings, world)
    todo = writer.begin()
    if world.is_main:
        save_config(config, config.out / "config.yaml")
    total = sum(len(writer.items(shard)) for shard in todo)
    with tqdm(total=total, unit="pair", disable=not world.is_main) as bar:
        for shard in todo:
            write_shard(config, writer, shard, pairs, encoder)
            bar.update(len(writer.items(shard)))
    finish(writer, world)


def write_shard(
    config: EncodeConfig,
    writer: ShardWriter,
    shard: int,
    pairs: ImageTextPairs,
    encoder: TextEncoder | ReferenceFeatures,
) -> None:
    """Encode and write one shard; its marker names the pairs without a usable caption."""
    ids, captions, found, skipped = [], [], [], []
    encoder.cut = 0
    for i in writer.items(shard):
        try:
            if isinstance(encoder, ReferenceFeatures):
                found.append(encoder.read(pairs.name(i)))
            else:
                captions += encoder.captions(pairs, i)
            ids.append(i)
        except CaptionError as error:
            skipped.append(Skipped(pairs.name(i), str(error)))
    if isinstance(encoder, TextEncoder):
        # To the CPU immediately: the features of a whole shard may not fit on the device.
        found = [part.cpu() for part in encoder.encode_each(captions)]
    lengths = np.array([len(part) for part in found], np.int32)
    features = torch.cat([*found, torch.empty(0, encoder.dim)]).to(DTYPES[config.precision])
    arrays = {
        "ids": np.array(ids, np.int64),
        "lengths": lengths.reshape(len(ids), len(config.pairs.variants)),
    }
    # numpy has no bfloat16, so the bits are stored as int16.
    ragged = {"features": features.view(torch.int16).numpy()}
    named = [list(item) for item in skipped]
    writer.write(shard, arrays, ragged, skipped=named, cut=encoder.cut)


def finish(writer: ShardWriter, world: World) -> None:
    """Write index.json and, if pairs were skipped, skipped.txt; print a summary."""
    world.barrier()
    markers = writer.markers(MARKER_FACTS)
    skipped = [Skipped(*item) for marker in markers for item in marker["skipped"]]
    reasons = dict(Counter(item.reason for item in skipped))
    cut = sum(marker["cut"] for marker in markers)
    if len(skipped) == writer.count:
        raise InputError(
            f"{writer.settings['pairs']}: no pair has a usable caption, so there are no features "
            f"(the first is {skipped[0].path}: {skipped[0].reason})"
        )
    writer.finish({"skipped": len(skipped), "skipped_by_reason": reasons, "cut": cut})
    if not world.is_main:
        return
    print(
        f"{writer.folder}: captions of {writer.count - len(skipped)} pairs, {cut} cut, index.json"
    )
    if skipped:
        print(write_skipped(writer.folder / "skipped.txt", skipped))


def main() -> None:
    """Entry point."""
    config = parse_config(EncodeConfig)
    with distributed(config.device) as world, writer_lock(config.out, world):
        encode(config, world)


if __name__ == "__main__":
    run_command(main)
