"""The configuration of autoregressive.serve."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from autoregressive.sampling.config import ConditionConfig, PipelineConfig
from autoregressive.serving.http.limits import LimitsConfig

LARGEST_PORT = 65535


@dataclass(frozen=True, kw_only=True)
class ServeConfig(PipelineConfig):
    """Settings of autoregressive.serve.

    Args:
        engine: native samples in this process; vllm with vLLM's AsyncLLM, which must be installed
            and takes compute.precision fp32 or bf16 only.
        vllm_options: Further arguments of vLLM's AsyncEngineArgs, e.g. tensor_parallel_size.
        batch_size: Images that the native engine samples together. Every step has this size, even
            for one image, so that an image is the same bit for bit whatever else runs.
        text_encoder: The text encoder of a text model: a T5's folder or Hub id, or wordllama.
        class_names: Text file with the name of a class on each line, which prompts may use; null
            for class numbers only.
        limits: What is refused.
        name: The model's name in the API.
        host: Address to listen on. 127.0.0.1: this machine only; 0.0.0.0: every network.
        port: Port to listen on.
        api_key: Key that clients must send as a bearer token; null for none. The page has no key,
            so that it is not served with one.
        page: Serve the page at /, if gradio is installed.
    """

    engine: Literal["native", "vllm"] = "native"
    vllm_options: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 8
    text_encoder: str = ConditionConfig.text_encoder
    class_names: Path | None = None
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    name: str = "llamagen"
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    page: bool = True

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError("batch_size must be >= 1")
        if not 1 <= self.port <= LARGEST_PORT:
            raise ValueError(f"port is {self.port}, must be in 1 .. {LARGEST_PORT}")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ValueError("api_key: a header carries printable ASCII characters only")
        if self.api_key is not None and not self.api_key.strip():
            raise ValueError("api_key is empty; null for no key")
        if self.vllm_options and self.engine != "vllm":
            raise ValueError("vllm_options needs engine: vllm")
        if self.engine == "vllm" and self.compute.precision not in ("fp32", "bf16"):
            raise ValueError("compute.precision must be fp32 or bf16 with engine: vllm")
