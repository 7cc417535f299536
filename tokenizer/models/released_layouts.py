"""The layouts of released tokenizer files, turned into this project's keys.

| layout | how it is recognised | what differs |
|---|---|---|
| LlamaGen | keys of ours, under model, ema, module, state_dict or bare | may lack `codebook_used` |
| Hub mixin | a folder with config.json and model.safetensors | the same |
| GEAR, Warmup | the parts vq and vq_ema | nothing, or SEED's names |
| SEED-Voken (IBQ) | `encoder.down.*`, in a Lightning file | names, EMA copies, losses |
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from core.hub import Weights
from core.lightning import EMA_PREFIX, live_weights
from core.weights import PART_KEYS, read_file

TOKENIZER_PARTS = {
    "model": (*PART_KEYS["model"], "vq"),
    "ema": (*PART_KEYS["ema"], "vq_ema"),
    "discriminator": PART_KEYS["discriminator"],
}
LOSSES = ("loss.",)  # discriminator and LPIPS in a Lightning file
CODEBOOK_USED = "quantize.codebook_used"  # a counter of LlamaGen's trainer; some files lack it
COUNTER_SIZE = 65536

# SEED-Voken's names (taming's) -> ours (LlamaGen's). {level} of the decoder counts the other way.
SEED_NAMES = (
    (r"(encoder|decoder)\.mid\.block_1\.", r"\1.mid.0."),
    (r"(encoder|decoder)\.mid\.attn_1\.", r"\1.mid.1."),
    (r"(encoder|decoder)\.mid\.block_2\.", r"\1.mid.2."),
    (r"encoder\.down\.(\d+)\.block\.", r"encoder.conv_blocks.\1.res."),
    (r"encoder\.down\.(\d+)\.", r"encoder.conv_blocks.\1."),
    (r"decoder\.up\.(\d+)\.block\.", r"decoder.up.\1.res."),
)
SEED_LEVEL = re.compile(r"decoder\.up\.(\d+)\.")


class TokenizerWeights(NamedTuple):
    """Weights under our keys, and the fields of VQConfig that the layout tells."""

    tensors: dict[str, torch.Tensor]
    fields: dict[str, Any]


def read_tokenizer(path: Path, weights: Weights) -> TokenizerWeights:
    """Read a released file. "auto" takes EMA weights if there are any.

    Raises InputError if the part is not in the file or an EMA weight is missing.
    """
    stored = read_file(path, TOKENIZER_PARTS)
    if any(key.startswith((EMA_PREFIX, *LOSSES)) for key in stored.parts.get("model", ())):
        tensors = live_weights(stored.weights("model", path), weights, path, LOSSES)
    else:
        averaged = weights == "ema" or (weights == "auto" and "ema" in stored.parts)
        tensors = stored.weights("ema" if averaged else "model", path)
    if any(key.startswith("encoder.down.") for key in tensors):
        return TokenizerWeights(seed_names(tensors), {"quantizer": "ibq", "l2_normalize": False})
    tensors.setdefault(CODEBOOK_USED, torch.zeros(COUNTER_SIZE))
    return TokenizerWeights(tensors, {})


def seed_names(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the keys of SEED-Voken to ours; unknown keys stay, and are refused by name later."""
    levels = 1 + max((int(m[1]) for key in state if (m := SEED_LEVEL.match(key))), default=0)

    def ours(key: str) -> str:
        for pattern, replacement in SEED_NAMES:
            key = re.sub(f"^{pattern}", replacement, key)
        if match := SEED_LEVEL.match(key):
            level = levels - 1 - int(match[1])
            key = f"decoder.conv_blocks.{level}.{key[match.end() :]}"
        return key

    return {ours(key): value for key, value in state.items()}


def read_discriminator(path: Path) -> dict[str, torch.Tensor]:
    """The weights of a discriminator: a released file, or `training/discriminator.safetensors`.

    Raises InputError for a file that has none.
    """
    part = "model" if path.suffix == ".safetensors" else "discriminator"
    return read_file(path, TOKENIZER_PARTS).weights(part, path)
