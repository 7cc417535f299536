"""The report of a card, on a CPU: every row is measured or says what it needs."""

import json

import pytest
import torch

from benchmarks import gpu_report, sampling
from benchmarks.gpu_report import NEEDS_CUDA, ReportConfig, Row, markdown, report
from core.distributed.world import World


@pytest.fixture
def quick(monkeypatch, tmp_path) -> ReportConfig:
    cpu = torch.device("cpu")
    device = sampling.Device(cpu, 1e10, {"fp32": 1e11, "bf16": 1e11})  # not the subject: slow
    monkeypatch.setattr(sampling, "measure_device", lambda device_: device)
    return ReportConfig(tmp_path / "report.json", "cpu", quick=True)


@pytest.mark.slow
def test_every_row_is_measured_or_needs_cuda(quick, world):
    results = report(quick, world)
    assert json.loads(quick.out.read_text())["rows"].keys() == results["rows"].keys()
    measured = {n for n, row in results["rows"].items() if row["status"] == "measured"}
    assert {"training GPT-B", "VQ-16, 32 px, batch 1"} <= measured
    assert any(name.startswith("sampling GPT-B") for name in measured)
    others = {row["status"] for n, row in results["rows"].items() if n not in measured}
    assert others == {NEEDS_CUDA}
    table = quick.out.with_suffix(".md").read_text()
    assert all(f"| {name} |" in table for name in results["rows"])


def test_a_row_that_fails_says_why_and_an_interrupted_report_keeps_what_it_has(
    quick, world: World, monkeypatch
):
    def out_of_memory():
        raise torch.OutOfMemoryError("no memory left\nmore lines")

    def interrupted():
        raise KeyboardInterrupt

    rows = [
        Row("good", lambda: {"x": 1.0}, True),
        Row("large", out_of_memory, True),
        Row("card", dict),
        Row("last", interrupted, True),
    ]
    monkeypatch.setattr(gpu_report, "rows_of", lambda config, world: rows)
    with pytest.raises(KeyboardInterrupt):
        report(quick, world)
    kept = json.loads(quick.out.read_text())
    statuses = {name: row["status"] for name, row in kept["rows"].items()}
    expected = {"good": "measured", "large": "failed: no memory left", "card": NEEDS_CUDA}
    assert statuses == expected
    assert "| good | x 1 |" in markdown(kept)


def test_rows_that_would_begin_too_late_are_left_out(quick, world, monkeypatch):
    monkeypatch.setattr(gpu_report, "rows_of", lambda *of: [Row("late", dict, True)])
    results = report(ReportConfig(quick.out, "cpu", True, minutes=1e-9), world)
    assert results["rows"]["late"]["status"].startswith("not run")


def test_times_that_a_busy_machine_turned_round_give_no_number(quick, world, monkeypatch):
    seconds = iter((0.0, 9.0, 9.0, 12.0, 12.0, 13.0))  # 3 s for few images, 1 s for many
    monkeypatch.setattr(gpu_report.time, "perf_counter", lambda: next(seconds))
    monkeypatch.setattr(gpu_report, "sample", lambda run, world: None)
    saved = type("Saved", (), {"save_pretrained": lambda self, folder: None})()
    monkeypatch.setattr(gpu_report.sampling, "random_gpt", lambda *of: saved)
    monkeypatch.setattr(gpu_report.VQModel, "from_preset", lambda name: saved)
    with pytest.raises(RuntimeError, match="the machine is busy"):
        gpu_report.measure_sample_runs(quick, world)
