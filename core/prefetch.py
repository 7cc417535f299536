"""Batches made ahead by a thread, in pinned memory where there is a GPU to copy them to."""

import queue
import threading
from collections.abc import Iterator, Sequence

import torch


def prefetch(
    batches: Iterator[Sequence[torch.Tensor]], device: torch.device, depth: int = 2
) -> Iterator[list[torch.Tensor]]:
    """The same batches on `device`, up to `depth` of them read ahead while the model computes.

    An error of `batches` is raised here, in its place in the sequence.
    """
    ready: queue.Queue[list[torch.Tensor] | Exception | None] = queue.Queue(depth)
    pin = device.type == "cuda"

    def fill() -> None:
        if pin:  # a thread begins on the first GPU, whatever its process works on
            torch.cuda.set_device(device)
        try:
            for batch in batches:
                ready.put([tensor.pin_memory() if pin else tensor for tensor in batch])
            ready.put(None)
        except (ValueError, OSError, RuntimeError) as error:
            ready.put(error)

    # A daemon: a run that stops does not wait for a batch that nobody takes.
    threading.Thread(target=fill, name="prefetch", daemon=True).start()
    while (item := ready.get()) is not None:
        if isinstance(item, Exception):
            raise item
        # Pinned memory lets the copy overlap with the step before.
        yield [tensor.to(device, non_blocking=pin) for tensor in item]
