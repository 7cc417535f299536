"""vLLM behind the HTTP server: its AsyncLLM samples codes, the tokenizer here decodes them.

vLLM batches continuously and spreads a model over GPUs by its own options. It repeats a request of
the same seed, but its random numbers are not those of the native engine.
"""

# vLLM has its own environment: pyright does not see it.
# pyright: reportMissingImports=false

import asyncio
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from autoregressive.models.gpt import GPT
from autoregressive.serving.export import PROCESSORS
from autoregressive.serving.http.image_engine import (
    Encode,
    EngineStoppingError,
    ImageProgress,
    ImageTask,
    decode_rows,
    image_size,
)
from autoregressive.serving.vllm_requests import (
    caption_prompt,
    class_prompt,
    condition_prompt,
    sampling_arguments,
)
from core.config import InputError
from core.rng import random_bits
from tokenizer.models.vq_model import VQModel


class VLLMEngine:
    """Samples with vLLM's AsyncLLM.

    Args:
        gpt: The exported model. Kept only where it takes guidance as an input, for its embeddings.
        vq: The tokenizer, prepared.
        encode: Turns a caption into the GPT's condition.
        folder: The exported model (see export_vllm).
        options: Further arguments of vLLM's AsyncEngineArgs.

    Raises InputError without vLLM, or for an option that it does not know.
    """

    negative_prompts = False

    def __init__(
        self,
        gpt: GPT,
        vq: VQModel,
        encode: Encode,
        folder: Path,
        options: Mapping[str, Any],
    ) -> None:
        try:
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM
        except ModuleNotFoundError as error:
            raise InputError(f"{error.name} is not installed; engine: vllm needs vLLM") from error
        self.gpt, self.image_size = gpt.config, image_size(vq, gpt.config)
        self._embeddings = gpt if gpt.config.guidance_input else None
        self._vq, self._encode = vq, encode
        # One for the tokenizer and the text encoder: they share a device.
        self._thread = ThreadPoolExecutor(1, "decoding")
        self._draining = False
        ours = {
            "model": str(folder),
            "skip_tokenizer_init": True,
            "logits_processors": [PROCESSORS[self.gpt.guidance_input]],
            "enable_prompt_embeds": self.gpt.condition == "text" or self.gpt.guidance_input,
        }
        try:
            arguments = AsyncEngineArgs(**{**ours, **options})
        except TypeError as error:
            raise InputError(f"vllm_options: {error}") from error
        self._engine = AsyncLLM.from_engine_args(arguments)

    async def start(self) -> None:
        """Nothing: vLLM's processes run already."""

    async def images(self, tasks: Sequence[ImageTask]) -> AsyncGenerator[ImageProgress, None]:
        """See ImageEngine."""
        if self._draining:
            raise EngineStoppingError
        found: asyncio.Queue[ImageProgress] = asyncio.Queue()
        running = [
            asyncio.create_task(self._sample(index, task, found))
            for index, task in enumerate(tasks)
        ]
        left = len(tasks)
        try:
            while left:
                event = asyncio.ensure_future(found.get())
                await asyncio.wait({event, *running}, return_when=asyncio.FIRST_COMPLETED)
                while not event.done():  # an image is finished or has failed
                    for one in [one for one in running if one.done()]:
                        running.remove(one)
                        one.result()
                    await asyncio.wait({event, *running}, return_when=asyncio.FIRST_COMPLETED)
                progress = event.result()
                left -= progress.rows == self.gpt.grid[0]
                yield progress
        finally:
            for one in running:
                one.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _sample(
        self, index: int, task: ImageTask, found: "asyncio.Queue[ImageProgress]"
    ) -> None:
        """Sample one image; vLLM gives it up where this is cancelled."""
        from vllm import SamplingParams

        loop, (height, width) = asyncio.get_running_loop(), self.gpt.grid
        prompt = await loop.run_in_executor(self._thread, self._prompt, task)
        parameters = SamplingParams(**self._parameters(task))
        rows = 0
        async for output in self._engine.generate(prompt, parameters, uuid.uuid4().hex):
            codes = output.outputs[0].token_ids
            # vLLM may report the codes of several steps at once.
            for finished in range(rows + 1, len(codes) // width + 1):
                rows = finished
                if finished == height or finished in task.preview_rows:
                    flat = torch.tensor(codes[: finished * width])
                    pixels = await loop.run_in_executor(
                        self._thread, decode_rows, self._vq, flat, self.gpt.grid
                    )
                    found.put_nowait(ImageProgress(index, finished, pixels))

    def _prompt(self, task: ImageTask) -> dict[str, Any]:
        if self._embeddings is not None:
            return condition_prompt(self.gpt, self._condition_tokens(self._embeddings, task))
        if self.gpt.condition == "class":
            return class_prompt(self.gpt, int(task.prompt))
        condition, _ = self._encode(task.prompt, None)
        features, length = condition.features[0], int(condition.lengths[0])  # pyright: ignore
        return caption_prompt(self.gpt, features[:length].float().cpu())

    @torch.inference_mode()
    def _condition_tokens(self, gpt: GPT, task: ImageTask) -> torch.Tensor:
        """The class or caption with the strength of guidance, (n, dim) float32 on the CPU."""
        condition, _ = self._encode(task.prompt, None)
        condition = condition.to(gpt.device)
        strength = task.sampling.resolved(self.gpt.condition, guidance_input=True).guidance
        guidance, drop = torch.tensor([strength]), torch.zeros(1, dtype=torch.bool)
        tokens = gpt.prefix(condition, drop.to(gpt.device), guidance.to(gpt.device))[0]
        lengths = gpt.cls_embedding.lengths(condition)
        return tokens[: len(tokens) if lengths is None else int(lengths[0])].float().cpu()

    def _parameters(self, task: ImageTask) -> dict[str, Any]:
        sampling = task.sampling.resolved(self.gpt.condition, self.gpt.guidance_input)
        scale = {"cfg_scale": sampling.cfg_scale, "cfg_schedule": sampling.cfg_schedule}
        bits = random_bits(sampling.seed, torch.tensor([task.sample_id]))
        return sampling_arguments(
            self.gpt,
            temperature=sampling.temperature,
            top_k=sampling.top_k or 0,
            top_p=sampling.top_p,
            seed=int(bits) & (2**63 - 1),
            **({} if self.gpt.guidance_input else scale),
        )

    def drain(self) -> None:
        """See ImageEngine. What was admitted runs already."""
        self._draining = True

    async def stop(self) -> None:
        """See ImageEngine."""
        self._engine.shutdown()
        self._thread.shutdown()
