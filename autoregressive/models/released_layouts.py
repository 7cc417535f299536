"""The layouts of released transformer files, turned into this project's keys.

| layout | how it is recognised | what differs |
|---|---|---|
| LlamaGen (DDP, FSDP, DeepSpeed, Hub mixin), CCA, NPP | keys of ours | left-overs of `generate()` |
| GFT | `t_embedder.*` | guidance_input |
| SEED-Voken (IBQ) | `tok_emb.weight`, in a Lightning file | names, the tokenizer beside it, adaLN |
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from core.hub import Weights
from core.lightning import live_weights
from core.weights import read_file

ROTARY = "freqs_cis"
# Buffers that the reference registers when it samples, or keeps beside its weights.
NOT_WEIGHTS = re.compile(rf"layers\.\d+\.attention\.kv_cache\.[kv]_cache|causal_mask|{ROTARY}")

# SEED-Voken's names -> ours (LlamaGen's), below the prefix of the Lightning module.
SEED_PREFIX, SEED_TOKENIZER = "transformer.", "first_stage_model."
SEED_NAMES = (
    ("tok_emb.", "tok_embeddings."),
    ("class_emb.", "cls_embedding."),
    ("blocks.", "layers."),
    ("head_nm.rmsnorm.", "norm."),
    ("head_nm.ada_lin.", "norm_ada_lin."),
    ("head.", "output."),
)


class TransformerWeights(NamedTuple):
    """Weights under our keys, the training flags of the file, and its rotary table's length."""

    tensors: dict[str, torch.Tensor]
    arguments: Mapping[str, Any]
    rotary_rows: int | None


def read_transformer(path: Path, weights: Weights) -> TransformerWeights:
    """Read a released file. "auto" takes `model`, or the EMA copy of a Lightning file.

    Raises InputError if the part is not in the file or an EMA weight is missing.
    """
    stored = read_file(path)
    model = stored.parts.get("model", {})
    if any(key.removeprefix(SEED_PREFIX) == "tok_emb.weight" for key in model):
        live = live_weights(model, weights, path, (SEED_TOKENIZER,))
        tensors = {seed_name(key): value for key, value in live.items()}
    else:
        tensors = stored.weights("model" if weights == "auto" else weights, path)
    rotary = tensors.get(ROTARY)
    kept = {key: value for key, value in tensors.items() if not NOT_WEIGHTS.fullmatch(key)}
    return TransformerWeights(kept, stored.arguments, None if rotary is None else len(rotary))


def seed_name(key: str) -> str:
    """Our name of a SEED-Voken key; a key of neither stays, to be refused by name."""
    key = key.removeprefix(SEED_PREFIX)
    for theirs, ours in SEED_NAMES:
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    return key
