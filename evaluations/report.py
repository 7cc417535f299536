"""Tables and plots: which classes make the distance, and how a sweep trades quality for variety."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

SHOWN_CLASSES = 20


def write_class_report(
    influence: np.ndarray, labels: np.ndarray, classes: Sequence[str], distance: str, out: Path
) -> None:
    """classes.csv and classes.png: how much each class raises the distance, the worst first.

    influence, labels: (n,). A class's effect is its share times its mean influence: about what the
    distance would fall by without the class. The effects add up to 0.
    """
    rows = []
    for label in np.unique(labels):
        here = influence[labels == label]
        name = classes[label] if label < len(classes) else str(label)
        effect = float(here.sum() / len(labels))
        rows.append({"class": name, "n": len(here), "effect": effect})
    rows.sort(key=lambda row: -row["effect"])
    write_csv(rows, out / "classes.csv")
    worst = rows[:SHOWN_CLASSES]
    figure, axis = _figure()
    axis.barh([row["class"] for row in worst][::-1], [row["effect"] for row in worst][::-1])
    axis.set(title=f"classes that raise {distance} most", xlabel=f"effect on {distance}")
    _save(figure, out / "classes.png")


def plot_trade(rows: Sequence[dict[str, Any]], x: str, y: str, note: str, path: Path) -> None:
    """Score `y` against score `x`, a point per run, joined in the order of the sweep."""
    figure, axis = _figure()
    axis.plot([row[x] for row in rows], [row[y] for row in rows], marker="o")
    for row in rows:
        axis.annotate(row["run"], (row[x], row[y]), fontsize=7)
    axis.set(xlabel=x, ylabel=y, title=note)
    axis.grid(alpha=0.3)
    _save(figure, path)


def write_csv(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Rows as CSV, whole or not at all; the columns are those of any row."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    aside = path.with_name(f".{path.name}.tmp")
    with aside.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(aside, path)


def _figure() -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(6, 4.5))


def _save(figure: Any, path: Path) -> None:  # noqa: ANN401 - a matplotlib figure
    from matplotlib import pyplot

    aside = path.with_name(f".{path.name}.tmp")
    figure.tight_layout()
    figure.savefig(aside, format="png", dpi=100)
    pyplot.close(figure)
    os.replace(aside, path)
