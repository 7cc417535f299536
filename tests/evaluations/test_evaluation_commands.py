import csv
import json

import numpy as np
import pytest
from helpers.commands import run_module
from PIL import Image

from core.config import InputError
from core.data.npz import save_npz
from core.distributed.world import World, choose_device
from core.files import write_json
from evaluations import clip_score, reference, score, sweep, verify_adm
from evaluations.features.config import ExtractorConfig
from evaluations.features.extractors import ProxyExtractor
from evaluations.image_source import open_image_source
from evaluations.metrics.config import MetricsConfig
from evaluations.reference_stats import load_reference

COUNT, SIDE = 45, 16
READING = {"image_size": (SIDE, SIDE), "num_workers": 0, "device": "cpu"}


@pytest.fixture(scope="module")
def pixels():
    """Three classes of noise, each of its own colour."""
    random = np.random.default_rng(0)
    colours = np.array([[40, 0, 0], [0, 40, 0], [0, 0, 40]])[np.arange(COUNT) % 3]
    noise = random.integers(0, 200, (COUNT, SIDE, SIDE, 3))
    return (noise + colours[:, None, None]).astype(np.uint8)


@pytest.fixture(scope="module")
def made(tmp_path_factory, pixels):
    """A folder of images (one of them broken), the same as npz, as a sample run; a reference."""
    folder = tmp_path_factory.mktemp("made")
    for i, image in enumerate(pixels):
        path = folder / "images" / str(i % 3) / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(image).save(path)
    (folder / "images" / "2" / "zz.jpg").write_text("not a image")
    labels = np.arange(COUNT) % 3
    save_npz(folder / "samples.npz", COUNT, [pixels], arr_1=labels)
    for name, noise in (("cfg_1", 0), ("cfg_2", 60)):
        run = folder / name
        run.mkdir()
        random = np.random.default_rng(1).integers(-noise, noise + 1, pixels.shape)
        changed = (pixels + random).clip(0, 255).astype(np.uint8)
        save_npz(run / "samples.npz", COUNT, [changed], arr_1=labels)
        write_json(run / "index.json", {"count": COUNT, "rows": [COUNT], "sampling": {"cfg": name}})
    config = reference.ReferenceConfig(
        images=folder / "images",
        out=folder / "r.npz",
        metrics=ExtractorConfig(extractor="proxy", batch_size=10),
        **READING,
    )
    reference.build_reference(config, World(0, 1, choose_device("cpu")))
    return folder


def flags(name, value):
    return (
        *(f"--{name}", value, "--image_size", f"[{SIDE},{SIDE}]"),
        *("--metrics.extractor", "proxy", "--metrics.batch_size", 10),
        *("--num_workers", 0, "--device", "cpu"),
    )


def settings(made, kind=score.ScoreConfig, **changes):
    metrics = MetricsConfig(reference=made / "r.npz", extractor="proxy", batch_size=10)
    return kind(metrics=metrics, **READING, **changes)


def test_the_reference_says_how_it_was_made(made):
    protocol = json.loads((made / "r.json").read_text())
    assert protocol["n"] == COUNT
    assert protocol["note"] == "NOT FID"
    assert len(protocol["skipped"]) == 1
    with np.load(made / "r.npz", allow_pickle=False) as file:
        assert file["arr_0"].shape == (COUNT, SIDE, SIDE, 3)
        assert file["sigma"].shape == (224, 224)


