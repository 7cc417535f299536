"""A thread that prepares batches in advance, in pinned memory if the device is a GPU."""

import contextlib
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch

CLOSE_SECONDS = 20.0

# Tensors, and anything else with their methods `to(device, non_blocking=)` and `pin_memory()`.
Batch = tuple[Any, ...]


def prefetch(batches: Iterator[Batch], device: torch.device, depth: int = 2) -> Iterator[Batch]:
    """Yield the same batches on `device`, reading up to `depth` of them in advance.

    An exception of `batches` is raised to the consumer, after the batches that came before it.
    """
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(depth)
    pin, closed = device.type == "cuda", threading.Event()

    def fill() -> None:
        try:
            if pin:  # a new thread starts on GPU 0, whatever GPU its process uses
                torch.cuda.set_device(device)
            for batch in batches:
                ready.put(tuple(map(pinned, batch)) if pin else batch)
                if closed.is_set():
                    break
            ready.put(None)
        except BaseException as error:  # if it were not passed on, the consumer would wait for ever
            ready.put(error)

    # A daemon thread, so that a reader that hangs cannot keep the process alive.
    thread = threading.Thread(target=fill, name="prefetch", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            # From pinned memory, the copy overlaps with the computation of the step before.
            yield to_device(item, device, non_blocking=pin)
    finally:
        closed.set()
        # The interpreter aborts ("terminate called") if it exits while this thread is inside a
        # kernel of torch: wait for the batch that is being made, but not for a reader that hangs.
        deadline = time.monotonic() + CLOSE_SECONDS
        while thread.is_alive() and time.monotonic() < deadline:
            with contextlib.suppress(queue.Empty):  # makes room for what the thread is putting
                ready.get(timeout=0.05)


def to_device(batch: Batch, device: torch.device, non_blocking: bool = False) -> Batch:
    """A batch on `device`. non_blocking: do not wait for the copy of what is in pinned memory."""
    return tuple(
        to_device(part, device, non_blocking)
        if isinstance(part, tuple)
        else part.to(device, non_blocking=non_blocking)
        for part in batch
    )


def pinned(part: Any) -> Any:  # noqa: ANN401 - part of a Batch
    """The same in page-locked memory; a tensor that is on a GPU stays there."""
    if isinstance(part, tuple):
        return tuple(map(pinned, part))
    on_gpu = isinstance(part, torch.Tensor) and part.device.type != "cpu"
    return part if on_gpu else part.pin_memory()
