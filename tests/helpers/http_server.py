"""A server of images in a thread, with a tiny model or with an engine that a test steers."""

import base64
import contextlib
import io
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import uvicorn
from PIL import Image

from autoregressive import ImagePipeline
from autoregressive.sampling.conditions import prompt_encoder
from autoregressive.serving.http.app import DrainingServer, build_app
from autoregressive.serving.http.image_engine import ImageEngine
from autoregressive.serving.http.limits import LimitsConfig
from autoregressive.serving.http.native_engine import NativeEngine
from autoregressive.serving.http.service import ImageService


class Running(NamedTuple):
    url: str
    service: ImageService
    server: DrainingServer


def native_engine(pipeline: ImagePipeline, batch_size: int = 4, t5: str = "") -> NativeEngine:
    encode = prompt_encoder(pipeline.gpt.config, t5, pipeline.engine.device)
    return NativeEngine(pipeline.engine, pipeline.vq, encode, batch_size)


@contextlib.contextmanager
def running(
    engine: ImageEngine,
    limits: LimitsConfig | None = None,
    api_key: str | None = None,
    extend=None,
    **more,
) -> Iterator[Running]:
    """Serve in a thread on a free port until the block ends; `extend` may add to the app."""
    service = ImageService(engine, limits or LimitsConfig(), **more)
    app = build_app(service, api_key)
    if extend:
        extend(app, service)
    config = uvicorn.Config(app, port=0, log_level="critical")
    server = DrainingServer(config, service)
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started or not thread.is_alive())
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Running(f"http://127.0.0.1:{port}", service, server)
    finally:
        server.should_exit = True
        thread.join(60)


def wait_until(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def pixels_of(b64_json: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64_json))))
