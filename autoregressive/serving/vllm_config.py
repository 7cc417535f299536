"""The config class of an exported GPT, as transformers and vLLM read it from config.json."""

from transformers import PretrainedConfig


class LlamaGenConfig(PretrainedConfig):
    """vLLM's own fields, and GPTConfig's under `gpt`; sent to vLLM's other processes by pickle."""

    model_type = "llamagen"
