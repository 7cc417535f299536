"""Results of variants, trained with several seeds: kept as JSON, shown as a table and a plot."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.data.plots import save_plot, subplots
from core.errors import InputError
from core.files import read_record, write_json, write_text

NOTE = (
    "Mean over seeds, and in brackets the smallest and the largest. Bold: this range does not "
    "touch that of the first row. Everything else is within the spread."
)


class Results:
    """The rows of finished runs in a JSON file: variant, seed and scores.

    settings: What all rows have in common; a file of other settings is refused with InputError.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = path, dict(settings)
        self.rows: list[dict[str, Any]] = []
        if path.is_file():
            found = read_record(path, {"settings": dict, "rows": list[dict]})
            if found["settings"] != self.settings:
                raise InputError(f"{path}: has results of other settings; choose another folder")
            self.rows = found["rows"]

    def has(self, variant: str, seed: int) -> bool:
        """Whether this run is finished."""
        return any(row["variant"] == variant and row["seed"] == seed for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Keep a finished run."""
        self.rows.append(row)
        write_json(self.path, {"settings": self.settings, "rows": self.rows})

    def values(self, variant: str, score: str) -> list[float]:
        """One value per finished run of a variant."""
        return [row[score] for row in self.rows if row["variant"] == variant]

    def write(
        self,
        scores: Mapping[str, str],
        costs: Mapping[str, str],
        floor: Mapping[str, float] | None = None,
    ) -> str:
        """Write table.md and scores.png beside the JSON -> the table.

        scores, costs: name of a value in the rows -> its heading; scores are compared and drawn.
        floor: scores of real images.
        """
        variants = list(dict.fromkeys(row["variant"] for row in self.rows))
        columns = [*scores.values(), *costs.values()]
        lines = [
            f"| variant | seeds | {' | '.join(columns)} |",
            "|---" * (len(columns) + 2) + "|",
        ]
        for variant in variants:
            entries = [self._shown(variant, variants[0], score) for score in scores]
            entries += [f"{statistics.mean(self.values(variant, cost)):.3g}" for cost in costs]
            seeds = len(self.values(variant, "seed"))
            lines.append(f"| `{variant}` | {seeds} | {' | '.join(entries)} |")
        if floor:
            entries = [f"{floor[score]:.4g}" if score in floor else "-" for score in scores]
            lines.append(f"| real images | - | {' | '.join([*entries, *['-' for _ in costs]])} |")
        table = "\n".join([*lines, "", NOTE, ""])
        write_text(self.path.with_name("table.md"), table)
        self._plot(variants, scores)
        return table

    def _shown(self, variant: str, baseline: str, score: str) -> str:
        ours, theirs = self.values(variant, score), self.values(baseline, score)
        text = f"{statistics.mean(ours):.4g} ({min(ours):.4g} to {max(ours):.4g})"
        repeated = min(len(ours), len(theirs)) > 1
        apart = repeated and (min(ours) > max(theirs) or max(ours) < min(theirs))
        return f"**{text}**" if apart else text

    def _plot(self, variants: list[str], scores: Mapping[str, str]) -> None:
        figure, axes = subplots(1, len(scores), figsize=(3 * len(scores), 3), squeeze=False)
        for axis, (score, heading) in zip(axes[0], scores.items(), strict=True):
            for place, variant in enumerate(variants):
                values = self.values(variant, score)
                mean = statistics.mean(values)
                bars = [[mean - min(values)], [max(values) - mean]]
                axis.errorbar([mean], [-place], xerr=bars, fmt="o", capsize=3)
            axis.set_yticks([-place for place in range(len(variants))], variants)
            axis.set_xlabel(heading)
        save_plot(figure, self.path.with_name("scores.png"))
