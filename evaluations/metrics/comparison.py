"""Our scores beside a published row: which may be compared, and which agree."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

Verdict = Literal["pass", "fail", "not compared", ""]


class ComparedScore(NamedTuple):
    """A score of ours beside the published one.

    error: Standard error of ours; None where it is not known. tolerance: What the two may differ
    by. verdict: "" for a score without an error bar.
    """

    name: str
    ours: float | None
    error: float | None
    published: float | None
    tolerance: float | None
    verdict: Verdict


def is_distance(name: str) -> bool:
    """Whether a score is the Frechet distance, whose standard error scores.json holds."""
    return name in ("gfid", "rfid") or name.endswith("_fd") or name.startswith("fd_")


def compare(
    ours: Mapping[str, float], published: Mapping[str, float], sigmas: float, comparable: bool
) -> list[ComparedScore]:
    """Every published score beside ours, then our others.

    A distance passes if the two differ by at most `sigmas` standard errors of a difference of two
    samples, sqrt(2) times the standard error of ours. comparable: False gives no verdict.
    """
    error = next((v for k, v in ours.items() if k.endswith("standard_error")), None)
    rows = []
    for name in (*published, *(name for name in ours if name not in published)):
        here, there = ours.get(name), published.get(name)
        own_error = error if is_distance(name) else None
        tolerance = None if own_error is None else sigmas * 2**0.5 * own_error
        verdict: Verdict = ""
        if there is not None and not comparable:
            verdict = "not compared"
        elif here is not None and there is not None and tolerance is not None:
            verdict = "pass" if abs(here - there) <= tolerance else "fail"
        rows.append(ComparedScore(name, here, own_error, there, tolerance, verdict))
    return rows


def overall(rows: Sequence[ComparedScore]) -> Verdict:
    """fail if one score fails, else pass if one passes; "" if none could be decided."""
    order: tuple[Verdict, ...] = ("not compared", "fail", "pass")
    for verdict in order:
        if any(row.verdict == verdict for row in rows):
            return verdict
    return ""


def comparison_table(rows: Sequence[ComparedScore]) -> str:
    """The rows as a Markdown table."""
    lines = ["| score | ours | published | may differ by | verdict |", "|---|---|---|---|---|"]
    for row in rows:
        here = "-" if row.ours is None else f"{row.ours:.4f}"
        here += "" if row.error is None else f" ± {row.error:.4f}"
        there = "-" if row.published is None else f"{row.published:g}"
        may = "-" if row.tolerance is None or row.published is None else f"{row.tolerance:.4f}"
        lines.append(f"| {row.name} | {here} | {there} | {may} | {row.verdict or '-'} |")
    return "\n".join(lines)
