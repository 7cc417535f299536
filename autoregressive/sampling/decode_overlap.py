"""Runs the VQ decoder on a second CUDA stream, beside the transformer."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch


class DecodeOverlap:
    """Overlaps two models: the transformer samples batch i + 1 while batch i is rendered.

    The transformer is limited by memory bandwidth and the VQ decoder by arithmetic, so together
    they take less time than one after the other. Without CUDA everything runs in order.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def one_behind(
        self, sampled: Iterable[tuple[torch.Tensor, torch.Tensor]]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield each (ids, codes) after the work for the next one is enqueued."""
        if self.stream is None:
            yield from sampled
            return
        waiting = None
        for ids, codes in sampled:
            event = torch.cuda.Event()
            event.record()
            if waiting:
                yield self._ready(*waiting)
            waiting = ids, codes, event
        if waiting:
            yield self._ready(*waiting)

    def _ready(
        self, ids: torch.Tensor, codes: torch.Tensor, event: torch.cuda.Event
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.stream is not None
        self.stream.wait_event(event)
        codes.record_stream(self.stream)
        return ids, codes

    def second_stream(self) -> contextlib.AbstractContextManager[Any]:
        """Work inside this context is enqueued on the second stream."""
        return torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext()

    def join(self) -> None:
        """Let the current stream wait for everything on the second stream; the host does not."""
        if self.stream:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)
