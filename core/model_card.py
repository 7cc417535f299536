"""A model on the Hub: its folder with a model card, uploaded as one commit.

The card says what the model is, what it was trained on, how to load it, and what was measured on
these weights and how. Only results whose folder names the weights' sha256 are taken.
"""

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from torch import nn

from core.checksums import CHECKSUMS, FileSums, write_checksums
from core.config_checks import check_config_file
from core.errors import InputError
from core.files import read_record, write_text
from core.hub import HubFile, parse_hub_id, push_to_hub
from core.lock import writer_lock
from core.released import find_released
from core.weights import Weights, save_model

FILES = ("config.yaml", "model.safetensors")
CARD = "README.md"
TRAINING = "training.yaml"
GRIDS = ("samples.png", "reconstructions.png")  # as sampling and reconstruction write them
# How model cards call our scores. Any other name is kept: a proxy's distance is never called FID.
METRIC_NAMES = {"gfid": "FID", "rfid": "rFID", "sfid": "sFID", "inception_score_adm": "IS"}


@dataclass(frozen=True, kw_only=True)
class CardConfig:
    """What the model card says besides what the model's own files tell.

    Args:
        results: Folders of autoregressive.sample, evaluations.score or tokenizer.reconstruct that
            were made with these weights: their scores, with the protocol, and their image grid.
        dataset: What the model was trained on, e.g. ImageNet-1k train; null for what the run's own
            configuration says.
        licence: Licence of the weights, by the Hub's name for it (mit, apache-2.0); null to state
            none.
        private: Create the repository as a private one.
    """

    results: tuple[Path, ...] = ()
    dataset: str | None = None
    licence: str | None = None
    private: bool = False


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Which weights of a model to export, and where to.

    Args:
        out: Output folder; null if push_to is given and no folder is wanted.
        weights: Which weights to take; auto takes the EMA weights of our runs.
        verify_weights: Compare the files of our checkpoints with their checksums.
        push_to: Upload the folder with a model card to `owner/name[@branch]` on the Hub; null for
            no upload.
        card: What the model card says.
    """

    out: Path | None = None
    weights: Weights = "auto"
    verify_weights: bool = True
    push_to: str | None = None
    card: CardConfig = field(default_factory=CardConfig)


class ModelDescription(NamedTuple):
    """What a card says about a model.

    source: What it was loaded from. sha256: Of the file of weights that was read. config: The
    model's configuration as YAML. loader: The class that loads it, e.g. autoregressive.GPT.
    task: The Hub's name of the task.
    """

    kind: Literal["tokenizer", "gpt"]
    source: str
    sha256: str
    parameters: int
    config: str
    loader: str
    task: str


class Result(NamedTuple):
    """Scores that were measured on the weights, and their protocol as name and value."""

    scores: dict[str, float]
    protocol: dict[str, Any]
    grid: Path | None


def check_results(description: ModelDescription, card: CardConfig) -> list[Result]:
    """The results that the card will show.

    Raises InputError for a folder without any, or whose weights are others or are not named.
    """
    return [_read_result(folder, description) for folder in card.results]


def export_model(model: nn.Module, description: ModelDescription, config: ExportConfig) -> None:
    """Write a folder of config.yaml and model.safetensors, upload it, or both; print where it is.

    Raises InputError, before anything is written, for a target or results that cannot be.
    """
    if config.push_to:
        check_target(config.push_to)
        check_results(description, config.card)
        _training_config(Path(description.source))
    with tempfile.TemporaryDirectory() as temporary:
        folder = config.out or Path(temporary)
        with writer_lock(folder):
            (folder / CHECKSUMS).unlink(missing_ok=True)  # of what was here before
            save_model(model, description.config, folder)
            sums = {name: FileSums.of(folder / name) for name in FILES}
            # By the default choice of weights alone does a file's sha256 stand for its weights.
            source = description.sha256 if config.weights == "auto" else None
            write_checksums(folder, sums, source)
        if config.push_to:
            print(publish_model(folder, config.push_to, description, config.card))
    if config.out:
        print(config.out)


def publish_model(
    folder: Path, push_to: str, description: ModelDescription, card: CardConfig
) -> str:
    """Write the card into a folder of config.yaml and model.safetensors, and upload it -> the URL.

    push_to: `owner/name[@branch]`. Raises InputError for another form, or if the upload fails.
    """
    target = check_target(push_to)
    results = check_results(description, card)
    files = [*FILES, CHECKSUMS, CARD]
    training = _training_config(Path(description.source))
    if training:
        shutil.copyfile(training, folder / TRAINING)
        files.append(TRAINING)
    images = []
    for result in results:
        if result.grid:
            images.append(f"{len(images)}_{result.grid.name}")
            shutil.copyfile(result.grid, folder / images[-1])
    text = card_text(target.repository, description, card, results, images, training)
    write_text(folder / CARD, text)
    message = f"Upload {description.kind} {description.sha256[:12]}"
    files += images
    return push_to_hub(folder, target.repository, files, message, card.private, target.revision)


def check_target(push_to: str) -> HubFile:
    """The repository and branch of `owner/name[@branch]`; raises InputError for another form."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    target = parse_hub_id(push_to)
    if target is None or target.filename:
        raise InputError(f"push_to is {push_to}, must be owner/name or owner/name@branch")
    try:
        validate_repo_id(target.repository)
    except HFValidationError as error:
        raise InputError(f"push_to: {error}") from error
    return target


