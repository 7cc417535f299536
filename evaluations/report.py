"""Reports: scores.json, the influence of classes on the distance, and plots of sweeps."""

import csv
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core.data.plots import save_plot, subplots
from core.data.skip_log import Skipped
from core.distributed.provenance import commit
from core.distributed.world import World
from core.files import atomic_write, write_json
from evaluations.evaluator import FeatureStatistics, extract_features
from evaluations.features.extractors import note_of
from evaluations.image_source import ImageSource
from evaluations.metrics.inception_score import ADM_SPLIT, FIDELITY_SPLITS, SEED
from evaluations.scorer import Scorer, check_size, score

logger = logging.getLogger(__name__)

FEW_SAMPLES = 10_000  # with fewer, the bias exceeds the differences that papers report
SHOWN_CLASSES = 20
FIGURE_SIZE = (6, 4.5)  # inches


class Scored(NamedTuple):
    """A set of images to score.

    labels: (n,) of all ids, or None. classes: their names, may be empty. skipped: of this rank.
    """

    statistics: FeatureStatistics
    labels: np.ndarray | None
    classes: Sequence[str]
    skipped: list[Skipped]


def publish(
    scorer: Scorer, scored: Scored, out: Path, settings: dict[str, Any], world: World
) -> dict[str, float]:
    """Score, write scores.json and the class report, and print them.

    All ranks call it. Returns the scores by name on rank 0, {} on other ranks.
    """
    skipped = [item for rank in world.gather(scored.skipped) for item in rank]
    if not world.is_main:
        return {}
    scores = score(scorer, scored.statistics)
    count, note = len(scored.statistics.ids), note_of(scorer.extractor)
    out.mkdir(parents=True, exist_ok=True)
    facts = _facts(scorer, scored) | {"skipped": [list(item) for item in skipped]}
    write_json(out / "scores.json", {**scores.values, **facts, "settings": settings})
    if count < FEW_SAMPLES:
        logger.warning("only %d samples: the distance is biased upwards", count)
    if scores.influence is not None and scored.labels is not None:
        labels = scored.labels[scored.statistics.ids.numpy()]
        change = scores.influence.numpy()
        write_class_report(change, labels, scored.classes, scorer.distance, out)
        print(out / "classes.png")
    print(f"{count} images{f'; {note}' if note else ''}")
    for name, value in scores.values.items():
        print(f"{name}: {value:.4f}")
    print(out / "scores.json")
    return scores.values


def score_source(
    scorer: Scorer,
    images: ImageSource,
    out: Path,
    settings: dict[str, Any],
    num_workers: int,
    world: World,
) -> dict[str, float]:
    """Score all images of a source and publish the scores in `out`; see publish."""
    check_size(images.size, images.source, scorer.reference)
    statistics = extract_features(scorer.extractor, images, world, scorer.batch_size, num_workers)
    scored = Scored(statistics, images.labels, images.classes, images.skipped)
    return publish(scorer, scored, out, settings, world)


def variety_score(scores: dict[str, Any], default: str) -> str:
    """The name of the score to plot the distance against: Inception Score, else recall."""
    endings = ("inception_score", "recall")
    return next((name for end in endings for name in scores if name.endswith(end)), default)


def _facts(scorer: Scorer, scored: Scored) -> dict[str, Any]:
    """Everything that the scores depend on."""
    ids = scored.statistics.ids
    note, features = note_of(scorer.extractor), scorer.reference_features
    # Papers call it FID-50k only for 50,000 images.
    label = "FID-50k" if len(ids) == 50_000 else "not FID-50k"
    balance = None
    if scored.labels is not None:
        sizes = np.unique(scored.labels[ids.numpy()], return_counts=True)[1]
        balance = {"classes": len(sizes), "least": int(sizes.min()), "most": int(sizes.max())}
    return {
        "n": len(ids),
        "name": f"{scorer.distance} of {len(ids)} images" + ("" if note else f" ({label})"),
        "note": note,
        "reference": scorer.reference.path.name,
        "reference_sha256": scorer.reference.sha256,
        "reference_images": 0 if features is None else len(features),
        "weights_sha256": scorer.extractor.weights_sha256,
        "inception_score_splits": f"{ADM_SPLIT} per split, shuffled; adm: {ADM_SPLIT}, unshuffled; "
        f"fidelity: {FIDELITY_SPLITS} splits, shuffled",
        "inception_score_seed": SEED,
        "class_balance": balance,
        "commit": commit(),
    }


def write_class_report(
    influence: np.ndarray, labels: np.ndarray, classes: Sequence[str], distance: str, out: Path
) -> None:
    """Write classes.csv and classes.png: the effect of each class on the distance, worst first.

    influence, labels: (n,). The effect of a class is its share times its mean influence, which
    approximates how much the distance would fall without the class. The effects sum to 0.
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
    figure, axis = subplots(figsize=FIGURE_SIZE)
    axis.barh([row["class"] for row in worst][::-1], [row["effect"] for row in worst][::-1])
    axis.set(title=f"classes with the largest effect on {distance}", xlabel=f"effect on {distance}")
    save_plot(figure, out / "classes.png")


def write_comparison(
    rows: Sequence[dict[str, Any]], distance: str, x: str, note: str, out: Path, name: str
) -> Path:
    """Write NAME.csv and NAME.png, the distance of every run against its variety -> the plot.

    The horizontal axis is the Inception Score if there is one (the usual plot), else recall, else
    the column `x`.
    """
    write_csv(rows, out / f"{name}.csv")
    plot_trade(rows, variety_score(rows[0], x), distance, note, out / f"{name}.png")
    return out / f"{name}.png"


def plot_trade(rows: Sequence[dict[str, Any]], x: str, y: str, note: str, path: Path) -> None:
    """Plot score `y` against score `x`: a point per run, joined in the order of the sweep."""
    figure, axis = subplots(figsize=FIGURE_SIZE)
    axis.plot([row[x] for row in rows], [row[y] for row in rows], marker="o")
    for row in rows:
        axis.annotate(row["run"], (row[x], row[y]), fontsize=7)
    axis.set(xlabel=x, ylabel=y, title=note)
    axis.grid(alpha=0.3)
    save_plot(figure, path)


def write_csv(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write rows as CSV atomically. The columns are the union of the rows' keys."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with atomic_write(path, "w") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
