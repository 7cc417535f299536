"""Time that a training run takes at the least, and what it sends, counted before it starts.

A roofline: a step takes at least as long as its arithmetic at the card's peak, as its memory
traffic at the card's bandwidth, and as its collectives at the network's, whichever is longest. It
assumes that the three overlap perfectly, so measured runs are slower, never faster. None of it was
fitted to a measurement.
"""

from dataclasses import dataclass

from core.distributed.hardware import CARDS, Card
from core.distributed.parallel import Strategy

NODE = 8  # GPUs, each with a network port, in a node of the named cards
NAMED_CARDS = ("A100", "H100", "H200", "B200")
# What recomputation adds to the three thirds of a step (one forward, two backward): selective
# recomputes every second matrix product, full recomputes the forward pass.
RECOMPUTED = {"none": 1.0, "selective": 7 / 6, "full": 4 / 3}
# Bytes that an optimizer step reads and writes per float32 parameter: weight, gradient and two
# moments are read, weight and moments written.
UPDATE_BYTES, EMA_BYTES = 28, 12


@dataclass(frozen=True)
class StepPlan:
    """The sizes that decide how long an optimizer step takes.

    Args:
        parameters: Number of parameters.
        outside_blocks: Parameters outside of all blocks, which stay gathered until the backward
            pass.
        flops: Model FLOPs of a step over the whole batch, without recomputation.
        activations: Estimated bytes of activations kept for the whole batch.
        compute_bytes: Bytes of a weight during computation: 2 for bf16, 4 for fp32.
        micro_batches: Micro-batches per step.
        checkpointing: none, selective or full.
        ema: Whether an EMA of the weights is kept.
    """

    parameters: int
    outside_blocks: int
    flops: float
    activations: float
    compute_bytes: int
    micro_batches: int = 1
    checkpointing: str = "none"
    ema: bool = True

    def collectives(self, strategy: Strategy, size: int, shared: int) -> dict[str, float]:
        """Bytes that one of `size` processes receives per step, by collective, in ring algorithms.

        Under hsdp, `shared` processes hold one copy of the model. Scalars are left out.
        """
        shards = {"ddp": 1, "fsdp": size, "hsdp": min(size, shared)}[strategy]
        copies, gradients = size // shards, 4 * self.parameters
        sent = {}
        if shards > 1:
            # Every micro-batch gathers all weights for its forward pass, and those of the blocks
            # again for its backward pass. Gradients are reduced once per step, in float32.
            twice = 2 * self.parameters - self.outside_blocks
            gathered = self.micro_batches * twice * self.compute_bytes
            sent["all-gather"] = gathered * (shards - 1) / shards
            sent["reduce-scatter"] = gradients * (shards - 1) / shards
        if copies > 1:
            sent["all-reduce"] = 2 * gradients / shards * (copies - 1) / copies
        return sent

    def memory_traffic(self, strategy: Strategy, size: int, shared: int) -> float:
        """Bytes that one process moves between the device and its memory per step, at the least.

        Weights are read in the forward pass and twice in the backward pass, activations are
        written and read once, and the optimizer updates the shard.
        """
        shards = {"ddp": 1, "fsdp": size, "hsdp": min(size, shared)}[strategy]
        weights = 3 * self.compute_bytes * self.parameters * self.micro_batches
        update = (UPDATE_BYTES + EMA_BYTES * self.ema) * self.parameters / shards
        return weights + update + 2 * self.activations / size

    def seconds(self, card: Card, strategy: Strategy, size: int, shared: int) -> dict[str, float]:
        """Least seconds per step of arithmetic, memory and network; the last only if known."""
        least = {
            "arithmetic": self.flops * RECOMPUTED[self.checkpointing] / size / card.flops,
            "memory": self.memory_traffic(strategy, size, shared) / card.bandwidth,
        }
        if card.network and size > NODE:  # within a node the links are faster by an order
            sent = self.collectives(strategy, size, shared)
            if strategy == "hsdp" and shared <= NODE:  # each process reduces a shard of its own
                least["network"] = sent["all-reduce"] / card.network
            else:  # all processes of a node want the same: their ports share the work
                least["network"] = sum(sent.values()) / (NODE * card.network)
        return least

    def table(self, strategy: Strategy, size: int, shared: int, num_steps: int) -> list[str]:
        """Lines that show, for named cards, the least time of a step and of the whole run."""
        lines = [
            f"{strategy} on {size}: least time (roofline, everything overlapped)",
            "  card    s per step   bound by    MFU at most      hours    GPU-hours",
        ]
        for name in NAMED_CARDS:
            card = CARDS[name]
            least = self.seconds(card, strategy, size, shared)
            bound, seconds = max(least.items(), key=lambda item: item[1])
            mfu = self.flops / size / card.flops / seconds
            hours = seconds * num_steps / 3600
            lines.append(
                f"  {name:<8}{seconds:>10.4f}   {bound:<12}{mfu:>10.2f}{hours:>11,.1f}"
                f"{hours * size:>13,.0f}"
            )
        sent = self.collectives(strategy, size, shared)
        received = ", ".join(f"{name} {count / 2**30:.2f} GiB" for name, count in sent.items())
        return [*lines, f"  received per step and process: {received or 'nothing'}"]
