"""Guidance in vLLM's V2 model runner, its default on CUDA.

NOT RUN YET: written from vLLM 0.32's source, on a machine without a GPU. The environment variable
VLLM_USE_V2_MODEL_RUNNER=0 switches back to the V1 runner, whose path (vllm_guidance.py) is tested.

The V2 runner lets a model bring its own state. It sees each request once, with its slot, and at
each step the slots of the batch. Caption places are set here too: after a preemption the runner's
M-RoPE hook gets the caption and the codes drawn so far, and could not tell them apart.
"""

# vLLM has its own environment: pyright does not see it.
# pyright: reportMissingImports=false

import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.buffer_utils import UvaBackedTensor
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcessor
from vllm.v1.worker.gpu.states import RequestState

from autoregressive.serving.guidance import guidance_scales
from autoregressive.serving.vllm_guidance import Guidance
from autoregressive.serving.vllm_plugin import gpt_config


class GuidanceParameters(LogitsProcessor):
    """Refuses wrong guidance with HTTP 400; GuidanceState applies it.

    vLLM loads it by `--logits-processors autoregressive.serving.vllm_state:GuidanceParameters`.
    """

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raise ValueError with one line for what a request may not ask for."""
        Guidance.validate_params(sampling_params)

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        """Return the logits as they are: the model has guided its hidden states."""
        return logits


class GuidanceState(DefaultModelState):
    """The guidance schedule and the caption's first place of every slot."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        model: torch.nn.Module,
        encoder_cache: object,
        device: torch.device,
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self.config = gpt_config(vllm_config.model_config.hf_config)
        slots = self.max_num_reqs
        self.schedules = UvaBackedTensor((slots, self.config.num_codes), dtype=torch.float32)
        self.first_places = UvaBackedTensor(slots, dtype=torch.int64)
        # CUDA graphs read positions at the address where they were captured.
        self.places = torch.zeros(self.max_num_tokens, dtype=torch.int64, device=device)
        self.ones = torch.ones(slots, 1, device=device)
        self.step_scales = self.ones
        model.guidance = self

    def scales(self, rows: int) -> torch.Tensor:
        """The scales of this step's rows, (rows, 1) float32; ones in the runner's dummy steps."""
        return self.step_scales if len(self.step_scales) == rows else self.ones[:rows]

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """Note a request's schedule and, for a text model, where its caption begins."""
        super().add_request(req_index, new_req_data)
        arguments = new_req_data.sampling_params.extra_args
        self.schedules.np[req_index] = guidance_scales(
            arguments, self.config.condition, self.config.num_codes
        )
        caption = new_req_data.prompt_embeds
        first = 0 if caption is None else max(0, self.config.num_condition - len(caption))
        self.first_places.np[req_index] = first

    def apply_staged_writes(self) -> None:
        """Show the device what add_request noted."""
        super().apply_staged_writes()
        self.schedules.copy_to_uva()
        self.first_places.copy_to_uva()

    def prepare_inputs(
        self, input_batch: InputBatch, req_states: RequestState
    ) -> dict[str, torch.Tensor | None]:
        """Positions of this step's tokens, and the scale of each row that draws a code."""
        lengths = input_batch.query_start_loc[: input_batch.num_reqs + 1].diff()
        first = self.first_places.gpu[input_batch.idx_mapping].repeat_interleave(
            lengths, output_size=input_batch.num_tokens
        )
        self.places.zero_()
        self.places[: len(first)] = input_batch.positions[: len(first)] + first
        # Runs outside the graph, as compute_logits does: a new tensor is fine.
        code = self.places[input_batch.logits_indices] - (self.config.num_condition - 1)
        code = code.clamp(0, self.config.num_codes - 1)
        self.step_scales = self.schedules.gpu[input_batch.expanded_idx_mapping, code][:, None]
        return {"positions": self.places[: input_batch.num_tokens_after_padding]}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, object]:
        """The same addresses, for warm-up and capture."""
        inputs = super().prepare_dummy_inputs(num_reqs, num_tokens)
        self.step_scales = self.ones
        return {**inputs, "positions": self.places[:num_tokens]}
