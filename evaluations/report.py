"""What people look at: scores.json, which classes make the distance, and a sweep's plot."""

import csv
import logging
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core.data.skip_log import Skipped
from core.distributed.world import World
from core.files import atomic_write, write_json
from evaluations.evaluator import Collected
from evaluations.features.extractors import note_of
from evaluations.metrics.inception_score import ADM_SPLIT, FIDELITY_SPLITS, SEED
from evaluations.scorer import Scorer, score

logger = logging.getLogger(__name__)

FEW_SAMPLES = 10_000  # below, the distance's bias exceeds the differences that papers report
SHOWN_CLASSES = 20


class Scored(NamedTuple):
    """What was looked at: features, labels of all ids (or None), class names, this rank's skips."""

    collected: Collected
    labels: np.ndarray | None
    classes: Sequence[str]
    skipped: list[Skipped]


def publish(
    judge: Scorer, scored: Scored, out: Path, settings: dict[str, Any], world: World
) -> dict[str, float]:
    """Score, write scores.json and the class report, print them -> the scores (empty off rank 0).

    All ranks call it.
    """
    skipped = [item for rank in world.gather(scored.skipped) for item in rank]
    if not world.is_main:
        return {}
    scores = score(judge, scored.collected)
    count, note = len(scored.collected.ids), note_of(judge.detector)
    out.mkdir(parents=True, exist_ok=True)
    facts = _facts(judge, scored) | {"skipped": [list(item) for item in skipped]}
    write_json(out / "scores.json", {**scores.values, **facts, "settings": settings})
    if count < FEW_SAMPLES:
        logger.warning("only %d samples: the distance is biased upwards", count)
    if scores.influence is not None and scored.labels is not None:
        labels = scored.labels[scored.collected.ids.numpy()]
        change = scores.influence.numpy()
        write_class_report(change, labels, scored.classes, judge.distance, out)
        print(out / "classes.png")
    for name, value in scores.values.items():
        print(f"{name}{f' ({note})' if note else ''}: {value:.4f} on {count} images")
    print(out / "scores.json")
    return scores.values


def _facts(judge: Scorer, scored: Scored) -> dict[str, Any]:
    """What the scores depend on."""
    ids = scored.collected.ids
    note = note_of(judge.detector)
    # Only 50,000 images make what papers call FID-50k.
    label = note or ("FID-50k" if len(ids) == 50_000 else "not FID-50k")
    balance = None
    if scored.labels is not None:
        sizes = np.unique(scored.labels[ids.numpy()], return_counts=True)[1]
        balance = {"classes": len(sizes), "least": int(sizes.min()), "most": int(sizes.max())}
    return {
        "n": len(ids),
        "name": f"{judge.distance} of {len(ids)} images ({label})",
        "note": note,
        "reference": judge.reference.path.name,
        "reference_sha256": judge.reference.sha256,
        "reference_images": 0 if judge.real is None else len(judge.real),
        "weights_sha256": judge.detector.weights_sha256,
        "inception_score_splits": f"{ADM_SPLIT} a split, shuffled; adm: {ADM_SPLIT}, unshuffled; "
        f"fidelity: {FIDELITY_SPLITS} splits, shuffled",
        "inception_score_seed": SEED,
        "class_balance": balance,
        "commit": _commit(),
    }


def _commit() -> str:
    """The commit of this code, or "" outside a git checkout."""
    git = shutil.which("git")
    if git is None:
        return ""
    here = Path(__file__).parent
    done = subprocess.run([git, "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True)
    return done.stdout.strip()


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
    with atomic_write(path, "w") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _figure() -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(6, 4.5))


def _save(figure: Any, path: Path) -> None:  # noqa: ANN401 - a matplotlib figure
    from matplotlib import pyplot

    figure.tight_layout()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=100)
    pyplot.close(figure)
