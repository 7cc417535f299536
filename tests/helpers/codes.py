"""Small folders of codes and text features, as the encode commands write them."""

from pathlib import Path

import numpy as np
import torch

from core.data.shards import ShardWriter, codes_dtype
from core.distributed.world import World, choose_device
from tokenizer.models.pretrained import load_tokenizer


def write_codes(
    folder: Path,
    count: int = 40,
    crops: int = 2,
    grid: tuple[int, int] = (4, 4),
    vocab_size: int = 32,
    num_classes: int = 4,
    seed: int = 0,
    **index: object,
) -> Path:
    """A folder as tokenizer.encode writes it; its codes depend on the class: they can be learnt."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % num_classes
    tokens = grid[0] * grid[1]
    base = random.integers(0, vocab_size, (num_classes, 1, tokens))
    noise = random.integers(0, 3, (count, crops, tokens))
    codes = ((base[labels] + noise) % vocab_size).astype(codes_dtype(vocab_size))
    writer = ShardWriter(folder, count, 16, {}, World(0, 1, choose_device("cpu")))
    for shard in writer.begin():
        items = list(writer.items(shard))
        ids = np.array(items)
        writer.write(shard, {"codes": codes[items], "labels": labels[items], "images": ids})
    classes = [str(i) for i in range(num_classes)]
    writer.finish(
        {
            "tokenizer": "",
            "tokenizer_sha256": "0" * 64,
            "vocab_size": vocab_size,
            "grid": list(grid),
            "classes": classes,
            **index,
        }
    )
    return folder


def write_codes_of(tokenizer: Path, folder: Path, count: int = 40) -> Path:
    """A folder of one crop per image that names this tokenizer, a folder of helpers.models."""
    loaded = load_tokenizer(tokenizer)
    facts = {"tokenizer": str(tokenizer), "tokenizer_sha256": loaded.identity()}
    return write_codes(folder, count, crops=1, vocab_size=loaded.vq.config.vocab_size, **facts)


def write_features(folder: Path, count: int = 40, dim: int = 12, **index: object) -> Path:
    """A folder as language.encode writes it, for the images of write_codes."""
    random = np.random.default_rng(0)
    writer = ShardWriter(folder, count, 16, {}, World(0, 1, choose_device("cpu")))
    for shard in writer.begin():
        ids = np.array(writer.items(shard))
        lengths = random.integers(1, 9, (len(ids), 1)).astype(np.int32)
        bits = torch.randn(int(lengths.sum()), dim).bfloat16().view(torch.int16).numpy()
        writer.write(shard, {"ids": ids, "lengths": lengths}, ragged={"features": bits})
    facts = {"dim": dim, "max_tokens": 9, "dtype": "bf16", "variants": ["long"], "clean": "none"}
    writer.finish({**facts, "t5": "", "t5_identity": "", **index})
    return folder
