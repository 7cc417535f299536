"""Low-rank adaptation of a GPT's linear layers (LoRA; Hu et al., arXiv 2106.09685).

A linear layer computes W x + (alpha / rank) B A x. Its weight W (out, in) stays as the base model
has it; A (rank, in) and B (out, rank) are trained, and B starts at zero, so that training starts
from the base model. New classes have rows of their own, which are trained in full and start from
the null class. Merging adds (alpha / rank) B A to W: the merged model is an ordinary GPT.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from autoregressive.models.config import LoRAConfig

CLASS_TABLE, NEW_CLASSES = "cls_embedding.embedding_table.weight", "cls_embedding.new_classes"


class LoRALinear(nn.Linear):
    """A linear layer with a low-rank matrix added to its weight: `lora_b` @ `lora_a` * scale."""

    def __init__(self, layer: nn.Linear, rank: int, scale: float) -> None:
        bias, kind = layer.bias is not None, layer.weight
        super().__init__(layer.in_features, layer.out_features, bias, kind.device, kind.dtype)
        self.scale = scale
        self.lora_a = nn.Parameter(kind.new_zeros(rank, layer.in_features))
        self.lora_b = nn.Parameter(kind.new_zeros(layer.out_features, rank))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        added = F.linear(F.linear(input, self.lora_a), self.lora_b)
        return super().forward(input) + self.scale * added


def is_lora_weight(name: str) -> bool:
    """Whether a name in the state dict is that of a trained weight of LoRA."""
    return name == NEW_CLASSES or name.endswith((".lora_a", ".lora_b"))


def add_lora(blocks: nn.Module, config: LoRAConfig) -> None:
    """Replace the targets among the linear layers of `blocks`, whose weights are undefined yet."""
    for name, module in list(blocks.named_modules()):
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in config.targets:
            blocks.set_submodule(name, LoRALinear(module, config.rank, config.scale))


def freeze_base(model: nn.Module) -> None:
    """Leave gradients only to the weights of LoRA."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_lora_weight(name))


def share_base(model: nn.Module, average: nn.Module) -> None:
    """Let the EMA of a model use the model's frozen weights, instead of a copy of them.

    Sharded weights stay copies: FSDP2 keeps the memory of each module's shards.
    """
    for own, new in zip(average.parameters(), model.parameters(), strict=True):
        if not new.requires_grad and not isinstance(new, DTensor):
            own.data = new.data


def merge_lora(tensors: Mapping[str, torch.Tensor], config: LoRAConfig) -> dict[str, torch.Tensor]:
    """The state dict of the base and its LoRA -> that of an ordinary GPT, merged in float32."""
    merged = {name: tensor for name, tensor in tensors.items() if not is_lora_weight(name)}
    for name, b in tensors.items():
        if name.endswith(".lora_b"):
            layer = name.removesuffix(".lora_b")
            added = config.scale * b.float() @ tensors[f"{layer}.lora_a"].float()
            weight = merged[f"{layer}.weight"]
            merged[f"{layer}.weight"] = (weight.float() + added).to(b.dtype)
    if NEW_CLASSES in tensors:
        merged[CLASS_TABLE] = class_table(merged[CLASS_TABLE], tensors[NEW_CLASSES])
    return merged


def class_table(base: torch.Tensor, new_classes: torch.Tensor) -> torch.Tensor:
    """The base's rows (classes + 1, dim), whose last is the null class, with new ones before it."""
    return torch.cat([base[:-1], new_classes.to(base.dtype), base[-1:]])


class LoRAWeights(nn.Module):
    """The LoRA weights of a model as a module: what a checkpoint holds instead of the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = (model,)  # in a tuple, so that it is no submodule

    def state_dict(self, **options: Any) -> dict[str, torch.Tensor]:  # noqa: ANN401  # pyright: ignore[reportIncompatibleMethodOverride]
        """The model's own tensors, by their names in its state dict."""
        state = self._model[0].state_dict(**options)
        return {name: tensor for name, tensor in state.items() if is_lora_weight(name)}

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The tensors of the state dict: none of them is a buffer."""
        return iter(self.state_dict(keep_vars=True).values())  # pyright: ignore[reportReturnType]
