"""The scaling benchmark: processes that are measured, and GPUs that are forecast."""

from dataclasses import replace

import pytest
from PIL import Image

from autoregressive.models.config import TransformerConfig
from benchmarks.scaling import ScalingConfig, draw, forecast, markdown, measure

TINY = TransformerConfig(num_layers=1, num_heads=2, dim=32)


@pytest.fixture
def config(tmp_path) -> ScalingConfig:
    return ScalingConfig(
        tmp_path / "scaling.json",
        model=TINY,
        grid=(2, 2),
        num_steps=1,
        sizes=("GPT-B", "GPT-7B"),
        gpus=(8, 64, 256),
    )


def test_the_forecast_bounds_every_cluster_and_says_what_does_not_fit(config):
    rows = forecast(config)
    assert len(rows) == 2 * 3 * 3
    for row in rows:
        assert 0 < row["mfu_without_overlap"] < row["mfu"] <= 1
    large = {(r["strategy"], r["gpus"]): r for r in rows if r["size"] == "GPT-7B"}
    assert not large["ddp", 256]["fits"]
    assert large["fsdp", 64]["fits"]
    # More processes share the weights, and receive more for it.
    assert large["fsdp", 256]["memory_gib"] < large["fsdp", 8]["memory_gib"]
    assert large["fsdp", 256]["mfu_without_overlap"] < large["fsdp", 8]["mfu_without_overlap"]


def test_the_table_and_the_plot_show_the_forecast(config, tmp_path):
    rows = forecast(config)
    table = markdown([], rows, config)
    assert "| GPT-7B | hsdp |" in table
    draw(rows, config, tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").width > 100


@pytest.mark.slow
def test_processes_are_measured_beside_the_model(config):
    rows = measure(replace(config, processes=(1, 2), strategies=("fsdp",)))
    assert [(r["processes"], r["strategy"]) for r in rows] == [(1, "ddp"), (2, "fsdp")]
    assert rows[0]["received_mib"] == 0 < rows[1]["received_mib"]
    for row in rows:
        assert row["seconds"] > 0
        assert row["modelled_seconds"] > 0
        assert 0 <= row["communication"] < 1


def test_an_unknown_card_is_refused(tmp_path):
    with pytest.raises(ValueError, match="card: no X1"):
        ScalingConfig(tmp_path / "out.json", card="X1")
