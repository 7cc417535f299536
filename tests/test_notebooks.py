"""The notebooks in examples/ run from top to bottom and end with an image."""

import base64
import io
import sys

import numpy as np
import pytest
from helpers.models import tiny, write_models
from helpers.paths import ROOT
from PIL import Image

from core.distributed.world import distributed
from evaluations.features.config import ExtractorConfig
from evaluations.reference import ReferenceConfig, build_reference

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
SIDE, CLASSES, IMAGES = 8, 5, 8


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory):
    """A folder as `make demo` leaves it, with untrained models and images of noise."""
    folder = tmp_path_factory.mktemp("demo")
    _, vq = write_models(folder, tiny(vocab_size=50, num_classes=CLASSES))
    vq.rename(folder / "tokenizer")
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in range(CLASSES):
            of_class = folder / "digits" / split / str(label)
            of_class.mkdir(parents=True)
            for i in range(IMAGES):
                noise = random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
                Image.fromarray(noise).save(of_class / f"{i}.png")
    config = ReferenceConfig(
        images=folder / "digits" / "train",
        out=folder / "real.npz",
        image_size=(SIDE, SIDE),
        metrics=ExtractorConfig(extractor="proxy", batch_size=20),
        num_workers=0,
    )
    with distributed("cpu") as world:
        build_reference(config, world)
    return folder


def test_there_are_two_notebooks_and_neither_has_outputs():
    nbformat = pytest.importorskip("nbformat")
    assert [path.stem for path in NOTEBOOKS] == ["guidance_schedule", "quickstart"]
    for path in NOTEBOOKS:
        cells = nbformat.read(path, 4).cells
        assert not any(cell.get("outputs") for cell in cells), path
        assert sum("parameters" in cell.metadata.get("tags", ()) for cell in cells) == 1


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_its_last_cell_shows_an_image(path, demo_run, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("DEMO_RUN", str(demo_run))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    notebook = nbformat.read(path, 4)
    # The kernel named python3 is this interpreter, whatever else is installed on the machine.
    client = nbclient.NotebookClient(
        notebook, timeout=240, resources={"metadata": {"path": str(ROOT / "examples")}}
    )
    client.create_kernel_manager().kernel_spec.argv[0] = sys.executable
    client.execute()
    (output,) = [o for o in notebook.cells[-1].outputs if "data" in o]
    shown = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"])))
    assert min(shown.size) > 3 * SIDE
