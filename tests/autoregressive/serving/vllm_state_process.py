"""Calls the V2 runner's adapter on CPU with a stand-in batch, and prints what it computes as JSON.

Not a test: a test starts it in vLLM's environment. It shows the adapter's arithmetic, not that the
V2 runner works with it, which needs a GPU.
"""

import json
from types import SimpleNamespace

import torch

from autoregressive.models.config import GPTConfig
from autoregressive.serving.vllm_state import GuidanceState

SHAPE = {"condition": "text", "max_text_tokens": 6, "text_dim": 8, "grid": (2, 2)}


def buffer(*size: int, dtype: torch.dtype) -> SimpleNamespace:
    """Stands for a UvaBackedTensor, which needs pinned memory."""
    values = torch.zeros(size, dtype=dtype)
    return SimpleNamespace(np=values.numpy(), gpu=values, copy_to_uva=lambda: values)


def main() -> None:
    state = GuidanceState.__new__(GuidanceState)  # without a GPU its base class cannot be made
    state.config = GPTConfig(**SHAPE)
    state.rope_state = state.prompt_embeds_state = None
    state.schedules = buffer(4, 4, dtype=torch.float32)
    state.first_places = buffer(4, dtype=torch.int64)
    state.places = torch.full((12,), -1)
    state.ones = state.step_scales = torch.ones(4, 1)
    for slot, length, settings in [
        (2, 3, {"cfg_scale": 5.0, "cfg_schedule": "linear"}),
        (0, 6, {}),
    ]:
        parameters = SimpleNamespace(extra_args=settings)
        caption = torch.zeros(length, 8)
        data = SimpleNamespace(sampling_params=parameters, prompt_embeds=caption)
        state.add_request(slot, data)
    state.apply_staged_writes()
    # Row 0: slot 2 has drawn two codes and reads its second one. Row 1: slot 0's whole caption.
    slots = torch.tensor([2, 0])
    batch = SimpleNamespace(
        num_reqs=2,
        num_tokens=7,
        num_tokens_after_padding=8,
        idx_mapping=slots,
        expanded_idx_mapping=slots,
        query_start_loc=torch.tensor([0, 1, 7], dtype=torch.int32),
        positions=torch.tensor([4, 0, 1, 2, 3, 4, 5, 0]),
        logits_indices=torch.tensor([0, 6]),
    )
    positions = state.prepare_inputs(batch, None)["positions"]
    print("RESULT", json.dumps([positions.tolist(), state.scales(2).tolist()]))
    print("DUMMY", json.dumps(state.scales(3).tolist()))


if __name__ == "__main__":
    main()
