"""From the GPT's tensor names to the parameters of the vLLM model."""

# vLLM has its own environment: pyright does not see it.
# pyright: reportMissingImports=false

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from autoregressive.models.config import GPTConfig

# Tokens of the vLLM model, in order: the codes, then the classes, the null class last.
_TOKEN_TABLES = ("tok_embeddings.weight", "cls_embedding.embedding_table.weight")
_RENAMED = {
    "norm.weight": "transformer.norm.weight",
    "cls_embedding.cap_proj.fc1.weight": "fc1.weight",
    "cls_embedding.cap_proj.fc2.weight": "fc2.weight",
    "cls_embedding.uncond_embedding": "null_features",
}


def load_tensors(
    parameters: Mapping[str, Any], tensors: Iterable[tuple[str, torch.Tensor]], config: GPTConfig
) -> set[str]:
    """Load tensors into parameters, each rank its share -> names of the parameters loaded."""
    loaded: set[str] = set()
    tables: dict[str, torch.Tensor] = {}

    def load(name: str, tensor: torch.Tensor, *shard: str | int) -> None:
        parameter = parameters[name]
        loader = getattr(parameter, "weight_loader", default_weight_loader)
        loader(parameter, tensor, *shard)
        loaded.add(name)

    for name, tensor in tensors:
        if config.guidance_input and name.startswith(("cls_embedding.", "t_embedder.")):
            continue  # they make the prompt, outside of vLLM
        if name in _TOKEN_TABLES:
            tables[name] = tensor
        elif name.endswith("attention.wqkv.weight"):
            key_rows = config.kv_heads * config.head_dim
            sizes = [config.dim, key_rows, key_rows]
            for part, shard in zip(tensor.split(sizes), ("q", "k", "v"), strict=True):
                load(f"transformer.{name}", part, shard)
        elif name.endswith((".w1.weight", ".w3.weight")):
            stem, part, _ = name.rsplit(".", 2)
            load(f"transformer.{stem}.w13.weight", tensor, 0 if part == "w1" else 1)
        elif name.startswith("layers."):
            load(f"transformer.{name}", tensor)
        else:
            load(_RENAMED.get(name, name), tensor)
    load("embedding.weight", torch.cat([tables[name] for name in _TOKEN_TABLES if name in tables]))
    return loaded
