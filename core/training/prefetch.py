"""A thread that prepares batches in advance, in pinned memory if the device is a GPU."""

import queue
import threading
from collections.abc import Iterator
from typing import Any

import torch


def prefetch(
    batches: Iterator[tuple[Any, ...]], device: torch.device, depth: int = 2
) -> Iterator[tuple[Any, ...]]:
    """Yield the same batches (tuples of tensors) on `device`, reading up to `depth` in advance.

    An exception of `batches` is raised to the consumer, after the batches that came before it.
    """
    ready: queue.Queue[tuple[Any, ...] | BaseException | None] = queue.Queue(depth)
    pin, closed = device.type == "cuda", threading.Event()

    def fill() -> None:
        try:
            if pin:  # a new thread starts on GPU 0, whatever GPU its process uses
                torch.cuda.set_device(device)
            for batch in batches:
                ready.put(_pinned(batch) if pin else batch)
                if closed.is_set():
                    return
            ready.put(None)
        except BaseException as error:  # if it were not passed on, the consumer would wait for ever
            ready.put(error)

    # A daemon thread, so that a run that stops does not wait for a batch that nobody reads.
    threading.Thread(target=fill, name="prefetch", daemon=True).start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            # From pinned memory, the copy overlaps with the computation of the step before.
            yield to_device(item, device)
    finally:
        closed.set()
        while not ready.empty():  # makes room for a batch that the thread may be putting
            ready.get_nowait()


def to_device(value: Any, device: torch.device) -> Any:  # noqa: ANN401 - tensors in tuples
    """A tensor, or nested tuples of them, on `device`; pinned ones are copied without waiting."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=value.is_pinned())
    return tuple(to_device(part, device) for part in value)


def _pinned(value: Any) -> Any:  # noqa: ANN401 - tensors in tuples
    if isinstance(value, torch.Tensor):
        return value.pin_memory() if value.device.type == "cpu" else value
    return tuple(_pinned(part) for part in value)
