"""autoregressive.serve as a process: with our engine, and with vLLM in its own environment."""

import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import environment
from helpers.models import tiny, write_models
from helpers.paths import ROOT
from vllm_job import MARKS, PYTHON

pytest.importorskip("fastapi", reason="the HTTP server is an extra")
import httpx
import openai
from helpers.http_server import pixels_of, wait_until

from autoregressive import ImagePipeline
from autoregressive.inference.sampling_config import SamplingConfig
from autoregressive.sampling.conditions import prompt_encoder
from autoregressive.serve import ServeConfig, read_class_names, serve
from core.config import InputError

IMAGES = "/v1/images/generations"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def served(paths: tuple[Path, Path], log: Path, *flags: str, python=sys.executable, seconds=60):
    """The command on a free port, once it is healthy -> its process and address."""
    port = free_port()
    line = [str(python), "-m", "autoregressive.serve", "--gpt", paths[0], "--tokenizer", paths[1]]
    line += ["--port", str(port), "--compute.device", "cpu", "--compute.precision", "fp32", *flags]
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as out:
        process = subprocess.Popen(line, cwd=ROOT, env=environment(), stdout=out, stderr=out)

    def healthy() -> bool:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            return httpx.get(f"{url}/health").status_code == 200
        except httpx.TransportError:
            return False

    try:
        wait_until(healthy, seconds)
        yield process, url
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


@pytest.mark.slow
def test_sigterm_under_load_answers_every_request_and_ends_well(tmp_path):
    paths = write_models(tmp_path, tiny(vocab_size=50))
    log = tmp_path / "log"
    with served(paths, log) as (process, url), ThreadPoolExecutor(24) as pool:
        sent = [
            pool.submit(
                httpx.post, url + IMAGES, json={"prompt": "1", "seed": i, "n": 8}, timeout=60
            )
            for i in range(24)
        ]
        wait_until(lambda: sum(one.done() for one in sent) >= 2)
        process.send_signal(signal.SIGTERM)
        statuses = []
        for one in sent:
            try:
                statuses.append(one.result().status_code)
            except httpx.ConnectError:  # it came after the end
                statuses.append(0)
        assert set(statuses) <= {0, 200, 503}
        assert {200, 503} <= set(statuses)
        assert process.wait(30) == 0
    assert "Traceback" not in log.read_text()


def test_wrong_settings_are_refused_before_a_model_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="batch_size must be >= 1"):
        ServeConfig(gpt="a", tokenizer="b", batch_size=0)
    with pytest.raises(ValueError, match="needs engine: vllm"):
        ServeConfig(gpt="a", tokenizer="b", vllm_options={"max_num_seqs": 2})
    with pytest.raises(InputError, match=r"class_names: .*names\.txt cannot"):
        read_class_names(tmp_path / "names.txt")
    paths = write_models(tmp_path, tiny(vocab_size=50))
    (tmp_path / "names.txt").write_text("tench\n")
    config = {"gpt": str(paths[0]), "tokenizer": str(paths[1]), "port": free_port()}
    with pytest.raises(InputError, match="1 names, the model has 5 classes"):
        serve(ServeConfig(**config, class_names=tmp_path / "names.txt"))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=r"class_names: .*pipe or device"):
        read_class_names(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"port": 0}, "port is 0"),
        ({"port": 65536}, "port is 65536"),
        ({"port": -1}, "port is -1"),
        ({"api_key": " "}, "api_key is empty"),
        ({"api_key": "k\u00e9y"}, "api_key: a header carries"),
        ({"api_key": "a\nb"}, "api_key: a header carries"),
    ],
)
def test_a_port_or_key_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ServeConfig(gpt="a", tokenizer="b", **changes)


def test_an_address_that_cannot_be_served_is_refused_before_a_model_is_loaded():
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        with pytest.raises(InputError, match=rf"port {port}: cannot listen there"):
            serve(ServeConfig(gpt="a", tokenizer="b", port=port))
    with pytest.raises(InputError, match=r"host 192\.0\.2\.1, port .*: cannot listen there"):
        serve(ServeConfig(gpt="a", tokenizer="b", host="192.0.2.1", port=port))
    with pytest.raises(InputError, match="cannot listen there"):
        serve(ServeConfig(gpt="a", tokenizer="b", host="x" * 300, port=port))


@pytest.mark.slow
def test_importing_the_project_needs_no_server_library():
    code = "import sys, autoregressive, autoregressive.serve; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {name.split(".")[0] for name in done.stdout.split()}
    assert not found & {"fastapi", "uvicorn", "gradio", "vllm", "prometheus_client", "openai"}


