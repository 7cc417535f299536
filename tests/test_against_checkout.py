"""benchmarks.against_checkout: two checkouts by turns."""

from pathlib import Path

import pytest

from benchmarks.against_checkout import CompareConfig, compare
from core.config import InputError


def checkout(folder: Path, last_line: str) -> Path:
    folder.mkdir()
    (folder / "speed.py").write_text(f"import sys; print('table'); print({last_line!r})")
    return folder


def test_the_ratio_is_this_checkouts_number_over_the_others(tmp_path, monkeypatch):
    this = checkout(tmp_path / "this", '{"results": [{"ms_per_step": 3.0, "batch": 8}]}')
    other = checkout(tmp_path / "other", "out.json")
    (other / "out.json").write_text('{"results": [{"ms_per_step": 4, "new": 1}]}')
    monkeypatch.chdir(this)
    table = compare(CompareConfig(other, "speed", pairs=2))
    assert table == {
        "results.0.ms_per_step": {
            "this": 3.0,
            "other": 4.0,
            "least_ratio": 0.75,
            "greatest_ratio": 0.75,
            "median_ratio": 0.75,
        }
    }


def test_a_benchmark_that_fails_is_named(tmp_path, monkeypatch):
    this = checkout(tmp_path / "this", "{}")
    monkeypatch.chdir(this)
    with pytest.raises(InputError, match=r"speed2 in .* failed: .*No module named"):
        compare(CompareConfig(this, "speed2", pairs=1))
