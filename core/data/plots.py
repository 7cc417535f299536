"""Plots as png files, drawn without a screen."""

from pathlib import Path
from typing import Any

from core.files import atomic_write


def subplots(rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:  # noqa: ANN401
    """matplotlib's pyplot.subplots -> the figure, and its axis or array of axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, **options)


def save_plot(figure: Any, path: Path, dpi: int = 100) -> None:  # noqa: ANN401 - matplotlib's
    """Write a figure of `subplots` atomically, and close it."""
    from matplotlib import pyplot

    figure.tight_layout()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=dpi)
    pyplot.close(figure)