def vllm_marks(test):
    for mark in MARKS:
        test = mark(test)
    return test


VLLM_FLAGS = ["--engine", "vllm", "--vllm_options", '{"enforce_eager": true, "max_num_seqs": 8}']
VLLM_RUN = {"python": PYTHON, "seconds": 700}


def assert_alike(b64_json: str, image: np.ndarray) -> None:
    """Up to a level of 255: another torch decodes in vLLM's environment."""
    assert abs(pixels_of(b64_json).astype(int) - image).max() <= 1


@vllm_marks
@pytest.mark.parametrize("guidance_input", [False, True])
def test_vllm_behind_the_server_reads_prompts(tmp_path, tiny_t5, guidance_input, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    shape = {"condition": "text", "text_dim": 32, "max_text_tokens": 8}
    gpt = tiny(vocab_size=50, **shape, guidance_input=guidance_input)
    if guidance_input:
        torch.nn.init.normal_(gpt.t_embedder.mlp[2].weight)  # zero in a new model
    paths = write_models(tmp_path, gpt)
    pipeline = ImagePipeline.from_pretrained(*paths).prepare("fp32", device="cpu", verbose=False)
    encode = prompt_encoder(gpt.config, str(tiny_t5), torch.device("cpu"))
    name = "guidance" if guidance_input else "cfg_scale"
    asked = [("a cat", 0.3), ("the blue dog run", 0.5), ("a red cat and the blue dog run on", 0.9)]
    if not guidance_input:
        asked = [(prompt, 10 * value) for prompt, value in asked]
    bodies = [{"prompt": prompt, "temperature": 0, name: value} for prompt, value in asked]
    flags = [*VLLM_FLAGS, "--text_encoder", str(tiny_t5)]
    with served(paths, tmp_path / "log", *flags, **VLLM_RUN) as (_, url):
        with ThreadPoolExecutor(3) as pool:
            answers = list(
                pool.map(lambda body: httpx.post(url + IMAGES, json=body, timeout=120), bodies)
            )
        for (prompt, value), answer in zip(asked, answers, strict=True):
            sampling = SamplingConfig(greedy=True, **{name: value})
            image = pipeline.decode(pipeline.sample(encode(prompt, None)[0], sampling)).numpy()[0]
            assert_alike(answer.json()["data"][0]["b64_json"], image)
        for wrong, message in [
            ({"prompt": "a cat", "negative_prompt": "a dog"}, "needs the native engine"),
            ({"class_index": 1}, "needs a class model"),
            ({"prompt": "a cat", "cfg_schedule": "cosine", "cfg_scale": 0.5}, "cfg_scale"),
            ({"prompt": "a cat", "guidance": 1.5}, "guidance"),
        ]:
            answer = httpx.post(url + IMAGES, json=wrong)
            assert answer.status_code == 400
            assert message in answer.json()["error"]["message"]


@vllm_marks
def test_vllm_behind_the_server_gives_the_same_answers(tmp_path, monkeypatch):
    gpt = tiny(vocab_size=50)
    paths = write_models(tmp_path, gpt)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    with served(paths, tmp_path / "log", *VLLM_FLAGS, **VLLM_RUN) as (process, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120)
        greedy = {"temperature": 0, "cfg_scale": 3.0}
        response = client.images.generate(prompt="3", n=2, extra_body=greedy)
        pipeline = ImagePipeline.from_pretrained(*paths).prepare("fp32", device="cpu")
        images = pipeline(3, sampling=SamplingConfig(cfg_scale=3.0, greedy=True)).images
        for image in response.data:
            assert_alike(image.b64_json, np.asarray(images[0]))
        *partial, last = list(
            client.images.generate(
                prompt="2", stream=True, partial_images=3, extra_body={"seed": 4}
            )
        )
        assert [event.partial_image_index for event in partial] == [0, 1, 2]
        bodies = [{"prompt": "2", "seed": seed} for seed in range(16)]
        with ThreadPoolExecutor(16) as pool:
            answers = list(
                pool.map(lambda body: httpx.post(url + IMAGES, json=body, timeout=120), bodies)
            )
        found = [answer.json()["data"][0]["b64_json"] for answer in answers]
        assert found[4] == last.b64_json
        assert len(set(found)) == 16
        wrong = httpx.post(url + IMAGES, json={"class_index": 5})
        assert wrong.status_code == 400
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
