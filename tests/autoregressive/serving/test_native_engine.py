"""Continuous batching behind the HTTP server."""

import json

import pytest
from helpers.models import tiny, write_models

pytest.importorskip("fastapi", reason="the HTTP server is an extra")
import httpx
from helpers.http_server import native_engine, running

from autoregressive import ImagePipeline

IMAGES = "/v1/images/generations"


def test_a_request_joins_what_is_being_sampled(tmp_path):
    paths = write_models(tmp_path, tiny(vocab_size=50, grid=(16, 16)))
    pipeline = ImagePipeline.from_pretrained(*paths).prepare("fp32", device="cpu", verbose=False)
    engine, taken = native_engine(pipeline), []
    step = engine._batch.step
    engine._batch.step = lambda: (taken.append(1), step())
    first = {"prompt": "1", "seed": 1, "stream": True, "partial_images": 15}
    second = {"prompt": "2", "seed": 2}
    with running(engine) as found, httpx.Client(base_url=found.url, timeout=60) as client:
        with client.stream("POST", IMAGES, json=first) as answer:
            lines = answer.iter_lines()
            next(lines)  # its first row is there
            joined = httpx.post(f"{found.url}{IMAGES}", json=second, timeout=60).json()
            whole = [json.loads(line[6:]) for line in lines if line[:5] == "data:"][-1]
        assert 256 < len(taken) < 2 * 255
        alone = client.post(IMAGES, json=second).json()
        assert joined["data"] == alone["data"]
        usual = client.post(IMAGES, json={"prompt": "1", "seed": 1}).json()
        assert whole["b64_json"] == usual["data"][0]["b64_json"]
