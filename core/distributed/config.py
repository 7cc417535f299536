"""How processes share a training, and the names of devices and precisions."""

from dataclasses import dataclass
from typing import Literal

Precision = Literal["fp32", "bf16"]


DeviceName = Literal["auto", "cpu", "cuda", "mps"]


Strategy = Literal["ddp", "fsdp", "hsdp"]


@dataclass(frozen=True)
class ParallelConfig:
    """How a model is run for training.

    Args:
        strategy: ddp holds the whole model in every process; fsdp shards weights, gradients and
            moments over all processes (FSDP2); hsdp shards them over groups of shard_size.
        shard_size: Processes that share one copy of the model under hsdp; null for all processes of
            a node.
        compile: torch.compile each block; null for yes on CUDA and no elsewhere.
        activation_checkpointing: none; selective keeps every second matrix product and the
            attention, and recomputes the rest; full keeps only what enters a block.
        timeout_minutes: A collective that takes longer ends the run with a message.
    """

    strategy: Strategy = "ddp"
    shard_size: int | None = None
    compile: bool | None = None
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    timeout_minutes: float = 30.0

    def __post_init__(self) -> None:
        if self.timeout_minutes <= 0:
            raise ValueError(f"parallel.timeout_minutes is {self.timeout_minutes}, must be > 0")
        if self.shard_size is not None and self.shard_size < 1:
            raise ValueError(f"parallel.shard_size is {self.shard_size}, must be >= 1, or null")
        if self.shard_size is not None and self.strategy != "hsdp":
            raise ValueError("parallel.shard_size needs parallel.strategy hsdp")

    def compiles(self, device_type: str) -> bool:
        """Whether models are compiled on this type of device, e.g. "cuda"."""
        return device_type == "cuda" if self.compile is None else self.compile
