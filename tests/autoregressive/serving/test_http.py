"""The HTTP API in front of the native engine: what clients get, and what they cannot break."""

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers.models import tiny, write_models

pytest.importorskip("fastapi", reason="the HTTP server is an extra")
import httpx
import openai
from helpers.http_server import native_engine, pixels_of, running, wait_until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoregressive import ImagePipeline
from autoregressive.inference.sampling_config import SamplingConfig
from autoregressive.serving.http.image_engine import EngineStoppingError, ImageProgress
from autoregressive.serving.http.images_api import ImagesRequest, parse_request
from autoregressive.serving.http.limits import LimitsConfig

IMAGES = "/v1/images/generations"
NAMES = ("tench", "goldfish", "great white shark", "hen", "ostrich")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> ImagePipeline:
    paths = write_models(tmp_path_factory.mktemp("models"), tiny(vocab_size=50))
    return ImagePipeline.from_pretrained(*paths).prepare("bf16", device="cpu", verbose=False)


@pytest.fixture(scope="module")
def server(pipeline):
    with running(native_engine(pipeline), class_names=NAMES) as found:
        yield found


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def expected(pipeline: ImagePipeline, label: int, seed: int, **sampling) -> np.ndarray:
    """The first image of a seed, sampled as the server does: in a batch of four."""
    codes = pipeline.sample(
        torch.full((4,), label), SamplingConfig(seed=seed, **sampling), torch.zeros(4).long()
    )
    return pipeline.decode(codes[:1]).numpy()[0]


# What clients get


def test_the_official_client_gets_the_images_of_its_seed(server, pipeline):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    assert [model.id for model in client.models.list()] == ["llamagen"]
    extra = {"seed": 5, "cfg_scale": 3.0, "top_k": 20, "temperature": 0.9}
    response = client.images.generate(
        model="llamagen", prompt="3", n=2, size="8x8", extra_body=extra
    )
    images = [pixels_of(image.b64_json) for image in response.data]
    first = expected(pipeline, 3, 5, cfg_scale=3.0, top_k=20, temperature=0.9)
    assert np.array_equal(images[0], first)
    assert not np.array_equal(images[0], images[1])
    assert response.usage.output_tokens == 32


def test_the_official_client_sees_the_image_grow_in_order(server, pipeline):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    stream = client.images.generate(
        prompt="goldfish", stream=True, partial_images=3, extra_body={"seed": 7}
    )
    *partial, last = list(stream)
    assert [event.partial_image_index for event in partial] == [0, 1, 2]
    assert {event.type for event in partial} == {"image_generation.partial_image"}
    assert last.type == "image_generation.completed"
    whole = client.images.generate(prompt="1", extra_body={"seed": 7}).data[0].b64_json
    assert last.b64_json == whole
    for event in partial:
        pixels, rows = pixels_of(event.b64_json), 2 * event.rows
        assert pixels.shape == (8, 8, 3)
        assert (pixels[rows:] == 127).all()
        assert not (pixels[:rows] == 127).all()


def test_every_image_of_a_stream_has_its_number(http):
    body = {"class_index": 2, "n": 3, "stream": True, "partial_images": 1, "seed": 1}
    answer = http.post(IMAGES, json=body)
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line[:5] == "data:"]
    final = {e["image_index"]: e["b64_json"] for e in events if e["type"].endswith("completed")}
    whole = http.post(IMAGES, json={"class_index": 2, "n": 3, "seed": 1}).json()
    assert [final[i] for i in range(3)] == [image["b64_json"] for image in whole["data"]]
    assert len(events) == 6


def test_without_a_seed_images_differ_and_the_answer_names_the_seed(http):
    one, two = (http.post(IMAGES, json={"prompt": "1"}).json() for _ in range(2))
    assert one["seed"] != two["seed"]
    again = http.post(IMAGES, json={"prompt": "1", "seed": one["seed"]}).json()
    assert again["data"] == one["data"]


