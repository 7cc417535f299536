"""benchmarks.support.evidence: results are kept, compared and shown honestly."""

import pytest

from benchmarks.support.evidence import Results
from core.errors import InputError

SCORES = {"psnr": "PSNR, dB"}
COSTS = {"steps": "steps"}


def filled(path, plain, other):
    results = Results(path, {"steps": 5})
    for variant, values in (("plain", plain), ("other", other)):
        for seed, value in enumerate(values):
            results.add({"variant": variant, "seed": seed, "psnr": value, "steps": 5})
    return results


def rows(results, **options):
    table = results.write(SCORES, COSTS, **options)
    return {line.split(" | ")[0].strip("| `"): line for line in table.splitlines() if "|" in line}


def test_a_range_that_does_not_touch_the_first_rows_is_bold(tmp_path):
    found = rows(filled(tmp_path / "results.json", [10.0, 11.0, 12.0], [13.0, 14.0, 15.0]))
    assert "| 3 | **14 (13 to 15)** | 5 |" in found["other"]
    assert "| 3 | 11 (10 to 12) | 5 |" in found["plain"]
    assert (tmp_path / "scores.png").is_file() and (tmp_path / "table.md").is_file()


def test_a_range_that_touches_the_first_rows_is_not_bold(tmp_path):
    found = rows(filled(tmp_path / "results.json", [10.0, 13.5], [13.0, 14.0]))
    assert "**" not in found["other"]


def test_one_seed_shows_no_difference(tmp_path):
    found = rows(filled(tmp_path / "results.json", [10.0, 11.0], [20.0]))
    assert "| 1 | 20 (20 to 20) |" in found["other"]


def test_real_images_stand_below_the_variants(tmp_path):
    found = rows(filled(tmp_path / "results.json", [10.0], [20.0]), floor={"psnr": 30.0})
    assert found["real images"] == "| real images | - | 30 | - |"


def test_finished_runs_are_found_again(tmp_path):
    filled(tmp_path / "results.json", [10.0], [20.0])
    again = Results(tmp_path / "results.json", {"steps": 5})
    assert again.has("plain", 0) and not again.has("plain", 1)


def test_results_of_other_settings_are_refused(tmp_path):
    filled(tmp_path / "results.json", [10.0], [20.0])
    with pytest.raises(InputError, match="other settings"):
        Results(tmp_path / "results.json", {"steps": 6})
