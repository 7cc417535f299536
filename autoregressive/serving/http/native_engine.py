"""The embedded engine: our InferenceEngine in this process, with continuous batching.

Images with equal settings share the steps of one batch; their seeds, classes and captions may
differ. An image that arrives while others are sampled joins them after their next row of codes, if
a place is free. Once the image that has waited longest has other settings, no further one joins,
and it begins when the batch is empty. See ContinuousBatch for why an image is the same bit for bit
whatever else is sampled.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from autoregressive.inference.continuous import ContinuousBatch
from autoregressive.inference.engine import InferenceEngine
from autoregressive.inference.generate import generation_request
from autoregressive.inference.generation import GenerationRequest
from autoregressive.inference.sampling_config import SamplingConfig
from autoregressive.models.conditioning import Condition
from autoregressive.serving.http.image_engine import (
    Encode,
    EngineStoppingError,
    ImageProgress,
    ImageTask,
    decode_rows,
    image_size,
)
from tokenizer.models.vq_model import VQModel


@dataclass(eq=False)
class _Job:
    """A task: where its images go, its condition once it is computed, its rows of codes so far."""

    index: int
    task: ImageTask
    events: "asyncio.Queue[ImageProgress | BaseException]"
    condition: Condition | None = None
    negative: Condition | None = None
    rows: int = 0
    cancelled: bool = False

    @property
    def settings(self) -> SamplingConfig:
        """What the images of a batch have in common."""
        return replace(self.task.sampling, seed=0)


class NativeEngine:
    """Samples on one thread beside the event loop.

    Args:
        engine: The GPT, prepared.
        vq: The tokenizer, prepared.
        encode: Turns a class or a caption into the GPT's condition; called on the same thread.
        batch_size: Images that are sampled together.
    """

    negative_prompts = True

    def __init__(
        self, engine: InferenceEngine, vq: VQModel, encode: Encode, batch_size: int
    ) -> None:
        self._engine, self._vq, self._encode_prompt = engine, vq, encode
        self._batch = ContinuousBatch(engine, batch_size)
        self._places: list[_Job | None] = [None] * batch_size
        self.gpt, self.image_size = engine.config, image_size(vq, engine.config)
        self._thread = ThreadPoolExecutor(1, "sampling")
        self._waiting: list[_Job] = []
        self._arrived = asyncio.Event()
        self._draining = False
        self._scheduler: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to sample."""
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
        """Sample for ever, row by row; what fails goes to the clients that it concerns."""
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while self._waiting or any(self._places):
                new = [job for job in self._waiting if job.condition is None]
                if await self._ran(new, self._encode, new):
                    continue
                empty = not any(self._places)
                joining = self._join()
                jobs = [job for job in self._places if job]
                if jobs:
                    loop = asyncio.get_running_loop()
                    await self._ran(jobs, self._sample_row, joining, empty, loop)
                finished = [job for job in jobs if job.rows == self.gpt.grid[0] or job.cancelled]
                self._leave(finished)

    def _join(self) -> dict[int, _Job]:
        """Give free places to waiting jobs that fit the batch -> the new jobs by place."""
        running = next((job for job in self._places if job), None)
        ready = [job for job in self._waiting if job.condition is not None]
        settings = running.settings if running else ready[0].settings if ready else None
        if running:  # the first job of other settings ends the queue, so that its turn comes
            others = [i for i, job in enumerate(ready) if job.settings != settings]
            ready = ready[: others[0]] if others else ready
        fitting = [job for job in ready if job.settings == settings]
        free = [place for place, job in enumerate(self._places) if job is None]
        joining = dict(zip(free, fitting, strict=False))
        for place, job in joining.items():
            self._places[place] = job
            self._waiting.remove(job)
        return joining

    def _leave(self, jobs: Sequence[_Job]) -> None:
        """Free the places of these jobs."""
        self._places = [None if job in jobs else job for job in self._places]

    async def _ran(self, jobs: list[_Job], work: Callable[..., None], *arguments: object) -> bool:
        """Run on the sampling thread; whether it failed, which the jobs' clients are told."""
        done = asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)
        await asyncio.wait([done])
        error = done.exception()
        if error:
            for job in jobs:
                job.events.put_nowait(error)
            self._waiting = [job for job in self._waiting if job not in jobs]
            self._leave(jobs)
        return error is not None

    def _encode(self, jobs: list[_Job]) -> None:
        """Compute each job's condition, one at a time, so that none depends on the others."""
        for job in jobs:
            condition, negative = self._encode_prompt(job.task.prompt, job.task.negative_prompt)
            longest = self.gpt.max_text_tokens
            job.negative = negative and negative.pad(longest)
            job.condition = condition.pad(longest)

    def _request(self, job: _Job) -> GenerationRequest:
        """The job as the engine takes it."""
        assert job.condition is not None
        ids = torch.tensor([job.task.sample_id])
        sampling = job.task.sampling
        return generation_request(self._engine, job.condition, sampling, ids, job.negative)

    @torch.inference_mode()
    def _sample_row(
        self, joining: dict[int, _Job], empty: bool, loop: asyncio.AbstractEventLoop
    ) -> None:
        """Let images join, sample a row of codes of every image, send what clients wait for.

        empty: nothing was being sampled before these images.
        """
        batch, (height, width) = self._batch, self.gpt.grid
        for place, job in joining.items():
            request = self._request(job)
            if empty:
                batch.reset(request)
                empty = False
            batch.begin(place, request)
        jobs = [(place, job) for place, job in enumerate(self._places) if job]
        for _ in range(width):
            if all(job.cancelled for _, job in jobs):
                return
            if any(batch.done[place] < batch.num_codes for place, _ in jobs):
                batch.step()
        for place, job in jobs:
            before, job.rows = job.rows, batch.done[place] // width
            for rows in range(before + 1, job.rows + 1):
                wanted = rows == height or rows in job.task.preview_rows
                if wanted and not job.cancelled:
                    codes = batch.codes[place, : rows * width]
                    pixels = decode_rows(self._vq, codes, self.gpt.grid)
                    progress = ImageProgress(job.index, rows, pixels)
                    loop.call_soon_threadsafe(job.events.put_nowait, progress)