@pytest.mark.parametrize("name", ["samples.npz", "images"])
def test_an_npz_and_a_folder_are_scored_alike(made, tmp_path, world, capsys, name):
    score.score_samples(settings(made, samples=made / name, out=tmp_path), world)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert abs(scores["proxy_fd"]) < 1e-6
    assert scores["proxy_precision"] == scores["proxy_recall"] == 1
    assert not {"fid", "gfid", "rfid"} & set(scores)
    assert capsys.readouterr().out.count("NOT FID") == 1
    assert (tmp_path / "scores.json").read_text().count("NOT FID") == 1
    assert scores["n"] == COUNT
    assert scores["class_balance"] == {"classes": 3, "least": 15, "most": 15}
    assert len(scores["skipped"]) == (name == "images")
    assert len(scores["reference_sha256"]) == 64


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_any_number_of_processes_gives_the_same_scores(made, tmp_path, world, processes):
    one = settings(made, samples=made / "cfg_2" / "samples.npz", out=tmp_path / "one")
    expected = score.score_samples(one, world)
    run_module(
        "evaluations.score",
        *flags("samples", one.samples),
        *("--metrics.reference", made / "r.npz", "--out", tmp_path / "many"),
        processes=processes,
    )
    found = json.loads((tmp_path / "many" / "scores.json").read_text())
    for name, value in expected.items():
        # The network's own rounding depends on how its images are batched.
        assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_a_sweep_writes_a_table_and_a_plot(made, tmp_path, world):
    runs = (made / "cfg_1", made / "cfg_2")
    config = settings(made, sweep.SweepConfig, runs=runs, out=tmp_path / "sweep")
    sweep.sweep(config, world)
    with (config.out / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["cfg"] for row in rows] == ["cfg_1", "cfg_2"]
    assert float(rows[0]["proxy_fd"]) < float(rows[1]["proxy_fd"])
    assert json.loads((config.out / "sweep.json").read_text())["note"] == "NOT FID"
    assert (config.out / "sweep.png").stat().st_size > 1000


