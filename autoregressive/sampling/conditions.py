"""The condition of every image of a sample run: a class, or a prompt."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from autoregressive.models.conditioning import ClassCondition, Condition, TextCondition
from autoregressive.models.config import GPTConfig
from autoregressive.sampling.config import ConditionConfig
from core.config import InputError
from core.data.config import Cleaning
from core.distributed.world import World, dtype_of
from core.files import check_regular_file
from core.rng import random_uniform
from language.text_encoder import TextEncoder, load_text_encoder

LABEL_STREAM = 3  # random stream of the class labels, independent of all other random numbers
CLASS_IMAGES = 50_000  # number of images behind a published FID
PROMPT_FIELDS = ("prompt", "caption", "text")  # accepted names of a jsonl field or table column


class ClassConditions:
    """One class per image.

    count: number of images. labels: (count,) int64. prompts, negative: always None. settings,
    index: values for settings.json and index.json.
    """

    prompts = negative = None

    def __init__(
        self, config: ConditionConfig, num_images: int | None, gpt: GPTConfig, seed: int
    ) -> None:
        if config.prompts or config.prompt or config.negative_prompt:
            raise InputError("prompts need a text model; this model is conditioned on classes")
        self.labels = sample_labels(config, num_images, gpt.num_classes, seed)
        self.count = len(self.labels)
        self.settings = {"labels": config.labels, "classes": list(config.classes)}
        self.index = {"image_labels": self.labels.tolist()}

    def __getitem__(self, ids: torch.Tensor) -> ClassCondition:
        """The condition of images ids (n,) int64."""
        return ClassCondition(torch.from_numpy(self.labels)[ids])

    def grid(self, rows: int, columns: int) -> tuple[np.ndarray, None]:
        """Image numbers of an image grid; images of classes have no captions."""
        return image_grid_ids(self.labels, rows, columns), None


class NoConditions:
    """Images of an unconditional model. The attributes are those of ClassConditions."""

    labels = prompts = negative = None

    def __init__(self, config: ConditionConfig, num_images: int | None) -> None:
        if config.classes or config.prompts or config.prompt or config.negative_prompt:
            raise InputError("this model is unconditional: leave classes and prompts out")
        self.count = num_images or CLASS_IMAGES
        self.settings: dict[str, Any] = {"condition": "none"}
        self.index: dict[str, Any] = {}

    def __getitem__(self, ids: torch.Tensor) -> ClassCondition:
        """The condition of images ids (n,) int64: the null class."""
        return ClassCondition(torch.zeros_like(ids))

    def grid(self, rows: int, columns: int) -> tuple[np.ndarray, None]:
        """Image numbers of an image grid, which are the first ones."""
        return np.arange(min(self.count, rows * columns)), None


def image_grid_ids(labels: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Image numbers of samples.png: a row per class if there are enough images, else the first."""
    classes = np.unique(labels)[:rows].tolist()
    by_class = [np.flatnonzero(labels == label)[:columns] for label in classes]
    if all(len(ids) == columns for ids in by_class):
        return np.concatenate(by_class)
    return np.arange(min(len(labels), rows * columns))


def sample_labels(
    config: ConditionConfig, num_images: int | None, num_classes: int, seed: int
) -> np.ndarray:
    """Class labels (num_images,) int64; label i depends only on the seed and on i."""
    ids = np.arange(num_images or CLASS_IMAGES)
    if config.classes:
        wrong = [label for label in config.classes if not 0 <= label < num_classes]
        if wrong:
            raise InputError(f"classes: {wrong[0]} is not in 0 .. {num_classes - 1}")
        return np.array(config.classes, np.int64)[ids % len(config.classes)]
    if config.labels == "balanced":
        return ids % num_classes
    stream = torch.tensor([LABEL_STREAM])
    uniform = random_uniform(seed, stream, torch.from_numpy(ids)).double()
    return (uniform * num_classes).long().numpy()


class Prompt(NamedTuple):
    """A prompt, its name (for file names), and the record that it came from, as JSON."""

    name: str
    text: str
    record: str


