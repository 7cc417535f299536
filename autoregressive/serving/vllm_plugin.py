"""The entry point that vLLM calls in each of its processes (group `vllm.general_plugins`)."""

# vLLM has its own environment: pyright does not see it.
# pyright: reportMissingImports=false

from typing import Any

from autoregressive.models.config import GPTConfig

ARCHITECTURES = {"class": "LlamaGenClassModel", "text": "LlamaGenTextModel"}  # by condition
ONE_STREAM = "LlamaGenOneStreamModel"  # takes guidance as an input, whatever the condition
MODEL_TYPE = "llamagen"  # as in LlamaGenConfig, which needs transformers


def register() -> None:
    """Register the config and both model classes; safe to call more than once."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from autoregressive.serving.vllm_config import LlamaGenConfig

    AutoConfig.register(MODEL_TYPE, LlamaGenConfig, exist_ok=True)
    supported = ModelRegistry.get_supported_archs()
    for name in (*ARCHITECTURES.values(), ONE_STREAM):
        if name not in supported:
            # By name: vLLM imports the module only in the processes that run the model.
            ModelRegistry.register_model(name, f"autoregressive.serving.vllm_model:{name}")


def gpt_config(hf_config: Any) -> GPTConfig:  # noqa: ANN401 - a transformers config
    """The GPT's own configuration, from the config.json that vLLM has read."""
    fields = dict(hf_config.gpt)
    return GPTConfig(**{**fields, "grid": tuple(fields["grid"])})
