"""Batches made ahead by a thread, in pinned memory where there is a GPU to copy them to."""

import queue
import threading
from collections.abc import Iterator
from typing import Any

import torch


def prefetch(
    batches: Iterator[tuple[Any, ...]], device: torch.device, depth: int = 2
) -> Iterator[tuple[Any, ...]]:
    """The same batches (tuples of tensors) on `device`, `depth` of them read ahead.

    Whatever `batches` raises is raised here, in its place in the sequence.
    """
    ready: queue.Queue[tuple[Any, ...] | BaseException | None] = queue.Queue(depth)
    pin, closed = device.type == "cuda", threading.Event()

    def fill() -> None:
        try:
            if pin:  # a thread begins on the first GPU, whatever its process works on
                torch.cuda.set_device(device)
            for batch in batches:
                ready.put(_pinned(batch) if pin else batch)
                if closed.is_set():
                    return
            ready.put(None)
        except BaseException as error:  # one that stayed here would leave the consumer waiting
            ready.put(error)

    # A daemon: a run that stops does not wait for a batch that nobody takes.
    threading.Thread(target=fill, name="prefetch", daemon=True).start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            # Pinned memory lets the copy overlap with the step before.
            yield to_device(item, device)
    finally:
        closed.set()
        while not ready.empty():  # room for the one batch that the thread may still be putting
            ready.get_nowait()


def to_device(value: Any, device: torch.device) -> Any:  # noqa: ANN401 - tensors in tuples
    """A tensor, or a tuple of them in tuples, on `device`; pinned ones are copied meanwhile."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=value.is_pinned())
    return tuple(to_device(part, device) for part in value)


def _pinned(value: Any) -> Any:  # noqa: ANN401 - tensors in tuples
    if isinstance(value, torch.Tensor):
        return value.pin_memory() if value.device.type == "cpu" else value
    return tuple(_pinned(part) for part in value)
