from evaluations.metrics.comparison import compare, comparison_table, overall

OURS = {"gfid": 3.10, "standard_error": 0.02, "precision": 0.82}
PUBLISHED = {"gfid": 3.07, "precision": 0.83, "recall": 0.52}


def verdicts(ours: dict, comparable: bool = True) -> dict[str, str]:
    return {row.name: row.verdict for row in compare(ours, PUBLISHED, 3.0, comparable)}


def test_a_distance_passes_within_its_error_bar_and_fails_outside_on_either_side():
    # 3 sqrt(2) 0.02 = 0.085
    for gfid, expected in ((3.15, "pass"), (2.99, "pass"), (3.16, "fail"), (2.98, "fail")):
        rows = compare({**OURS, "gfid": gfid}, PUBLISHED, 3.0, True)
        assert overall(rows) == expected, gfid
    assert verdicts(OURS)["precision"] == ""


def test_without_an_error_bar_or_an_equal_protocol_there_is_no_verdict():
    assert overall(compare({"gfid": 3.07}, PUBLISHED, 3.0, True)) == ""
    assert overall(compare({"proxy_fd": 1.0}, PUBLISHED, 3.0, True)) == ""
    assert set(verdicts(OURS, comparable=False).values()) == {"not compared", ""}
    assert overall(compare(OURS, PUBLISHED, 3.0, False)) == "not compared"


def test_the_table_shows_both_numbers_with_the_error_bar():
    table = comparison_table(compare(OURS, PUBLISHED, 3.0, True))
    assert "| gfid | 3.1000 ± 0.0200 | 3.07 | 0.0849 | pass |" in table
    assert "| recall | - | 0.52 | - | - |" in table
