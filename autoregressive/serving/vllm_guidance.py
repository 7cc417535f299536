"""The scale of guidance of each row in vLLM's batch (V1 model runner).

Before every forward pass vLLM tells a logits processor which request sits in which row. This one
leaves the logits as they are; it keeps the scales, and the model reads them before its head.
"""

# vLLM has its own environment: pyright does not see it.
# pyright: reportMissingImports=false

import weakref

import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from autoregressive.serving.guidance import guidance_scales, parse_guidance
from autoregressive.serving.vllm_plugin import gpt_config

# The model cannot be told about the processor by vLLM. A worker makes the processor, then loads
# the model, so the model takes the newest one that has the same config object.
_newest: "weakref.ref[Guidance] | None" = None


def guidance_for(vllm_config: VllmConfig) -> "Guidance | None":
    """The processor of the engine with this config, or None where vLLM was started without it."""
    guidance = _newest() if _newest is not None else None
    return guidance if guidance is not None and guidance.vllm_config is vllm_config else None


class Guidance(LogitsProcessor):
    """Keeps the guidance schedule of every request, in row order.

    vLLM loads it by `--logits-processors autoregressive.serving.vllm_guidance:Guidance`.
    """

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raise ValueError with one line (HTTP 400) for what a request may not ask for."""
        parse_guidance(sampling_params.extra_args)
        if sampling_params.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs is not supported: guidance has a scale per image")

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        global _newest
        config = gpt_config(vllm_config.model_config.hf_config)
        rows = vllm_config.scheduler_config.max_num_seqs
        self.vllm_config = vllm_config
        self.condition, self.num_codes = config.condition, config.num_codes
        # row: (scale at each code, codes in the prompt, codes drawn so far: vLLM's own list)
        self.requests: dict[int, tuple[list[float], int, list[int]]] = {}
        self.host = torch.ones(rows, 1, pin_memory=is_pin_memory)
        self.device = self.host if device.type == "cpu" else torch.ones(rows, 1, device=device)
        _newest = weakref.ref(self)

    def is_argmax_invariant(self) -> bool:
        """The logits stay as they are."""
        return True

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits as they are: the model has guided its hidden states."""
        return logits

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the requests to their rows, then note each one's scale at its next code."""
        if batch_update is not None:
            self._follow(batch_update)
        elif all(min(scales) == max(scales) for scales, _, _ in self.requests.values()):
            return
        for row, (scales, num_known, drawn) in self.requests.items():
            self.host[row] = scales[min(num_known + len(drawn), self.num_codes - 1)]
        if self.device is not self.host:
            self.device.copy_(self.host, non_blocking=True)

    def _follow(self, update: BatchUpdate) -> None:
        for row in update.removed:
            self.requests.pop(row, None)
        for row, params, prompt, drawn in update.added:
            scales = guidance_scales(params.extra_args, self.condition, self.num_codes)
            # A class model's prompt is the class, then the codes that the client knows.
            num_known = len(prompt or ()) - 1 if self.condition == "class" else 0
            self.requests[row] = (scales, max(0, num_known), drawn)
        for source, target, direction in update.moved:
            moved, other = self.requests.pop(source, None), self.requests.pop(target, None)
            if moved is not None:
                self.requests[target] = moved
            if other is not None and direction == MoveDirectionality.SWAP:
                self.requests[source] = other

    def scales(self, rows: int) -> torch.Tensor:
        """The scales of the first rows of the batch, (rows, 1) float32."""
        return self.device[:rows]


class GuidanceInPrompt(LogitsProcessor):
    """Refuses scales for a model whose prompt holds the strength of guidance (one stream)."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raise ValueError with one line (HTTP 400) for any field of guidance."""
        given = [key for key in sampling_params.extra_args or {} if key.startswith("cfg_")]
        if given:
            raise ValueError(f"{', '.join(given)}: this model takes guidance in its prompt")

    def __init__(self, *_: object) -> None:
        """Takes nothing from vLLM's configuration."""

    def is_argmax_invariant(self) -> bool:
        """The logits stay as they are."""
        return True

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits as they are."""
        return logits

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Nothing is kept per request."""
