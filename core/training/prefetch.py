"""A thread that prepares batches in advance, in pinned memory if the device is a GPU."""

import contextlib
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch

CLOSE_SECONDS = 20.0


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
            yield to_device(item, device)
    finally:
        closed.set()
        # The interpreter aborts ("terminate called") if it exits while this thread is inside a
        # kernel of torch: wait for the batch that is being made, but not for a reader that hangs.
        deadline = time.monotonic() + CLOSE_SECONDS
        while thread.is_alive() and time.monotonic() < deadline:
            with contextlib.suppress(queue.Empty):  # makes room for what the thread is putting
                ready.get(timeout=0.05)


def to_device(value: Any, device: torch.device) -> Any:  # noqa: ANN401 - tensors in tuples
    """A tensor, or nested tuples of them, on `device`; pinned ones are copied without waiting."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=value.is_pinned())
    return tuple(to_device(part, device) for part in value)


def _pinned(value: Any) -> Any:  # noqa: ANN401 - tensors in tuples
    if isinstance(value, torch.Tensor):
        return value.pin_memory() if value.device.type == "cpu" else value
    return tuple(_pinned(part) for part in value)
