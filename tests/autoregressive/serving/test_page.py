"""The page: its images grow, equal the API's, and what is wrong is said in one line."""

import json
import shlex

import numpy as np
import pytest
from helpers.models import tiny, write_models
from PIL import Image

pytest.importorskip("fastapi", reason="the HTTP server is an extra")
pytest.importorskip("gradio", reason="the page needs gradio (requirements-extra.txt)")
import httpx
from gradio_client import Client
from gradio_client.exceptions import AppError
from helpers.http_server import native_engine, pixels_of, running

from autoregressive import ImagePipeline
from autoregressive.serving.http.limits import LimitsConfig
from autoregressive.serving.http.page import curl_line, mount_page
from core.data.grids import image_grid

ADDRESS = "http://127.0.0.1:8000/v1/images/generations"
NAMES = ("tench", "goldfish", "great white shark", "hen", "ostrich")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    paths = write_models(tmp_path_factory.mktemp("models"), tiny(vocab_size=50))
    pipeline = ImagePipeline.from_pretrained(*paths).prepare("fp32", device="cpu", verbose=False)

    def add(app, service):
        mount_page(app, service, ADDRESS)

    with running(
        native_engine(pipeline), LimitsConfig(queue=3), class_names=NAMES, extend=add
    ) as found:
        yield found


@pytest.mark.slow
def test_the_page_grows_and_ends_with_the_images_of_the_api(page, tmp_path):
    client = Client(page.url, verbose=False, download_files=str(tmp_path))
    job = client.submit("goldfish", "", 3.0, 20, 0.9, 5, 3, api_name="/generate")
    grid, line = job.result(timeout=60)
    assert len(job.outputs()) >= 4  # the grid of 4 x 4 codes has four rows
    whole = httpx.post(f"{page.url}/v1/images/generations", content=shlex.split(line)[3])
    pixels = np.stack([pixels_of(image["b64_json"]) for image in whole.json()["data"]])
    assert np.array_equal(np.asarray(Image.open(grid).convert("RGB")), image_grid(pixels, 2))


def test_a_refusal_is_told_in_one_line(page):
    client = Client(page.url, verbose=False)
    with pytest.raises(AppError, match="the queue is full; try again later"):
        client.predict("goldfish", "", 3.0, 20, 0.9, 5, 4, api_name="/generate")


def test_the_page_of_a_model_with_guidance_as_an_input_asks_for_its_strength(tmp_path):
    paths = write_models(tmp_path, tiny(vocab_size=50, guidance_input=True))
    pipeline = ImagePipeline.from_pretrained(*paths).prepare("fp32", device="cpu", verbose=False)

    def add(app, service):
        mount_page(app, service, ADDRESS)

    with running(native_engine(pipeline), extend=add) as found:
        client = Client(found.url, verbose=False, download_files=str(tmp_path))
        _, line = client.predict(3, "", 0.5, 0, 1.0, 5, 1, api_name="/generate")
        assert json.loads(shlex.split(line)[3])["guidance"] == 0.5


def test_the_page_and_the_api_share_one_address(page):
    assert '"title":"llamagen"' in httpx.get(page.url).text
    assert httpx.get(f"{page.url}/v1/models").json()["data"][0]["id"] == "llamagen"
    assert httpx.get(f"{page.url}/gradio_api/file=/etc/passwd").status_code in (403, 404)


def test_the_curl_line_survives_a_shell():
    body = {"prompt": 'a dog\'s $HOME; "x"'}
    assert json.loads(shlex.split(curl_line(ADDRESS, body))[3]) == body
