"""vLLM with a published size, over two ranks, and behind its own HTTP server."""

import http.client
import json
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from vllm_job import CLASSES, MARKS, PYTHON, Job, environment, exported, filled, greedy, request

pytestmark = MARKS


def test_gpt_b_draws_1024_equal_codes_for_four_classes(tmp_path):
    shape = {"num_layers": 12, "num_heads": 12, "dim": 768, "ffn_multiple": 256}
    gpt = filled(**shape, vocab_size=16384, num_classes=1000, grid=(16, 16))
    labels = [207, 360, 387, 974]
    runs = {"classes": [request(gpt, label, cfg_scale=2.0) for label in labels]}
    job = Job(tmp_path)
    job.engine("GPT-B", exported(gpt, tmp_path / "model"), runs)
    job.start()
    wanted = greedy(gpt, labels, cfg_scale=2.0)
    assert len(wanted.unique()) > 300
    assert int((job.codes("GPT-B/classes") == wanted).sum()) == 1024


def test_two_tensor_parallel_ranks_draw_the_same_codes(tmp_path):
    gpt = filled(num_kv_heads=2)  # grouped: the harder case of the two
    runs = {"scales": [request(gpt, i, cfg_scale=1.0 + i) for i in range(CLASSES)]}
    job = Job(tmp_path)
    job.engine("two", exported(gpt, tmp_path / "model"), runs, tensor_parallel_size=2)
    job.start()
    wanted = [greedy(gpt, [i], cfg_scale=1.0 + i) for i in range(CLASSES)]
    assert torch.equal(job.codes("two/scales"), torch.cat(wanted))


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[int]:
    """The port of vLLM's own OpenAI server with a small class model."""
    folder = tmp_path_factory.mktemp("server")
    model = exported(filled(), folder / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--model", model, "--served-model-name", "gpt", "--host", "127.0.0.1"]
    flags += ["--port", str(port), "--skip-tokenizer-init", "--enforce-eager", "--max-num-seqs=8"]
    flags += ["--dtype", "float32"]  # auto serves float32 weights in bfloat16
    flags += ["--logits-processors", "autoregressive.serving.vllm_guidance:Guidance"]
    with (folder / "log").open("w") as log:
        command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", *flags]
        process = subprocess.Popen(
            command, env=environment(), cwd=folder, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        wait_until_healthy(port, process, folder / "log")
        yield port
    finally:
        process.terminate()
        process.wait(60)


def wait_until_healthy(port: int, process: subprocess.Popen, log: Path) -> None:
    for _ in range(600):
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail(log.read_text()[-4000:])


def post(port: int, prompt: list[int], **fields: object) -> tuple[int, str]:
    defaults = {"max_tokens": 64, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    body = {"model": "gpt", "prompt": prompt, **defaults, **fields}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    response = connection.getresponse()
    return response.status, response.read().decode()


def codes_of(answer: tuple[int, str]) -> list[int]:
    status, text = answer
    assert status == 200, text
    return json.loads(text)["choices"][0]["token_ids"]


def test_requests_with_different_scales_arrive_over_http_and_keep_their_own(server):
    gpt, scales = filled(), [1.0 + i / 2 for i in range(CLASSES)]

    def draw(i: int) -> list[int]:
        return codes_of(post(server, [96 + i], vllm_xargs={"cfg_scale": scales[i]}))

    with ThreadPoolExecutor(CLASSES) as pool:
        drawn = list(pool.map(draw, range(CLASSES)))
    wanted = [greedy(gpt, [i], cfg_scale=scales[i])[0].tolist() for i in range(CLASSES)]
    assert drawn == wanted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cfg_scale": 0.5}, "cfg_scale is 0.5, must be >= 1"),
        ({"cfg_scale": "x"}, "cfg_scale is 'x', must be a finite number"),
        ({"cfg_schedule": "sine"}, "cfg_schedule is 'sine', must be one of"),
    ],
)
def test_wrong_guidance_is_http_400_with_one_line(server, arguments, message):
    status, text = post(server, [96], vllm_xargs=arguments)
    assert status == 400
    assert message in json.loads(text)["error"]["message"]


def test_a_streamed_answer_brings_the_codes_as_they_are_drawn(server):
    status, text = post(server, [99], stream=True)
    events = [line[6:] for line in text.splitlines() if line.startswith("data: {")]
    drawn = [json.loads(event)["choices"][0]["token_ids"] for event in events]
    assert status == 200
    # vLLM sends codes that were drawn while the last event was on its way in one event.
    assert len(drawn) > 32
    assert [code for codes in drawn for code in codes] == greedy(filled(), [3])[0].tolist()


def test_a_token_out_of_range_does_not_end_the_server(server):
    post(server, [99_999])
    post(server, [0, 5, 108])
    assert codes_of(post(server, [97])) == greedy(filled(), [1])[0].tolist()


def test_the_adapter_of_the_v2_runner_computes_places_and_scales():
    """Its arithmetic on CPU with a stand-in batch: the V2 runner itself needs a GPU."""
    script = Path(__file__).with_name("vllm_state_process.py")
    done = subprocess.run([PYTHON, script], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = dict(line.split(" ", 1) for line in done.stdout.splitlines() if line[:1] in "RD")
    positions, scales = json.loads(answers["RESULT"])
    # A caption of 3 ends at place 5, so the token at index 4 is code 1, at place 7. One of 6 fills
    # places 0 to 5. Code 2 of 4 has half of a linear schedule to 5; the usual scale is 7.5.
    assert positions == [7, 0, 1, 2, 3, 4, 5, 0]
    assert scales == [[3.0], [7.5]]
    assert json.loads(answers["DUMMY"]) == [[1.0]] * 3
