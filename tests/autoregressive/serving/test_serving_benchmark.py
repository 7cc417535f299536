"""The arithmetic of the serving benchmarks; the engines themselves are measured by hand."""

import pytest

from benchmarks.serving import table
from benchmarks.serving_offline import numbers
from benchmarks.serving_steps import least_time, verdict


def test_a_step_s_time_is_the_least_of_all_runs_near_the_position():
    runs = [[9.0, 1.0, 2.0, 9.0, 5.0], [1.0, 3.0, 1.0, 1.0, 5.0]]
    assert least_time(runs, position=2, window=3) == pytest.approx((1 + 1 + 1) / 3)
    assert least_time(runs, position=4, window=3) == pytest.approx((1 + 1 + 5) / 3)


def test_the_verdict_counts_the_points_where_vllm_is_faster():
    rates = {"native": {"1": [2.0, 3.0]}, "vllm_eager": {"1": [1.0, 4.0]}}
    assert verdict(rates).startswith("native is at least as fast as vllm_eager at 1 of 2 points")
    assert "0.75 to 2.00" in verdict(rates)
    assert verdict({"native": {}}) == "native and vllm_eager were not measured together"


def test_the_table_shows_each_row_against_the_reference_loop():
    reference, engine = numbers(8.0, [8.0] * 4), numbers(2.0, [1.0, 2.0, 1.0, 2.0])
    lines = table({"reference offline": reference, "native 8 over HTTP": engine}).splitlines()
    assert lines[2] == "| reference | offline | 4 | 0.500 | 8.00 | 8.00 | 100 % |"
    assert lines[3].startswith("| native | 8 over HTTP | 4 | 2.000 |")
    assert lines[3].endswith("| 400 % |")
    assert "326 to 414 %" in lines[-1]
