"""Text to image in minutes on two cores, with no download: drawings of shapes with captions.

    make demo-text
    python scripts/demo_text.py --prompt "a big blue square above a small red circle"

Draws captioned images, makes a tiny T5, trains the tokenizer and the GPT with the commands of a
full-size training, samples the prompts that you typed, 500 captions of pairs that no training image
shows, and 200 prompts written by hand, and checks the samples. Run it again: finished stages are
recognised, and only new prompts are sampled.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))
from captions import CaptionMaker, words_of
from grammar import RULES
from shapes import SIZES, Asked, Verdict, check, describe, draw
from stages import ROOT, Stages, run_stage
from tiny_t5 import PAIRS, write_t5

from core.data.grids import enlarged_grid
from core.files import fingerprint

CONFIGS = Path("configs") / "demo_text"
IMAGES = 8000
TWO_OBJECTS = 0.75  # share of the images: one object alone is learnt sooner
HELD_OUT = 500  # captions of pairs that no training image shows
CHECKED = 1000  # drawings that validate the checker
WRITTEN = ROOT / "tests" / "demo_prompts.txt"  # 200 prompts in people's words
TYPED_TIMES, TYPED_COLUMNS = 16, 4  # how much the images of typed prompts are enlarged; per row


class Prompt(NamedTuple):
    """A prompt and what it asks for."""

    text: str
    things: tuple[Asked, ...]
    relation: str | None


def main() -> None:
    """Run every stage, then print the table."""
    parser = argparse.ArgumentParser(description="Text to image on drawings of shapes.")
    parser.add_argument("--out", type=Path, default=Path("runs") / "demo_text", help="its folder")
    parser.add_argument("--prompt", action="append", default=[], help="sample this too; repeatable")
    options = parser.parse_args()
    out = options.out
    stages = Stages(out, CONFIGS)
    train(out, stages)
    if options.prompt:
        sample_typed(out, options.prompt, stages)
    checked = {"held_out": held_out_prompts(), "written": read_prompts(WRITTEN)}
    for name, prompts in checked.items():
        sample_checked(out, name, [prompt.text for prompt in prompts], stages)
    print_table(out, checked, stages.times())
    if options.prompt:
        print(out / "typed" / "typed.png")


def train(out: Path, stages: Stages) -> None:
    """Draw the images and train the three models; what is there already stays."""
    images, tokenizer, t5 = out / "train", out / "tokenizer", out / "t5"
    stages.step(images, fingerprint([IMAGES, TWO_OBJECTS, SIZES, RULES]), lambda: write_images(out))
    pairs = ("--pairs.source", images)
    run = stages.command
    run("tokenizer.train", "tokenizer.yaml", tokenizer, "--data", images)
    run("tokenizer.encode", "codes.yaml", out / "codes", "--tokenizer", tokenizer, *pairs)
    stages.step(t5, "", lambda: make_t5(t5))
    run("language.encode", "features.yaml", out / "features", "--t5", t5, *pairs)
    trained_on = ("--data.codes", f"[{out / 'codes'}]", "--data.features", out / "features")
    run("autoregressive.train", "gpt.yaml", out / "gpt", *trained_on)


def make_t5(folder: Path) -> None:
    """Train the text encoder on captions that no image needs."""
    maker = CaptionMaker(seed=3, never=written_texts(), pairs=PAIRS)
    write_t5(folder, maker)


def write_images(out: Path) -> None:
    """Draw the training images, in place of those that are there."""
    temporary = out / "train.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    maker = CaptionMaker(seed=0, never=written_texts(), pairs=TWO_OBJECTS)
    random = np.random.default_rng(0)
    for number in range(IMAGES):
        caption = maker.caption()
        path = temporary / f"{number:05d}.png"
        Image.fromarray(draw(maker.scene(caption), random)).save(path)
        path.with_suffix(".txt").write_text(caption.text)
    shutil.rmtree(out / "train", ignore_errors=True)
    temporary.rename(out / "train")


def written_texts() -> list[str]:
    """The prompts written by hand, which no training caption repeats."""
    return [prompt.text for prompt in read_prompts(WRITTEN)]


def held_out_prompts() -> list[Prompt]:
    """Captions of two objects that no training image shows together."""
    maker = CaptionMaker(seed=1)
    captions = [maker.caption(held_out=True) for _ in range(HELD_OUT)]
    return [
        Prompt(c.text, tuple(Asked(t.size, t.colour, t.shape) for t in c.things), c.relation)
        for c in captions
    ]


def read_prompts(path: Path) -> list[Prompt]:
    """Read lines of: prompt | first object / relation / second object."""
    prompts = []
    for line in path.read_text("utf-8").splitlines():
        if line.startswith("#") or not line.strip():
            continue
        text, asked = (part.strip() for part in line.split("|"))
        first, *rest = (part.strip() for part in asked.split("/"))
        things = [first, rest[1]] if rest else [first]
        prompts.append(Prompt(text, tuple(map(_asked, things)), rest[0] if rest else None))
    return prompts


def _asked(words: str) -> Asked:
    *size, colour, shape = words.split()
    return Asked(size[0] if size else None, colour, shape)


def sample_checked(out: Path, name: str, prompts: Sequence[str], stages: Stages) -> None:
    """Sample one image of each prompt into the folder `name`."""
    flags = sampling_flags(out, out / name, prompts)
    stages.command("autoregressive.sample", "sample.yaml", out / name / "samples", *flags)


def sample_typed(out: Path, prompts: Sequence[str], stages: Stages) -> None:
    """Sample the prompts that the user typed; say what is new in them and what came out."""
    typed = out / "typed"
    shutil.rmtree(typed, ignore_errors=True)
    flags = sampling_flags(out, typed, prompts)
    config = stages.configs / "sample.yaml"
    run_stage("autoregressive.sample", config, *flags, "--out", typed / "samples")
    pixels = samples_of(out, "typed")
    images = [Image.fromarray(image) for image in pixels]
    sheet = enlarged_grid(images, min(TYPED_COLUMNS, len(images)), TYPED_TIMES)
    sheet.save(typed / "typed.png")
    print(f"\nyour prompts: {typed / 'typed.png'}")
    for text, image in zip(prompts, pixels, strict=True):
        print(f"  {text}\n    shows {describe(image)}")
    unknown = unknown_words(out / "t5", " ".join(prompts))
    if unknown:
        print(f"words that training never saw: {', '.join(unknown)}")


def sampling_flags(out: Path, folder: Path, prompts: Sequence[str]) -> tuple[object, ...]:
    """Write the prompts into a folder -> the flags that sample them with the demo's models."""
    folder.mkdir(parents=True, exist_ok=True)
    asked = folder / "prompts.txt"
    asked.write_text("".join(f"{text}\n" for text in prompts), "utf-8")
    models = ("--gpt", out / "gpt", "--tokenizer", out / "tokenizer")
    return (*models, "--conditions.text_encoder", out / "t5", "--conditions.prompts", asked)