def card_text(
    repository: str,
    description: ModelDescription,
    card: CardConfig,
    results: list[Result],
    images: list[str],
    training: Path | None,
) -> str:
    """The card: metadata that the Hub reads, then Markdown."""
    name, (module, loader) = repository.split("/")[1], description.loader.split(".")
    parts = [f"# {name}", *(f"![samples]({image})" for image in images)]
    what = "An image tokenizer (VQGAN)" if description.kind == "tokenizer" else "A GPT over codes"
    parts.append(
        f"{what} of {description.parameters:,} parameters, exported from weights with sha256 "
        f"`{description.sha256}`."
    )
    code = f'from {module} import {loader}\n\nmodel = {loader}.from_pretrained("{repository}")'
    parts.append(f"## Use\n\n```python\n{code}\n```")
    parts.append(f"## Training\n\n{_training_text(description, card, training)}")
    parts.append(f"## Scores\n\n{_scores_text(results)}")
    parts.append(f"## Configuration\n\n```yaml\n{description.config.strip()}\n```")
    metadata = _metadata(name, description, card, results)
    return f"---\n{metadata}\n---\n\n" + "\n\n".join(parts) + "\n"


def _metadata(
    name: str, description: ModelDescription, card: CardConfig, results: list[Result]
) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    measured = [
        EvalResult(
            task_type=description.task,
            dataset_type="custom",
            dataset_name=str(result.protocol.get("reference") or "see the card"),
            metric_type=METRIC_NAMES.get(metric, metric),
            metric_value=value,
        )
        for result in results
        for metric, value in result.scores.items()
    ]
    data = ModelCardData(
        license=card.licence,
        pipeline_tag=description.task,
        tags=["image-generation", "autoregressive", description.kind],
        model_name=name if measured else None,
        eval_results=measured or None,
    )
    return data.to_yaml()


def _training_text(description: ModelDescription, card: CardConfig, training: Path | None) -> str:
    lines = []
    released = find_released(description.source)
    if released:
        lines.append(
            f"Converted from the released `{released.location}` ({released.source}"
            f"{f'; {released.paper}' if released.paper else ''}). {released.note}".strip()
        )
    if card.dataset:
        lines.append(f"Trained on {card.dataset}.")
    if training:
        stored = yaml.safe_load(training.read_text("utf-8"))
        steps = Path(description.source).glob("checkpoints/step_*")
        last = max((path.name for path in steps), default=Path(description.source).name)
        shown = {key: stored[key] for key in ("data", "tokenizer", "training") if key in stored}
        text = yaml.safe_dump(shown, sort_keys=False).strip()
        lines.append(
            f"Checkpoint `{last}` of a run whose whole configuration is in [{TRAINING}]"
            f"({TRAINING}):\n\n```yaml\n{text}\n```"
        )
    return "\n\n".join(lines) or "Not recorded."


def _scores_text(results: list[Result]) -> str:
    if not results:
        return "None were measured on these weights."
    tables = []
    for result in results:
        rows = ["| score | value |", "|---|---|"]
        rows += [f"| {METRIC_NAMES.get(k, k)} | {v:.4g} |" for k, v in result.scores.items()]
        protocol = "\n".join(f"- {key}: {value}" for key, value in result.protocol.items())
        tables.append("\n".join(rows) + f"\n\nMeasured with:\n\n{protocol}")
    return "\n\n".join(tables)


def _training_config(source: Path) -> Path | None:
    """The configuration of the run that a run or checkpoint folder belongs to.

    Raises InputError if it is damaged.
    """
    run = source.parent.parent if source.parent.name == "checkpoints" else source
    path = run / "config.yaml"
    if not (run / "checkpoints").is_dir() or not path.is_file():
        return None
    check_config_file(path)
    return path


# What scores.json says about how it was measured, in the order of the card.
_PROTOCOL = ("n", "name", "note", "reference", "reference_sha256", "weights_sha256", "commit")
_SETTINGS = ("sampling", "resize", "image_size", "data")


def _read_result(folder: Path, description: ModelDescription) -> Result:
    path = folder / "scores.json"
    stored = {"settings": {}, **read_record(path, {})}
    settings = stored["settings"]
    if not isinstance(settings, dict):
        raise InputError(f"{path}: settings is {str(settings)[:60]}, expected a JSON object")
    found = _measured_sha256(folder, stored, f"{description.kind}_sha256")
    if found is None:
        raise InputError(f"{folder}: does not say which weights were measured; nothing is uploaded")
    if found != description.sha256:
        raise InputError(
            f"{folder}: measured on weights with sha256 {str(found)[:12]}, these have "
            f"{description.sha256[:12]}"
        )
    scores = {name: value for name, value in stored.items() if isinstance(value, float)}
    protocol = {name: stored[name] for name in _PROTOCOL if stored.get(name)}
    protocol |= {name: settings[name] for name in _SETTINGS if settings.get(name)}
    grids = [folder / name for name in GRIDS if (folder / name).is_file()]
    return Result(scores, protocol, grids[0] if grids else None)


def _measured_sha256(folder: Path, stored: dict[str, Any], key: str) -> str | None:
    """The sha256 that scores.json names, or the samples that it scored."""
    if key in stored:
        return stored[key]
    for samples in (folder, Path(str(stored.get("settings", {}).get("samples", folder)))):
        if (samples / "settings.json").is_file():
            return read_record(samples / "settings.json", {}).get(key)
    return None