@pytest.mark.slow
def test_of_200_requests_by_32_clients_none_is_lost_and_none_mixed_up(server, http):
    bodies = [
        {"class_index": i % 5, "seed": i, "cfg_scale": (2.0, 3.5)[i % 3 == 0]} for i in range(200)
    ]

    def ask(body):
        return http_of_thread().post(IMAGES, json=body).json()["data"][0]["b64_json"]

    local = threading.local()

    def http_of_thread():
        if not hasattr(local, "client"):
            local.client = httpx.Client(base_url=server.url, timeout=120)
        return local.client

    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(ask, bodies))
    assert len(set(together)) == 200
    alone = [http.post(IMAGES, json=body).json()["data"][0]["b64_json"] for body in bodies[::8]]
    assert together[::8] == alone
    assert server.service.pending == 0
    metrics = http.get("/metrics").text
    assert "llamagen_pending 0.0" in metrics
    assert float(metrics.split("\nllamagen_codes_total ")[1].split()[0]) >= 200 * 16


@pytest.mark.slow
def test_captions_of_any_length_get_the_image_that_they_get_alone(tmp_path, tiny_t5):
    gpt = tiny(vocab_size=50, condition="text", text_dim=32, max_text_tokens=8)
    pipeline = ImagePipeline.from_pretrained(*write_models(tmp_path, gpt))
    pipeline.prepare("bf16", device="cpu", verbose=False)
    long = "a red cat and the blue dog run on a mat in the sun"
    bodies = [
        {"prompt": prompt, "seed": seed, **more}
        for seed, prompt in enumerate(["a cat", "the blue dog run", long, long])
        for more in ({}, {"negative_prompt": "a dog"}, {"negative_prompt": long})
    ]
    with running(native_engine(pipeline, t5=str(tiny_t5))) as found:
        client = httpx.Client(base_url=found.url, timeout=60)
        with ThreadPoolExecutor(12) as pool:
            together = list(pool.map(lambda body: client.post(IMAGES, json=body).json(), bodies))
        alone = [client.post(IMAGES, json=body).json() for body in bodies]
        assert [t["data"] for t in together] == [a["data"] for a in alone]
        assert len({t["data"][0]["b64_json"] for t in together}) == 12
        refused = client.post(IMAGES, json={"class_index": 1})
        assert "needs a class model" in refused.json()["error"]["message"]


def test_a_model_with_guidance_as_an_input_takes_its_strength_and_one_row_per_image(tmp_path):
    gpt = tiny(vocab_size=50, guidance_input=True)
    torch.nn.init.normal_(gpt.t_embedder.mlp[2].weight)  # zero in a new model
    paths = write_models(tmp_path, gpt)
    pipeline = ImagePipeline.from_pretrained(*paths).prepare("fp32", device="cpu", verbose=False)
    rows = set()
    pipeline.engine.blocks[0].register_forward_pre_hook(lambda _, inputs: rows.add(len(inputs[0])))
    with running(native_engine(pipeline)) as found:
        client = httpx.Client(base_url=found.url, timeout=60)
        half = client.post(IMAGES, json={"prompt": "3", "seed": 5, "guidance": 0.5}).json()
        wanted = expected(pipeline, 3, 5, guidance=0.5)
        assert np.array_equal(pixels_of(half["data"][0]["b64_json"]), wanted)
        assert rows == {4}  # the batch of four: no second row of an image
        usual = client.post(IMAGES, json={"prompt": "3", "seed": 5}).json()
        assert usual["data"] != half["data"]
        refused(client.post(IMAGES, json={"prompt": "3", "cfg_scale": 2.0}), 400, "use guidance")
        refused(client.post(IMAGES, json={"prompt": "3", "guidance": 1.5}), 400, "guidance: ")


# What is refused


