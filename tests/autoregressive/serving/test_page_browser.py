r"""The page in a real browser: headless Chromium, driven by Playwright.

The README's screenshot is made by this test, from models that draw something:

    python -m pytest tests/autoregressive/serving/test_page_browser.py \\
        --page_models runs/demo --page_screenshot docs/images/serve_page.png
"""

import io
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.models import tiny, write_models
from PIL import Image

pytest.importorskip("fastapi", reason="the HTTP server is an extra")
pytest.importorskip("gradio", reason="the page needs gradio (requirements-extra.txt)")
pytest.importorskip("playwright", reason="no playwright to drive a browser: pip install playwright")
import httpx
from helpers.http_server import native_engine, pixels_of, running, wait_until
from playwright.sync_api import sync_playwright

from autoregressive import ImagePipeline
from autoregressive.serving.http.page import mount_page
from core.data.grids import image_grid

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        BROWSER is None,
        reason=f"no browser ({', '.join(BROWSERS)}): the page was not tested in one; "
        "on Debian: apt-get install chromium",
    ),
]
# Notes every image that the page shows.
OBSERVE = """() => {
    window.shown = [];
    new MutationObserver(() => {
        const image = document.querySelector('#grid img');
        if (image && image.src && !window.shown.includes(image.src)) window.shown.push(image.src);
    }).observe(document.body, {subtree: true, childList: true, attributes: true});
}"""


@pytest.fixture
def server(tmp_path, request):
    """A server with the page; 256 codes take long enough to be seen growing."""
    models = request.config.getoption("--page_models")
    if models:
        paths = Path(models) / "gpt", Path(models) / "tokenizer"
    else:
        paths = write_models(tmp_path, tiny(vocab_size=50, grid=(16, 16)))
    pipeline = ImagePipeline.from_pretrained(*paths).prepare("fp32", device="cpu", verbose=False)
    address = "http://127.0.0.1:8000/v1/images/generations"
    with running(
        native_engine(pipeline), extend=lambda app, service: mount_page(app, service, address)
    ) as found:
        yield found


def test_the_page_in_a_browser_grows_and_ends_with_the_images_of_the_api(server, request):
    screenshot = request.config.getoption("--page_screenshot")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1000, "height": 640})
        page.goto(server.url)
        page.get_by_label("Class").first.fill("3")
        page.get_by_label("Seed").first.fill("5")
        page.evaluate(OBSERVE)
        page.click("#generate")
        page.wait_for_function("() => window.shown.length > 0", timeout=60_000)
        body = shlex.split(page.get_by_label("The same request").input_value())[3]
        assert '"prompt": "3"' in body
        assert '"seed": 5' in body
        whole = httpx.post(f"{server.url}/v1/images/generations", content=body, timeout=120)
        pixels = np.stack([pixels_of(image["b64_json"]) for image in whole.json()["data"]])
        wanted = image_grid(pixels, 2)

        def the_page_shows_it() -> bool:
            page.wait_for_timeout(50)
            source = page.locator("#grid img").get_attribute("src") or ""
            image = Image.open(io.BytesIO(httpx.get(source).content)).convert("RGB")
            return np.array_equal(np.asarray(image), wanted)

        wait_until(the_page_shows_it)
        assert len(page.evaluate("() => window.shown")) >= 4, "an image and three changes"
        if screenshot:
            Path(screenshot).parent.mkdir(parents=True, exist_ok=True)
            page.screenshot(path=screenshot)
        browser.close()
