"""The embedded engine: our InferenceEngine in this process, waiting images sampled in batches.

Waiting images with equal settings form a batch as soon as the engine is free. Their seeds, classes
and captions may differ. The batch has always the same shape: a short one is filled up, because
products of another shape may round differently, and now and then a code with them.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import torch

from autoregressive.inference.engine import InferenceEngine
from autoregressive.inference.generate import generation_request
from autoregressive.models.conditioning import Condition
from autoregressive.serving.http.image_engine import (
    Encode,
    EngineStoppingError,
    ImageProgress,
    ImageTask,
    decode_rows,
    image_size,
)
from core.rng import random_bits
from tokenizer.models.vq_model import VQModel


@dataclass(eq=False)
class _Job:
    """A task in the queue: its condition and group once they are computed, and where images go."""

    index: int
    task: ImageTask
    events: "asyncio.Queue[ImageProgress | BaseException]"
    condition: Condition | None = None
    negative: Condition | None = None
    group: Hashable = field(default=None)
    cancelled: bool = False


class NativeEngine:
    """Samples on one thread beside the event loop.

    Args:
        engine: The GPT, prepared.
        vq: The tokenizer, prepared.
        encode: Turns a class or a caption into the GPT's condition; called on the same thread.
        batch_size: Images of every batch.
    """

    negative_prompts = True

    def __init__(
        self, engine: InferenceEngine, vq: VQModel, encode: Encode, batch_size: int
    ) -> None:
        self._engine, self._vq, self._encode_prompt = engine, vq, encode
        self._batch_size = batch_size
        self.gpt, self.image_size = engine.config, image_size(vq, engine.config)
        self._thread = ThreadPoolExecutor(1, "sampling")
        self._waiting: list[_Job] = []
        self._arrived = asyncio.Event()
        self._draining = False
        self._scheduler: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to take batches."""
        self._scheduler = asyncio.create_task(self._schedule())

    async def images(self, tasks: Sequence[ImageTask]) -> AsyncGenerator[ImageProgress, None]:
        """See ImageEngine."""
        if self._draining:
            raise EngineStoppingError
        events: asyncio.Queue[ImageProgress | BaseException] = asyncio.Queue()
        jobs = [_Job(index, task, events) for index, task in enumerate(tasks)]
        self._waiting += jobs
        self._arrived.set()
        left = len(jobs)
        try:
            while left:
                event = await events.get()
                if isinstance(event, BaseException):
                    raise event
                left -= event.rows == self.gpt.grid[0]
                yield event
        finally:
            for job in jobs:
                job.cancelled = True
            self._waiting = [job for job in self._waiting if not job.cancelled]

    def drain(self) -> None:
        """See ImageEngine."""
        self._draining = True
        for job in self._waiting:
            job.events.put_nowait(EngineStoppingError())
        self._waiting.clear()

    async def stop(self) -> None:
        """See ImageEngine."""
        if self._scheduler:
            self._scheduler.cancel()
        self._thread.shutdown()

    async def _schedule(self) -> None:
        """Take batches for ever; what fails goes to the clients of its batch."""
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while self._waiting:
                new = [job for job in self._waiting if job.condition is None]
                if await self._ran(new, self._encode, new):
                    continue
                batch = self._take_batch()
                if batch:
                    await self._ran(batch, self._sample, batch, asyncio.get_running_loop())

    def _take_batch(self) -> list[_Job]:
        """The oldest waiting job, and the next ones of its group."""
        ready = [job for job in self._waiting if job.condition is not None]
        batch = [job for job in ready if job.group == ready[0].group][: self._batch_size]
        self._waiting = [job for job in self._waiting if job not in batch]
        return batch

    async def _ran(self, jobs: list[_Job], work: Callable[..., None], *arguments: object) -> bool:
        """Run on the sampling thread; whether it failed, which the jobs' clients are told."""
        done = asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)
        await asyncio.wait([done])
        error = done.exception()
        if error:
            for job in jobs:
                job.events.put_nowait(error)
            self._waiting = [job for job in self._waiting if job not in jobs]
        return error is not None

    def _encode(self, jobs: list[_Job]) -> None:
        """Compute each job's condition, one at a time, so that none depends on the others."""
        for job in jobs:
            condition, negative = self._encode_prompt(job.task.prompt, job.task.negative_prompt)
            longest = self.gpt.max_text_tokens
            given = [part for part in (condition, negative) if part is not None]
            lengths = [self._engine.cls_embedding.lengths(part) for part in given]
            # A batch in which every caption is full needs no mask: it is a group of its own.
            full = all(tokens is None or int(tokens.min()) == longest for tokens in lengths)
            job.group = replace(job.task.sampling, seed=0), negative is None, full
            job.negative = negative and negative.pad(longest)
            job.condition = condition.pad(longest)

    @torch.inference_mode()
    def _sample(self, batch: list[_Job], loop: asyncio.AbstractEventLoop) -> None:
        """Sample one batch and send what its clients wait for."""
        engine, (height, width) = self._engine, self.gpt.grid
        rows = [*batch, *[batch[0]] * (self._batch_size - len(batch))]
        bits = [
            random_bits(job.task.sampling.seed, torch.tensor([[job.task.sample_id]]))
            for job in rows
        ]
        request = generation_request(
            engine,
            _stacked([job.condition for job in rows]),
            batch[0].task.sampling,
            negative=None if batch[0].negative is None else _stacked([j.negative for j in rows]),
        )
        for codes, done in engine.steps(replace(request, sample_bits=torch.cat(bits))):
            if all(job.cancelled for job in batch):
                return
            if done % width:
                continue
            finished = done // width
            for job, row in zip(batch, codes, strict=False):
                wanted = finished == height or finished in job.task.preview_rows
                if wanted and not job.cancelled:
                    pixels = decode_rows(self._vq, row[:done], self.gpt.grid)
                    progress = ImageProgress(job.index, finished, pixels)
                    loop.call_soon_threadsafe(job.events.put_nowait, progress)


def _stacked(conditions: Sequence[Condition | None]) -> Condition:
    """Conditions of one image each, as one condition of all."""
    return type(conditions[0]).cat(conditions)  # pyright: ignore