class PromptList(NamedTuple):
    """Prompts, each of `per_prompt` consecutive images."""

    all: list[Prompt]
    per_prompt: int

    def of_image(self, image: int) -> Prompt:
        """The prompt of image number `image`."""
        return self.all[image // self.per_prompt]


class PromptConditions:
    """One prompt per image.

    count: number of images. labels: always None. prompts: the prompts. negative: the condition
    (one row) that guidance leads away from, or None. settings, index: values for settings.json
    and index.json.
    """

    labels = None

    def __init__(
        self, config: ConditionConfig, num_images: int | None, gpt: GPTConfig, world: World
    ) -> None:
        if config.classes:
            raise InputError("classes need a class model; this model is conditioned on text")
        self.prompts = PromptList(read_prompts(config), config.images_per_prompt)
        total = len(self.prompts.all) * config.images_per_prompt
        self.count = min(num_images or total, total)
        self.encoder = load_gpt_text_encoder(
            gpt,
            config.text_encoder,
            world.device,
            dtype_of(config.text_encoder_precision),
            config.clean_prompts,
        )
        self.negative: Condition | None = None
        if config.negative_prompt:
            self.negative = TextCondition(*self.encoder.encode([config.negative_prompt]))
        # Keys and values stay those of folders that older versions began.
        self.settings = {
            "prompts": [prompt.text for prompt in self.prompts.all],
            "images_per_prompt": config.images_per_prompt,
            "negative_prompt": config.negative_prompt or "",
            "clean_prompts": config.clean_prompts,
            "t5": config.text_encoder,
            "t5_precision": config.text_encoder_precision,
        }
        self.index: dict[str, Any] = {"names": [prompt.name for prompt in self.prompts.all]}

    def __getitem__(self, ids: torch.Tensor) -> TextCondition:
        """The condition of images ids (n,) int64."""
        return TextCondition(*self.encoder.encode(self._texts(ids.tolist())))

    def grid(self, rows: int, columns: int) -> tuple[np.ndarray, list[str]]:
        """Image numbers of an image grid, which are the first ones, and their prompts."""
        ids = np.arange(min(self.count, rows * columns))
        return ids, self._texts(ids.tolist())

    def _texts(self, images: list[int]) -> list[str]:
        return [self.prompts.of_image(i).text for i in images]


Conditions = ClassConditions | PromptConditions | NoConditions


def open_conditions(
    config: ConditionConfig, num_images: int | None, gpt: GPTConfig, seed: int, world: World
) -> Conditions:
    """The conditions of images 0 .. num_images - 1.

    num_images: None for 50,000 images, or for all prompts of a text model.
    Raises InputError for a class or prompt that the model cannot read.
    """
    if gpt.condition == "none":
        return NoConditions(config, num_images)
    if gpt.condition == "class":
        return ClassConditions(config, num_images, gpt, seed)
    return PromptConditions(config, num_images, gpt, world)


def load_gpt_text_encoder(
    gpt: GPTConfig, source: str, device: torch.device, dtype: torch.dtype, clean: Cleaning
) -> TextEncoder:
    """Load a text encoder; raises InputError if the GPT was trained with another one."""
    encoder = load_text_encoder(source, device, dtype, gpt.max_text_tokens, clean)
    if encoder.dim != gpt.text_dim:
        raise InputError(
            f"{source}: its features have {encoder.dim} dimensions, the model reads {gpt.text_dim}"
        )
    if gpt.text_encoder and gpt.text_encoder != encoder.identity:
        raise InputError(f"{source}: the model was trained with another text encoder")
    return encoder


def prompt_encoder(
    gpt: GPTConfig, text_encoder: str, device: torch.device
) -> Callable[[str | int, str | None], tuple[Condition, Condition | None]]:
    """A function from one class or prompt, and a negative prompt, to the GPT's conditions.

    The text encoder, of a text model only, is loaded here, with the usual precision and cleaning.
    """
    if gpt.condition == "class":
        return lambda label, _: (ClassCondition(torch.tensor([int(label)])), None)
    usual = ConditionConfig()
    dtype = dtype_of(usual.text_encoder_precision)
    encoder = load_gpt_text_encoder(gpt, text_encoder, device, dtype, usual.clean_prompts)

    def encode(prompt: str | int, negative: str | None) -> tuple[Condition, Condition | None]:
        away = TextCondition(*encoder.encode([negative])) if negative else None
        return TextCondition(*encoder.encode([str(prompt)])), away

    return encode


def read_prompts(config: ConditionConfig) -> list[Prompt]:
    """Read the prompts of a file or folder, or the single prompt; blank lines are skipped."""
    if config.prompt:
        return [Prompt("prompt", config.prompt, json.dumps({"prompt": config.prompt}))]
    path = config.prompts
    if path is None:
        raise InputError(
            "this model is conditioned on text: give conditions.prompts or conditions.prompt"
        )
    try:
        prompts = _read(path)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error})") from error
    except csv.Error as error:
        raise InputError(f"{path}: not a table ({error})") from error
    if not prompts:
        raise InputError(f"{path}: contains no prompt")
    return prompts


def _read(path: Path) -> list[Prompt]:
    if path.is_dir():
        files = sorted(path.glob("*.txt"))
        return [_prompt(p.stem, {"prompt": p.read_text("utf-8").strip()}, p) for p in files]
    check_regular_file(path)
    lines = path.read_text("utf-8").splitlines()
    if path.suffix in (".tsv", ".csv"):
        table = csv.DictReader(lines, delimiter="\t" if path.suffix == ".tsv" else ",")
        records: list[dict[str, Any]] = list(table)
    elif path.suffix == ".jsonl":
        records = [_json(line, path) for line in lines if line.strip()]
    else:
        records = [{"prompt": line.strip()} for line in lines if line.strip()]
    return [_prompt(f"{i:05d}", record, path) for i, record in enumerate(records)]


def _json(line: str, path: Path) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected one JSON object per line ({error})") from error
    return record if isinstance(record, dict) else {}


def _prompt(name: str, record: dict[str, Any], path: Path) -> Prompt:
    plain = {str(key).lower(): value for key, value in record.items()}
    text = next((plain[key] for key in PROMPT_FIELDS if plain.get(key)), None)
    if not isinstance(text, str) or not text.strip():
        fields = ", ".join(PROMPT_FIELDS)
        raise InputError(f"{path}: record {name} has no text in any of the fields {fields}")
    return Prompt(name, text, json.dumps(record, ensure_ascii=False))
