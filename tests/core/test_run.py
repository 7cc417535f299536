import json

import numpy as np
import pytest
from helpers.config import Inner
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from core.config import InputError
from core.distributed.world import World
from core.training.config import ReportConfig
from core.training.run import Run, make_run_folder
from core.training.trackers import flat_values, open_tracker


def report(folder, world, first_step: int, steps: range, config: Inner) -> Run:
    run = Run(folder, config, ReportConfig(), world)
    run.start(first_step, 10, "image")
    for step in steps:
        run.progress(4)
        run.log(step, {"loss": 1.0 / step, "lr": 1e-4})
    return run


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_of_steps_that_are_computed_again_are_dropped(tmp_path, world):
    report(tmp_path, world, 0, range(1, 7), Inner())
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # killed while writing
    run = report(tmp_path, world, 4, range(5, 9), Inner())
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, 9))
    assert all(line["images_per_second"] > 0 for line in metrics(tmp_path))
    run.draw(8, np.zeros((4, 4, 3), np.uint8))
    run.finish()
    files = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    expected = {
        "config.yaml",
        "run.json",
        "metrics.jsonl",
        "curves.png",
        "samples/step_0000008.png",
    }
    assert files == expected


def test_a_folder_records_every_start_and_when_it_ended(tmp_path, world):
    report(tmp_path, world, 0, range(1, 3), Inner())  # killed
    report(tmp_path, world, 2, range(3, 5), Inner()).finish()
    killed, finished = json.loads((tmp_path / "run.json").read_text())
    assert killed["ended"] is None
    assert finished["ended"] >= finished["started"] >= killed["started"]
    assert {"command", "commit", "dirty", "version", "host", "device"} <= finished.keys()
    assert finished["versions"]["numpy"] == np.__version__


def test_trackers_get_nested_settings_and_the_sample_grids(tmp_path):
    tracker = open_tracker("tensorboard", tmp_path, Inner(), "project")
    tracker.log(1, {"loss": 0.5})
    tracker.draw(1, np.zeros((4, 4, 3), np.uint8))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["images"] == ["samples"]
    assert events.Tags()["scalars"] == ["loss"]
    stored = events.summary_metadata[SESSION_START_INFO_TAG].plugin_data.content
    settings = HParamsPluginData.FromString(stored).session_start_info.hparams
    assert settings["lr"].number_value == Inner().lr
    assert settings["kind"].string_value == "a"
    nested = {"inner": {"lr": 0.5, "sizes": [1, 2]}, "end": None}
    assert flat_values(nested) == {"inner.lr": 0.5, "inner.sizes": "[1, 2]", "end": "null"}


def test_a_value_that_is_not_finite_is_null_in_the_file(tmp_path, world):
    run = report(tmp_path, world, 0, range(0), Inner())
    run.log(1, {"loss": float("nan")})
    assert metrics(tmp_path)[0]["loss"] is None
    run.finish()


def test_resuming_with_other_settings_names_them(tmp_path, world, caplog):
    report(tmp_path, world, 0, range(1, 2), Inner())
    report(tmp_path, world, 1, range(0), Inner(lr=0.5))
    assert "resuming with other settings: lr: 0.5" in caplog.text
    assert "lr: 0.5" in (tmp_path / "config.yaml").read_text()


def test_only_the_main_rank_writes(tmp_path, world):
    report(tmp_path, World(1, 2, world.device), 0, range(1, 3), Inner()).finish()
    assert not list(tmp_path.iterdir())


def test_a_run_reports_by_its_intervals_and_at_the_end():
    config = ReportConfig(report_every=2, sample_every=None, save_every=3)
    assert [s for s in range(1, 6) if config.reports(s, 5)] == [2, 4, 5]
    assert [s for s in range(1, 6) if config.saves(s, 5)] == [3, 5]
    assert not any(config.samples(s, 5) for s in range(1, 6))
    with pytest.raises(ValueError, match="keep_last"):
        ReportConfig(keep_last=0)


def test_no_step_is_profiled_unless_asked_for(tmp_path, world):
    two = World(0, 2, world.device)
    run = Run(tmp_path, Inner(), ReportConfig(), two)
    run.start(0, 2000, "image")
    for step in range(2000):
        run.begin_step(step)
        assert run.profile is None
    run.finish()


def test_a_run_that_starts_afresh_reports_step_0_once_and_a_resumed_one_keeps_it(tmp_path, world):
    for first, expected in ((0, [0]), (0, [0]), (3, [0])):
        run = Run(tmp_path, Inner(), ReportConfig(), world)
        run.start(first, 10, "image")
        if first == 0:
            run.log(0, {"validation_loss": 1.0})
        run.finish()
        assert [line["step"] for line in metrics(tmp_path)] == expected


def test_a_image_can_be_drawn_before_anything_is_reported(tmp_path, world, caplog):
    run = Run(tmp_path, Inner(), ReportConfig(), world)
    run.start(0, 10, "image")
    run.draw(0, np.zeros((4, 4, 3), np.uint8))
    run.finish()
    assert (tmp_path / "samples" / "step_0000000.png").is_file()
    assert not caplog.text


def test_a_run_folder_that_is_a_file_is_refused(tmp_path, world):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        make_run_folder(tmp_path / "file", world)


def test_damaged_metrics_and_configuration_are_named_and_the_rest_is_kept(tmp_path, world, caplog):
    report(tmp_path, world, 0, range(1, 5), Inner())
    lines = (tmp_path / "metrics.jsonl").read_bytes().split(b"\n")
    lines[1] = b"\xff\xfe junk"
    lines[2] = b"[3]"
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "config.yaml").write_bytes(b"\xff\x00: [")
    run = report(tmp_path, world, 4, range(5, 7), Inner())
    assert [line["step"] for line in metrics(tmp_path)] == [1, 4, 5, 6]
    assert caplog.text.count("metrics.jsonl: 2 lines are damaged") == 1
    assert caplog.text.count("config.yaml: resuming with other settings") == 1
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    run.finish()
    assert (tmp_path / "curves.png").exists()


@pytest.mark.parametrize("text", ["", "{}", "3", "[1", "[" * 60_000])
def test_a_damaged_list_of_starts_begins_again_with_one_warning(tmp_path, world, caplog, text):
    report(tmp_path, world, 0, range(1, 2), Inner()).finish()
    (tmp_path / "run.json").write_text(text)
    report(tmp_path, world, 1, range(2, 3), Inner()).finish()
    assert caplog.text.count("it begins again") == 1
    (start,) = json.loads((tmp_path / "run.json").read_text())
    assert start["ended"]
