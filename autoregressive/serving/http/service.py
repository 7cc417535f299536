"""From a client's request to its images: limits, settings, metrics. Knows nothing of HTTP."""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from autoregressive.inference.sampling_config import SamplingConfig
from autoregressive.serving.http.image_engine import (
    EngineStoppingError,
    ImageEngine,
    ImageProgress,
    ImageTask,
    class_of,
)
from autoregressive.serving.http.images_api import ImagesRequest
from autoregressive.serving.http.limits import LimitsConfig
from core.config import InputError

LATENCIES = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)  # bounds of the histogram, seconds


class QueueFullError(Exception):
    """More images wait than the server allows."""


class Metrics:
    """What /metrics shows; one registry per server."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("llamagen_requests", "By status", ["code"], registry=registry)
        self.images = Counter("llamagen_images", "Images finished", registry=registry)
        self.codes = Counter("llamagen_codes", "Codes of finished images", registry=registry)
        self.pending = Gauge("llamagen_pending", "Images that wait or run", registry=registry)
        self.seconds = Histogram(
            "llamagen_seconds", "Time of a whole request", buckets=LATENCIES, registry=registry
        )


class ImageService:
    """Checks requests, admits them, and hands their images to the engine.

    Args:
        engine: What samples.
        limits: What is refused.
        name: The model's name in the API.
        class_names: Names of the classes in order, which clients may use as prompts.
    """

    def __init__(
        self,
        engine: ImageEngine,
        limits: LimitsConfig,
        name: str = "llamagen",
        class_names: Sequence[str] = (),
    ) -> None:
        self.engine, self.limits, self.name = engine, limits, name
        self.class_names, self.metrics = tuple(class_names), Metrics()
        self.created, self.draining, self.pending = int(time.time()), False, 0

    @property
    def size(self) -> str:
        """Width x height, as OpenAI writes it."""
        height, width = self.engine.image_size
        return f"{width}x{height}"

    def tasks(self, request: ImagesRequest) -> list[ImageTask]:
        """The checked images of a request; raises InputError for what this model cannot do."""
        height = self.engine.gpt.grid[0]
        for name, value, most in (
            ("n", request.n, self.limits.images),
            ("partial_images", request.partial_images, height - 1),
        ):
            if value > most:
                raise InputError(f"{name} is {value}, must be at most {most}")
        if request.size not in (None, "auto", self.size):
            raise InputError(f"size must be {self.size}, which this model makes, or auto")
        if request.partial_images and not request.stream:
            raise InputError("partial_images needs stream: true")
        scaled = request.cfg_scale is not None or request.cfg_schedule != "constant"
        if self.engine.gpt.guidance_input and scaled:
            name = "cfg_schedule" if request.cfg_scale is None else "cfg_scale"
            raise InputError(f"{name}: this model takes guidance as an input; use guidance")
        if not self.engine.gpt.guidance_input and request.guidance is not None:
            raise InputError("guidance: this model does not take it as an input; use cfg_scale")
        prompt = self._prompt(request)
        sampling = SamplingConfig(
            cfg_scale=request.cfg_scale,
            cfg_schedule=request.cfg_schedule,
            guidance=request.guidance,
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            seed=secrets.randbits(31) if request.seed is None else request.seed,
        )
        parts = request.partial_images + 1
        rows = tuple(height * part // parts for part in range(1, parts))
        return [
            ImageTask(prompt, sampling, number, request.negative_prompt or None, rows)
            for number in range(request.n)
        ]

    def _prompt(self, request: ImagesRequest) -> str | int:
        gpt = self.engine.gpt
        if gpt.condition == "text":
            if request.class_index is not None:
                raise InputError("class_index needs a class model; this model reads a prompt")
            if request.negative_prompt and not self.engine.negative_prompts:
                raise InputError("negative_prompt needs the native engine")
            if not request.prompt or not request.prompt.strip():
                raise InputError("prompt is missing or empty")
            return request.prompt
        if request.negative_prompt:
            raise InputError("negative_prompt needs a text model; this model reads a class")
        if (request.prompt is None) == (request.class_index is None):
            raise InputError("give a class, either as prompt or as class_index")
        value = request.prompt if request.class_index is None else request.class_index
        assert value is not None
        return class_of(gpt, value, self.class_names)

    async def images(self, tasks: Sequence[ImageTask]) -> AsyncGenerator[ImageProgress, None]:
        """The images as they grow; closing the generator gives up what is not finished.

        Raises QueueFullError, EngineStoppingError, and TimeoutError.
        """
        if self.draining:
            raise EngineStoppingError
        if self.pending + len(tasks) > self.limits.queue:
            raise QueueFullError
        begin, height, left = time.monotonic(), self.engine.gpt.grid[0], len(tasks)
        self._count(left)
        progress = self.engine.images(tasks)
        try:
            while left:
                remaining = self.limits.seconds - (time.monotonic() - begin)
                event = await asyncio.wait_for(anext(progress), max(remaining, 0))
                if event.rows == height:
                    left -= 1
                    self._count(-1)
                    self.metrics.images.inc()
                    self.metrics.codes.inc(self.engine.gpt.num_codes)
                yield event
            self.metrics.seconds.observe(time.monotonic() - begin)
        finally:
            await progress.aclose()
            self._count(-left)

    def _count(self, change: int) -> None:
        self.pending += change
        self.metrics.pending.set(self.pending)

    def drain(self) -> None:
        """Refuse new images and those that have not begun."""
        self.draining = True
        self.engine.drain()
