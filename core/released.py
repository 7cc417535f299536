"""The released checkpoints that this project loads: one table, read from configs/released/*.yaml.

A name of the table is accepted wherever a path or a Hub id is: `--gpt llamagen_l_384`. Entries are
plain data, so that this file knows no model; the fields of `architecture` are those of the model's
own configuration.
"""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from core.errors import InputError

FOLDER = Path(__file__).parent.parent / "configs" / "released"
SAMPLES = 50_000  # images behind a published FID, unless the entry says otherwise

Kind = Literal["tokenizer", "gpt"]


@dataclass(frozen=True)
class PublishedScores:
    """Scores that the authors published, and how they were measured.

    Args:
        metrics: Scores by the names of our scores.json.
        image_size: Side of the images that were compared, in pixels.
        num_images: Number of images.
        reference: What they were compared with; null if the source does not state it.
        interpolation: How images were resized, which alone can move rFID by 0.2; null if unknown.
        source: The file or paper that the numbers are from.
        note: What else a reader of the numbers should know.
    """

    metrics: Mapping[str, float]
    image_size: int
    source: str
    num_images: int = SAMPLES
    reference: str | None = None
    interpolation: str | None = None
    note: str = ""


@dataclass(frozen=True)
class ReleasedModel:
    """A released checkpoint.

    Args:
        name: How commands call it.
        kind: tokenizer or gpt.
        source: The file or paper that this entry is from.
        repository: `owner/name` on the Hub; null if unknown.
        file: The file's name in the repository, or a pattern with * that one file matches; null
            if unknown.
        revision: The commit to download; null for the newest.
        sha256: Of the file; null if unknown.
        architecture: Fields of VQConfig or GPTConfig.
        tokenizer: Name of the tokenizer whose codes a gpt was trained on; null if unknown.
        sampling: Fields of SamplingConfig, as published.
        scores: What was published.
        licence: Licence of the weights; null if the source does not state it.
        paper: Where the model is described; null if unknown.
        note: What else a user should know.
    """

    name: str
    kind: Kind
    source: str
    repository: str | None = None
    file: str | None = None
    revision: str | None = None
    sha256: str | None = None
    architecture: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    scores: tuple[PublishedScores, ...] = ()
    licence: str | None = None
    paper: str | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if self.kind not in ("tokenizer", "gpt"):
            raise ValueError(f"{self.name}: kind is {self.kind}, must be tokenizer or gpt")
        if self.sha256 is not None and len(self.sha256) != 64:
            raise ValueError(f"{self.name}: sha256 must have 64 hex digits")

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of codes of a gpt."""
        grid = self.architecture.get("grid")
        return None if grid is None else (grid[0], grid[1])

    @property
    def location(self) -> str:
        """`owner/name/file` on the Hub, as far as it is known."""
        return "/".join(part for part in (self.repository, self.file) if part) or "unknown"


def read_released(folder: Path = FOLDER) -> dict[str, ReleasedModel]:
    """Every entry of the YAML files of a folder, by name.

    Raises InputError, naming file and entry, for an unknown or missing field or a name given twice.
    """
    models: dict[str, ReleasedModel] = {}
    for path in sorted(Path(folder).glob("*.yaml")):
        try:
            stored = yaml.safe_load(path.read_text("utf-8"))
            shared = stored["defaults"]
            entries = [(name, {**shared, **own}) for name, own in stored["models"].items()]
        except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: not a table of released models ({error})") from error
        for name, entry in entries:
            if name in models:
                raise InputError(f"{path}: {name} is named twice")
            models[name] = _model(path, name, entry)
    return models


def _model(path: Path, name: str, entry: dict[str, Any]) -> ReleasedModel:
    try:
        scores = tuple(
            PublishedScores(**{"source": entry["source"], **score})
            for score in entry.get("scores", ())
        )
        architecture = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in entry.get("architecture", {}).items()
        }
        facts = {**entry, "scores": scores, "architecture": architecture}
        return ReleasedModel(name=name, **facts)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        known = ", ".join(item.name for item in fields(ReleasedModel))
        raise InputError(f"{path}: {name}: {error} (fields: {known})") from error


@functools.cache
def released_models() -> Mapping[str, ReleasedModel]:
    """The project's own table; empty if the package was installed without its configs."""
    return read_released()


def find_released(name: object) -> ReleasedModel | None:
    """The entry called `name`, or None: then it is a path or a Hub id."""
    return released_models().get(str(name))


def released_architecture(source: object) -> dict[str, Any]:
    """The fields that the table tells of a released model, by its name or its place on the Hub.

    {} for a local path, or for what the table does not know.
    """
    if Path(str(source)).exists():
        return {}
    by_place = (m for m in released_models().values() if m.file and m.location == str(source))
    model = find_released(source) or next(by_place, None)
    return dict(model.architecture) if model else {}


def released_table(models: Iterable[ReleasedModel]) -> str:
    """The entries as a Markdown table, one row each."""
    rows = [("name", "kind", "published", "measured with", "weights", "source")]
    rows += [_row(model) for model in models]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def unpinned_text(models: Iterable[ReleasedModel]) -> str:
    """A sentence about the files whose sha256 the table does not know; "" for none."""
    files = [model for model in models if model.repository and model.file]
    unknown = [model.name for model in files if model.sha256 is None]
    if not unknown:
        return ""
    which = "any of these files" if len(unknown) == len(files) else ", ".join(unknown)
    return (
        f"No sha256 is known for {which}: a download is compared with the one that the Hub itself\n"
        "gives, and reports record it."
    )


def _row(model: ReleasedModel) -> tuple[str, ...]:
    published = "; ".join(_score_text(score) for score in model.scores) or "-"
    settings = [f"{key} {value}" for key, value in model.sampling.items() if key in _SHOWN]
    settings += sorted({score.interpolation for score in model.scores if score.interpolation})
    weights = f"`{model.location}`" if model.repository else "not stated"
    weights += f" @{model.revision[:7]}" if model.revision else ""
    weights += f" sha256 {model.sha256[:8]}" if model.sha256 else ""
    return (
        f"`{model.name}`",
        model.kind,
        published,
        ", ".join(settings) or "-",
        weights,
        f"{model.source}; {model.paper}" if model.paper else model.source,
    )


_SHOWN = ("cfg_scale", "guidance")
_SHORT = {"gfid": "FID", "rfid": "rFID", "inception_score_adm": "IS"}


def _score_text(score: PublishedScores) -> str:
    shown = [f"{_SHORT[name]} {value}" for name, value in score.metrics.items() if name in _SHORT]
    return f"{', '.join(shown)} ({score.image_size} px)"
