"""The training objective: mean cross-entropy of every code, given the codes before it."""

import torch
from torch import nn

from autoregressive.models.conditioning import ConditionLike
from autoregressive.models.gpt import GPT
from core.distributed.parallel import full_state, local
from core.distributed.world import World
from core.training.linear_cross_entropy import linear_cross_entropy
from core.weights import load_weights


class NextTokenLoss(nn.Module):
    """A GPT and its loss as one module, which FSDP2 and DDP wrap, so that they see the head.

    Args:
        gpt: The model.
        chunk: Number of codes whose float32 logits exist at the same time.
    """

    def __init__(self, gpt: GPT, chunk: int) -> None:
        super().__init__()
        self.gpt, self.chunk = gpt, chunk

    def forward(
        self,
        codes: torch.Tensor,
        condition: ConditionLike,
        drop_condition: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Arguments of GPT.forward -> mean loss per code, a float32 scalar."""
        hidden = self.gpt.hidden(codes, condition, drop_condition).flatten(0, 1)
        return linear_cross_entropy(hidden, self.gpt.output.weight, codes.flatten(), self.chunk)


def unsharded_copy(gpt: GPT, world: World, everywhere: bool = False) -> GPT:
    """A GPT that one process can sample from: on rank 0, or on every rank if `everywhere`.

    All ranks must call it, because the weights of a sharded model are gathered. A model that is
    not sharded is returned as it is.
    """
    if all(local(parameter) is parameter for parameter in gpt.parameters()):
        return gpt
    state = full_state(gpt, world, everywhere)
    if not state:
        return gpt
    with torch.device("meta"):
        whole = GPT(gpt.config)
    load_weights(whole, state, "the sharded model", assign=True)
    whole.build_rotary()
    return whole.to(world.device).eval()
