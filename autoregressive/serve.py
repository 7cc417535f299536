"""Serve images over HTTP: an API in OpenAI's shape, and a page at /.

    python -m autoregressive.serve --gpt runs/demo/gpt --tokenizer runs/demo/tokenizer
    curl http://127.0.0.1:8000/v1/images/generations -d '{"prompt": "7", "seed": 0}'

Needs fastapi, uvicorn and prometheus-client; the page needs gradio (requirements-extra.txt).
"""

import contextlib
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from autoregressive.sampling.conditions import ConditionConfig, prompt_encoder
from autoregressive.sampling.pipeline import ImagePipeline
from autoregressive.sampling.pipeline_config import PipelineConfig
from autoregressive.serving.export import export_vllm
from autoregressive.serving.http.image_engine import ImageEngine
from autoregressive.serving.http.limits import LimitsConfig
from autoregressive.serving.http.native_engine import NativeEngine
from autoregressive.serving.http.vllm_engine import VLLMEngine
from core.config import InputError, parse_config, run_command
from core.distributed.world import choose_device, dtype_of
from core.files import check_regular_file

if TYPE_CHECKING:
    from fastapi import FastAPI

    from autoregressive.serving.http.service import ImageService


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
        text_encoder: The T5 of a text model: a folder or a Hub id.
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


def serve(config: ServeConfig) -> None:
    """Load the models and serve until SIGTERM or SIGINT."""
    try:
        import uvicorn

        from autoregressive.serving.http.app import DrainingServer, build_app
        from autoregressive.serving.http.service import ImageService
    except ModuleNotFoundError as error:
        needed = "pip install -r requirements-extra.txt"
        raise InputError(f"{error.name} is not installed; serving needs it: {needed}") from error

    names = read_class_names(config.class_names)
    check_address(config.host, config.port)
    pipeline = config.load_pipeline()
    if pipeline.gpt.config.condition == "none":
        raise InputError(f"{config.gpt}: unconditional; the server draws classes or prompts")
    if names and len(names) != pipeline.gpt.config.num_classes:
        count = pipeline.gpt.config.num_classes
        raise InputError(f"{config.class_names}: {len(names)} names, the model has {count} classes")
    with open_engine(config, pipeline) as engine:
        service = ImageService(engine, config.limits, config.name, names)
        app = build_app(service, config.api_key)
        address = f"http://{config.host}:{config.port}"
        if add_page(config, app, service, f"{address}/v1/images/generations"):
            print(f"page at {address}/", flush=True)
        server_config = uvicorn.Config(app, config.host, config.port, log_level="warning")
        print(f"serving at {address}/v1/images/generations", flush=True)
        DrainingServer(server_config, service).run()


def add_page(config: ServeConfig, app: "FastAPI", service: "ImageService", address: str) -> bool:
    """Mount the page if it is asked for and can be -> whether it is; says why it is not."""
    if not config.page:
        return False
    if config.api_key:
        print("no page: it asks for no key", flush=True)
        return False
    try:
        from autoregressive.serving.http.page import mount_page
    except ModuleNotFoundError as error:
        print(f"no page: {error.name} is not installed (requirements-extra.txt)", flush=True)
        return False
    mount_page(app, service, address)
    return True


@contextlib.contextmanager
def open_engine(config: ServeConfig, pipeline: ImagePipeline) -> Iterator[ImageEngine]:
    """The engine that the configuration asks for, ready to start."""
    gpt, device = pipeline.gpt.config, choose_device(config.compute.device)
    encode = prompt_encoder(gpt, config.text_encoder, device)
    if config.engine == "native":
        pipeline.prepare(**config.compute.arguments(), device=device)
        yield NativeEngine(pipeline.engine, pipeline.vq, encode, config.batch_size)
        return
    with tempfile.TemporaryDirectory(prefix="llamagen-vllm-") as folder:
        exported = Path(folder) / "model"
        export_vllm(pipeline.gpt, exported)
        vq = pipeline.vq.for_inference(device, dtype_of(config.compute.tokenizer_precision), False)
        dtype = {"fp32": "float32", "bf16": "bfloat16"}[config.compute.precision]
        yield VLLMEngine(
            pipeline.gpt, vq, encode, exported, {"dtype": dtype, **config.vllm_options}
        )


def read_class_names(path: Path | None) -> list[str]:
    """The names in a file, one per line; none without a file. Raises InputError."""
    if path is None:
        return []
    try:
        check_regular_file(path)
        return [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, InputError, UnicodeDecodeError) as error:
        raise InputError(f"class_names: {path} cannot be read ({error})") from error


def check_address(host: str, port: int) -> None:
    """Raise InputError unless a server can listen there: models take minutes to load."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except (OSError, UnicodeError) as error:
        raise InputError(
            f"host {host}, port {port}: cannot listen there ({error}); choose another"
        ) from error


def main() -> None:
    """Entry point."""
    serve(parse_config(ServeConfig))


if __name__ == "__main__":
    run_command(main)