def test_the_class_report_names_the_class_that_is_wrong(tmp_path, world):
    random = np.random.default_rng(0)
    real, fake = random.integers(0, 256, (2, 600, 8, 8, 3), dtype=np.uint8)
    fake[::3] //= 2
    save_npz(tmp_path / "real.npz", 600, [real])
    save_npz(tmp_path / "fake.npz", 600, [fake], arr_1=np.arange(600) % 3)
    made = reference.ReferenceConfig(
        images=tmp_path / "real.npz",
        out=tmp_path / "r.npz",
        metrics=ExtractorConfig(extractor="proxy"),
        device="cpu",
    )
    reference.build_reference(made, world)
    config = settings(tmp_path, samples=tmp_path / "fake.npz", out=tmp_path / "out")
    scores = score.score_samples(config, world)
    assert scores["proxy_standard_error"] > 0
    with (config.out / "classes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [rows[0]["class"], rows[0]["n"]] == ["0", "200"]
    assert sum(float(row["effect"]) for row in rows) == pytest.approx(0, abs=1e-9)
    assert (config.out / "classes.png").is_file()


def test_a_reference_that_keeps_no_images_scores_samples(made, tmp_path, world):
    config = reference.ReferenceConfig(
        images=made / "samples.npz",
        out=tmp_path / "r.npz",
        metrics=ExtractorConfig(extractor="proxy"),
        kept_images=0,
        device="cpu",
    )
    reference.build_reference(config, world)
    assert "arr_0" not in np.load(config.out)
    scored = settings(tmp_path, samples=made / "samples.npz", out=tmp_path / "out")
    assert score.score_samples(scored, world)["proxy_fd"] == pytest.approx(0, abs=1e-3)


def test_verify_refuses_an_extractor_that_is_not_fids(tmp_path):
    metrics = MetricsConfig(extractor="proxy")
    with pytest.raises(ValueError, match=r"metrics\.extractor inception"):
        verify_adm.VerifyConfig(samples=tmp_path, out=tmp_path, metrics=metrics)


def test_verify_prints_both_rows_and_fails_where_they_differ(capsys):
    published = {name: row.value for name, row in verify_adm.PUBLISHED.items()}
    verify_adm.compare(published)
    assert capsys.readouterr().out.count("pass") == len(published)
    published["sfid"] += 0.1
    with pytest.raises(InputError, match=r"not the published numbers: sfid$"):
        verify_adm.compare(published)


def test_a_reference_for_reconstruction_is_refused_for_generation(made, tmp_path):
    extractor = ProxyExtractor(choose_device("cpu"))
    with pytest.raises(InputError, match="gFID is not rFID"):
        load_reference(made / "r.npz", extractor, "reconstruction")


def test_a_reference_of_another_extractor_or_damaged_is_refused(made, tmp_path):
    extractor = ProxyExtractor(choose_device("cpu"))
    np.savez(tmp_path / "wide.npz", mu=np.zeros(224, np.float32), sigma=np.eye(8))
    with pytest.raises(InputError, match=r"sigma \(8, 8\), expected \(224,\) and \(224, 224\)"):
        load_reference(tmp_path / "wide.npz", extractor, "generation")
    np.savez(tmp_path / "other.npz", mu=np.zeros(8, np.float32), sigma=np.eye(8))
    with pytest.raises(InputError, match="belongs to the extractor"):
        load_reference(tmp_path / "other.npz", extractor, "generation")
    np.savez(tmp_path / "objects.npz", mu=np.array([{}], object), sigma=np.eye(8))
    (tmp_path / "text.npz").write_text("no")
    (tmp_path / "cut.npz").write_bytes((made / "r.npz").read_bytes()[:5000])
    for name in ("objects", "text", "cut"):
        with pytest.raises(InputError, match=rf"{name}.npz: (mu is missing or damaged|not an npz)"):
            load_reference(tmp_path / f"{name}.npz", extractor, "generation")
    (tmp_path / "r.npz").write_bytes((made / "r.npz").read_bytes())
    (tmp_path / "r.json").write_text(json.dumps({"sha256": "0" * 64}))
    with pytest.raises(InputError, match="has changed"):
        load_reference(tmp_path / "r.npz", extractor, "generation")


def test_published_references_in_float32_are_read_as_float64(tmp_path):
    extractor = ProxyExtractor(choose_device("cpu"))
    arrays = {"mu": np.zeros(224, np.float32), "sigma": np.eye(224)}
    np.savez(tmp_path / "adm.npz", **arrays)
    found = load_reference(tmp_path / "adm.npz", extractor, "generation")
    assert str(found.pooled.mean.dtype) == "torch.float64"
    assert found.image_size is None


def test_images_that_cannot_be_scored_get_one_line(made, tmp_path, pixels, world):
    np.savez(tmp_path / "none.npz", other=pixels)
    np.savez(tmp_path / "float.npz", arr_0=pixels.astype(np.float32))
    np.savez(tmp_path / "objects.npz", arr_0=np.array([{}, {}], object))
    (tmp_path / "cut.npz").write_bytes((made / "samples.npz").read_bytes()[:5000])
    for name, message in (
        ("none", "with arr_0"),
        ("float", "float32"),
        ("objects", "expected uint8"),
        ("cut", "not an npz of images"),
    ):
        with pytest.raises(InputError, match=message):
            open_image_source(tmp_path / f"{name}.npz", (SIDE, SIDE))
    save_npz(tmp_path / "small.npz", COUNT, [pixels[:, :8, :8]])
    config = settings(made, samples=tmp_path / "small.npz", out=tmp_path)
    with pytest.raises(InputError, match="images of 8 x 8, those of"):
        score.score_samples(config, world)
    done = run_module(
        "evaluations.score",
        *flags("samples", tmp_path / "objects.npz"),
        *("--metrics.reference", made / "r.npz", "--out", tmp_path),
        ok=False,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("prompts", "each"), [(["a"], 1), (["a", "b"], 0), ([], 5)])
def test_an_index_with_too_few_prompts_for_its_images_is_refused(tmp_path, world, prompts, each):
    save_npz(tmp_path / "samples.npz", 2, [np.zeros((2, 8, 8, 3), np.uint8)])
    index = {"rows": [2], "count": 2, "prompts": prompts, "images_per_prompt": each}
    write_json(tmp_path / "index.json", index)
    config = clip_score.ClipScoreConfig(tmp_path, tmp_path / "out", tmp_path / "clip.pt")
    with pytest.raises(InputError, match=r"index\.json has .* the npz 2 images"):
        clip_score.clip_score(config, world)
