"""What each image of a sample shows: a class, or a prompt."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from autoregressive.models.config import GPTConfig
from core.config import InputError
from core.distributed.world import Precision, World, dtype_of
from core.rng import random_uniform
from language.captions import Cleaning, cleaned
from language.t5 import T5, load_t5

LABEL_STREAM = 3  # tells the draw of a sample's class from its other draws
CLASS_IMAGES = 50_000  # as many as FID is published for
PROMPT_FIELDS = ("prompt", "caption", "text")  # of a jsonl line or a table's column


@dataclass(frozen=True, kw_only=True)
class ConditionConfig:
    """What the images show.

    Args:
        num_images: How many images; 0 for 50,000 under classes, or for all prompts.
        classes: Sample image i under classes[i % len]; empty to follow `labels`.
        labels: random draws a class per image (as published); balanced takes them in turn.
        prompts: For a text model: a .txt (a prompt a line), .tsv or .csv (a column prompt, caption
            or text), .jsonl (such a field), or a folder of .txt files, one prompt each.
        prompt: One prompt, instead of a file.
        images_per_prompt: Images of each prompt, one after the other.
        negative_prompt: What guidance leads away from; empty for the null caption.
        clean_prompts: clean (as language.encode cleans captions), reference (its rules) or none.
        t5: The text encoder: a folder or a Hub id.
        t5_precision: bf16 or fp32.
    """

    num_images: int = 0
    classes: tuple[int, ...] = ()
    labels: Literal["random", "balanced"] = "random"
    prompts: Path | None = None
    prompt: str = ""
    images_per_prompt: int = 1
    negative_prompt: str = ""
    clean_prompts: Cleaning = "clean"
    t5: str = "google/flan-t5-xl"
    t5_precision: Precision = "bf16"

    def __post_init__(self) -> None:
        if self.num_images < 0 or self.images_per_prompt < 1:
            raise ValueError("num_images must be >= 0, images_per_prompt >= 1")
        if self.prompts and self.prompt:
            raise ValueError("give prompts or prompt, not both")


class Classes:
    """A class per image."""

    negative = None

    def __init__(self, config: ConditionConfig, gpt: GPTConfig, seed: int) -> None:
        if config.prompts or config.prompt or config.negative_prompt:
            raise InputError("prompts are for a text model; this decoder is conditioned on classes")
        self.labels = sample_labels(config, gpt.num_classes, seed)
        self.count = len(self.labels)
        self.settings = {"labels": config.labels, "classes": list(config.classes)}
        self.index = {"image_labels": self.labels.tolist()}

    def batch(self, ids: torch.Tensor) -> torch.Tensor:
        """The classes of images ids (n,) int64."""
        return torch.from_numpy(self.labels)[ids]


def sample_labels(config: ConditionConfig, num_classes: int, seed: int) -> np.ndarray:
    """The class of every image, (num_images,) int64, from the seed and the image's number alone."""
    ids = np.arange(config.num_images or CLASS_IMAGES)
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
    """A prompt, its name (for file names) and the whole record it came with, as JSON."""

    name: str
    text: str
    record: str


class Prompts:
    """A prompt per image: prompt i // images_per_prompt for image i."""

    labels = None

    def __init__(self, config: ConditionConfig, gpt: GPTConfig, world: World) -> None:
        self.prompts = read_prompts(config)
        self.per_prompt = config.images_per_prompt
        whole = len(self.prompts) * self.per_prompt
        self.count = min(config.num_images or whole, whole)
        dtype = dtype_of(config.t5_precision)
        self.t5: T5 = load_t5(config.t5, world.device, dtype, gpt.max_text_tokens)
        check_encoder(gpt, self.t5, config.t5)
        self.clean: Cleaning = config.clean_prompts
        self.negative = self.encode([config.negative_prompt]) if config.negative_prompt else None
        texts = [prompt.text for prompt in self.prompts]
        self.settings = {
            "prompts": texts,
            "images_per_prompt": self.per_prompt,
            "negative_prompt": config.negative_prompt,
            "clean_prompts": config.clean_prompts,
            "t5": config.t5,
            "t5_precision": config.t5_precision,
        }
        self.index: dict[str, Any] = {"names": [prompt.name for prompt in self.prompts]}

    def of(self, image: int) -> Prompt:
        """The prompt of an image."""
        return self.prompts[image // self.per_prompt]

    def batch(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The captions of images ids (n,)."""
        return self.encode([self.of(i).text for i in ids.tolist()])

    def encode(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Texts, cleaned as configured -> features (n, T, dim), lengths (n,)."""
        return self.t5.batch(cleaned(texts, self.clean))


def open_conditions(
    config: ConditionConfig, gpt: GPTConfig, seed: int, world: World
) -> Classes | Prompts:
    """What the images show, under a model of classes or of text."""
    if gpt.condition == "class":
        return Classes(config, gpt, seed)
    return Prompts(config, gpt, world)


def check_encoder(gpt: GPTConfig, t5: T5, name: str) -> None:
    """Raise InputError where the decoder was trained with another text encoder."""
    if t5.dim != gpt.text_dim:
        raise InputError(f"{name}: features of {t5.dim}, but the decoder reads {gpt.text_dim}")
    if gpt.text_encoder and gpt.text_encoder != t5.identity:
        raise InputError(f"{name}: not the text encoder that the decoder was trained with")


def read_prompts(config: ConditionConfig) -> list[Prompt]:
    """The prompts of a file or folder, or the one that is given; blank lines are none."""
    if config.prompt:
        return [Prompt("prompt", config.prompt, json.dumps({"prompt": config.prompt}))]
    path = config.prompts
    if path is None:
        raise InputError("this decoder is conditioned on text: give --prompts or --prompt")
    try:
        prompts = _read(path)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error})") from error
    if not prompts:
        raise InputError(f"{path}: holds no prompt")
    return prompts


def _read(path: Path) -> list[Prompt]:
    if path.is_dir():
        files = sorted(path.glob("*.txt"))
        return [_prompt(p.stem, {"prompt": p.read_text("utf-8").strip()}, p) for p in files]
    if not path.is_file():
        raise InputError(f"{path}: no such file of prompts")
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
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not one JSON object a line ({error})") from error
    return record if isinstance(record, dict) else {}


def _prompt(name: str, record: dict[str, Any], path: Path) -> Prompt:
    plain = {str(key).lower(): value for key, value in record.items()}
    text = next((plain[key] for key in PROMPT_FIELDS if plain.get(key)), None)
    if not isinstance(text, str) or not text.strip():
        fields = ", ".join(PROMPT_FIELDS)
        raise InputError(f"{path}: record {name} has no text under {fields}")
    return Prompt(name, text, json.dumps(record, ensure_ascii=False))