def samples_of(out: Path, name: str) -> np.ndarray:
    """The pixels (n, side, side, 3) uint8 of a folder of samples."""
    with np.load(out / name / "samples" / "samples.npz", allow_pickle=False) as file:
        return file["arr_0"]


def unknown_words(t5: Path, text: str) -> list[str]:
    """The words of a prompt that the text encoder does not know."""
    from transformers import AutoTokenizer

    known = AutoTokenizer.from_pretrained(str(t5)).get_vocab()
    return [word for word in dict.fromkeys(words_of(text)) if word not in known]


def print_table(out: Path, checked: dict[str, list[Prompt]], times: list[tuple[str, str]]) -> None:
    """Print the scores of the run and where its images are."""
    titles = {"held_out": "captions of unseen pairs", "written": "prompts written by hand"}
    print()
    for name, prompts in checked.items():
        pairs = zip(prompts, samples_of(out, name), strict=True)
        verdicts = [check(prompt.things, prompt.relation, image) for prompt, image in pairs]
        print_scores(f"{len(prompts)} {titles[name]}", verdicts)
    print_scores(f"{CHECKED} drawings: what the checker can see", drawing_verdicts())
    for row, value in times:
        print(f"{row:<46} {value}")
    print()
    for name in checked:
        print(out / name / "samples" / "samples.png")
    print(out / "gpt" / "curves.png")


def print_scores(title: str, verdicts: Sequence[Verdict]) -> None:
    """Print the scores of a set of images, indented below its title."""
    print(title)
    for row, value in scores(verdicts).items():
        print(f"  {row:<44} {value:.3f}")


def scores(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """The share of objects, of sizes, of relations and of whole images that are right."""
    return {
        "objects right in colour and shape": _mean([x for v in verdicts for x in v.right]),
        "sizes right, of the objects that are there": _mean([x for v in verdicts for x in v.sizes]),
        "relations right": _mean([v.relation for v in verdicts if v.relation is not None]),
        "images with nothing wrong": _mean([v.all for v in verdicts]),
    }


def _mean(values: Sequence[bool]) -> float:
    return float(np.mean(values))


def drawing_verdicts() -> list[Verdict]:
    """The verdicts on drawings, which no sampler can exceed."""
    maker, random = CaptionMaker(seed=2), np.random.default_rng(2)
    verdicts = []
    for _ in range(CHECKED):
        caption = maker.caption()
        things = [Asked(t.size, t.colour, t.shape) for t in caption.things]
        verdicts.append(check(things, caption.relation, draw(maker.scene(caption), random)))
    return verdicts


if __name__ == "__main__":
    main()