def refused(answer, status: int, message: str) -> None:
    assert answer.status_code == status
    text = answer.json()["error"]["message"]
    assert message in text
    assert "\n" not in text
    assert len(text) <= 300


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "give a class, either as prompt or as class_index"),
        ({"prompt": "1", "class_index": 1}, "give a class, either"),
        ({"class_index": 5}, "class in 0 .. 4 or a class name"),
        ({"prompt": "whale"}, "class in 0 .. 4"),
        ({"prompt": "1", "n": 11}, "n is 11, must be at most 10"),
        ({"prompt": "1", "n": 0}, "n: "),
        ({"prompt": "1", "n": True}, "n: "),
        ({"prompt": "1", "cfg_scale": 0.5}, "cfg_scale: "),
        ({"prompt": "1", "guidance": 0.5}, "guidance: this model does not take it"),
        ({"prompt": "1", "seed": -1}, "seed: "),
        ({"prompt": "1", "seed": 2**63}, "seed: "),
        ({"prompt": "1", "size": "1024x1024"}, "size must be 8x8"),
        ({"prompt": "1", "response_format": "url"}, "response_format: "),
        ({"prompt": "1", "image": "file:///etc/passwd"}, "image: "),
        ({"prompt": "1", "negative_prompt": "x"}, "needs a text model"),
        ({"prompt": "1", "partial_images": 2}, "needs stream"),
        ({"prompt": "1", "partial_images": 4, "stream": True}, "must be at most 3"),
        ({"prompt": "x" * 5000}, "prompt: "),
    ],
)
def test_a_wrong_field_is_refused_in_one_line_that_names_it(http, body, message):
    refused(http.post(IMAGES, json=body), 400, message)


def test_another_model_path_or_method_has_its_own_status(http):
    refused(http.post(IMAGES, json={"prompt": "1", "model": "dall-e-3"}), 404, "llamagen only")
    refused(http.get("/v1/nothing"), 404, "Not Found")
    refused(http.get("/openapi.json"), 404, "Not Found")  # open without a key otherwise
    refused(http.get(IMAGES), 405, "Method Not Allowed")


def test_a_large_body_is_not_read(http):
    refused(http.post(IMAGES, content=b" " * 100_000), 413, "larger than 65536 bytes")

    def chunks():
        for _ in range(20):
            yield b" " * 8192

    refused(http.post(IMAGES, content=chunks()), 413, "larger than 65536 bytes")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = st.sampled_from(sorted(ImagesRequest.model_fields))


def is_valid(body: bytes) -> bool:
    try:
        parse_request(body)
    except ValueError:
        return False
    return True


