"""The layouts of released transformer files, turned into this project's keys.

| layout | how it is recognised | what differs |
|---|---|---|
| LlamaGen (DDP, FSDP, DeepSpeed, Hub mixin), CCA, NPP | keys of ours | left-overs of `generate()` |
| GFT | `t_embedder.*` | guidance_input |
| RAR, reAR | `target_aware_pos_embed` | names, one embedding table, order of adaptive rows |
| SEED-Voken (IBQ) | `tok_emb.weight`, in a Lightning file | names, the tokenizer beside it, adaLN |
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from core.errors import InputError
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


# RAR's names -> ours, below `blocks.N.` and `layers.N.`.
RAR_MARK = "target_aware_pos_embed"
RAR_SPARE_ROWS = 1024  # of the positions, behind those of the codes
RAR_NAMES = {
    "norm1": "attention_norm",
    "attn.qkv": "attention.wqkv",
    "attn.q_norm": "attention.q_norm",
    "attn.k_norm": "attention.k_norm",
    "attn.proj": "attention.wo",
    "norm2": "ffn_norm",
    "mlp.fc1": "feed_forward.w1",
    "mlp.fc2": "feed_forward.w2",
    "adaLN_modulation.1": "ada_lin.1",
}
# Ours are gain, scale, shift, each of attention and FFN; theirs shift, scale, gain of each.
RAR_ROWS = (2, 5, 1, 4, 0, 3)
# Heads that only training uses.
RAR_HEADS = ("encode_align_mlp.", "decode_align_mlp.")


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
    if RAR_MARK in model:
        tensors, codes = rar_tensors(model, path)
        return TransformerWeights(tensors, stored.arguments, 1 + codes)
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


def rar_tensors(
    state: Mapping[str, torch.Tensor], path: Path
) -> tuple[dict[str, torch.Tensor], int]:
    """The weights of RAR or reAR under our keys, and the number of codes of an image.

    Rows that no image uses are left out: those of the mask token and of spare positions. A key that
    is not known stays, to be refused by name. Raises InputError for a missing key.
    """
    left = {key: value for key, value in state.items() if not key.startswith(RAR_HEADS)}
    try:
        positions, targets = left.pop("pos_embed")[0], left.pop(RAR_MARK)[0]
        codes, head = len(positions) - RAR_SPARE_ROWS, left.pop("lm_head.weight")
        table, vocab = left.pop("embeddings.weight"), len(head)
        tensors = {
            "tok_embeddings.weight": table[:vocab],
            "cls_embedding.embedding_table.weight": table[vocab + 1 :],  # behind the mask token
            "learned.cls_token": left.pop("cls_token").flatten(),
            "learned.positions": positions[: codes + 2],
            "learned.steps": left.pop("timesteps_embeddings")[0, : codes + 1],
            "target_position.weight": targets[2 : codes + 2],
            "output.weight": torch.cat([head, left.pop("lm_head.bias")[:, None]], dim=1),
        }
    except KeyError as error:
        raise InputError(f"{path}: weights of RAR, but {error} is missing") from error
    for key, value in left.items():
        if key.startswith("adaln_before_head.adaLN_modulation."):
            key = key.replace("adaln_before_head.adaLN_modulation.", "norm_ada_lin.")
        elif found := re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", key):
            layer, name, kind = found.groups()
            if name == "adaLN_modulation.1" and len(value) % 6 == 0:
                value = torch.cat([value.chunk(6)[row] for row in RAR_ROWS])
            key = f"layers.{layer}.{RAR_NAMES.get(name, name)}.{kind}"
        tensors[key] = value
    return tensors, codes