@pytest.mark.slow
@settings(
    max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
@given(
    st.binary(max_size=60)
    | JSON.map(lambda value: json.dumps(value).encode())
    | st.dictionaries(FIELDS, JSON, min_size=1).map(lambda value: json.dumps(value).encode())
)
def test_a_malformed_body_gets_4xx_with_one_line_and_the_server_lives(http, body):
    answer = http.post(IMAGES, content=body)
    if is_valid(body) and answer.status_code == 200:
        return
    assert 400 <= answer.status_code < 500
    refused(answer, answer.status_code, "")
    assert answer.json()["error"]["message"]


def test_with_a_key_only_health_is_open(pipeline):
    with running(native_engine(pipeline), api_key="sécret") as found:
        client = httpx.Client(base_url=found.url, timeout=60)
        assert client.get("/health").json() == {"status": "ok"}
        for wrong in ({}, {"Authorization": "Bearer other"}):
            refused(client.post(IMAGES, json={"prompt": "1"}, headers=wrong), 401, "API key")
            refused(client.get("/v1/models", headers=wrong), 401, "API key")
            refused(client.get("/metrics", headers=wrong), 401, "API key")
        right = {"Authorization": "Bearer sécret".encode()}
        assert client.post(IMAGES, json={"prompt": "1"}, headers=right).status_code == 200


# Load, and its end


class SteeredEngine:
    """An engine whose images are finished when a test says so; the first task runs, others wait."""

    negative_prompts = True

    def __init__(self, pipeline: ImagePipeline) -> None:
        self.gpt, self.image_size = pipeline.gpt.config, pipeline.image_size
        self.begun, self.given_up, self.fail, self.draining = 0, 0, False, False

    async def start(self):
        self.go, self.stopping = asyncio.Event(), asyncio.Event()
        self.loop = asyncio.get_running_loop()

    async def images(self, tasks):
        waits, self.begun = self.begun > 0, self.begun + 1
        finished = 0
        try:
            yield ImageProgress(0, 2, np.zeros((8, 8, 3), np.uint8))
            go, stop = (asyncio.ensure_future(e.wait()) for e in (self.go, self.stopping))
            await asyncio.wait({go, stop} if waits else {go}, return_when="FIRST_COMPLETED")
            if not go.done():
                raise EngineStoppingError
            if self.fail:
                raise RuntimeError("out of memory")
            for index in range(len(tasks)):
                finished += 1
                yield ImageProgress(index, 4, np.zeros((8, 8, 3), np.uint8))
        finally:
            self.given_up += finished < len(tasks)

    def drain(self):
        self.stopping.set()

    async def stop(self):
        pass

    def release(self):
        self.loop.call_soon_threadsafe(self.go.set)


@pytest.fixture
def steered(pipeline):
    engine = SteeredEngine(pipeline)
    with running(engine, LimitsConfig(queue=3)) as found, ThreadPoolExecutor(4) as pool:

        def ask(**body):
            return pool.submit(
                httpx.post, f"{found.url}{IMAGES}", json={"prompt": "1", **body}, timeout=60
            )

        yield engine, found, ask
        engine.release()


def test_a_full_queue_is_refused_with_429_and_empties(steered):
    engine, found, ask = steered
    first = ask(n=2)
    wait_until(lambda: found.service.pending == 2)
    answer = ask(n=2).result()
    refused(answer, 429, "more than 3 images would wait")
    assert answer.headers["retry-after"] == "1"
    engine.release()
    assert len(first.result().json()["data"]) == 2
    assert ask(n=3).result().status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_slot(steered, stream):
    engine, found, _ = steered
    body = {"prompt": "1", "n": 3, "stream": stream, "partial_images": int(stream)}
    client = httpx.Client(base_url=found.url)
    if stream:
        with client.stream("POST", IMAGES, json=body) as answer:
            next(answer.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            client.post(IMAGES, json=body, timeout=0.3)
    client.close()
    wait_until(lambda: found.service.pending == 0)
    assert engine.given_up == 1


def test_what_fails_in_the_engine_is_a_500_and_the_server_lives(steered):
    engine, _, ask = steered
    engine.fail = True
    engine.release()
    refused(ask().result(), 500, "the server failed")
    engine.fail = False
    assert ask().result().status_code == 200


def test_sigterm_finishes_what_runs_and_refuses_the_rest(steered):
    engine, found, ask = steered
    runs, waits = ask(), None
    wait_until(lambda: engine.begun == 1)
    waits = ask()
    wait_until(lambda: engine.begun == 2)
    found.server.handle_exit(15, None)
    refused(waits.result(), 503, "being stopped")
    refused(ask().result(), 503, "being stopped")
    assert httpx.get(f"{found.url}/health").status_code == 503
    engine.release()
    assert runs.result().status_code == 200
    wait_until(lambda: not found.server.started or found.server.should_exit)


def test_a_request_has_a_time_limit(pipeline):
    engine = SteeredEngine(pipeline)
    with running(engine, LimitsConfig(seconds=0.2)) as found:
        refused(httpx.post(f"{found.url}{IMAGES}", json={"prompt": "1"}), 504, "longer than 0.2 s")
        stream = {"prompt": "1", "stream": True, "partial_images": 1}
        answer = httpx.post(f"{found.url}{IMAGES}", json=stream)
        assert "event: error" in answer.text
        assert found.service.pending == 0
