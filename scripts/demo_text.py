"""Text to image in minutes on two cores, with no download: drawings of shapes with captions.

    make demo-text
    python scripts/demo_text.py --prompt "a small red circle in the middle"

Draws captioned images, makes a tiny T5, trains the tokenizer and the GPT with the commands of a
full-size training, samples 500 captions that no training image has, and checks the samples. Run it
again: finished stages are recognised, and only new prompts are sampled.
"""

import argparse
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))
from shapes import Scene, all_scenes, check, draw
from stages import Stages, run_stage

from core.data.grids import enlarged_grid
from core.files import fingerprint

CONFIGS = Path("configs") / "demo_text"
HELD_OUT = (350, 150)  # captions of one object, of two
IMAGES = 4  # of each training caption
T5_STEPS, T5_CONTEXT = 400, 3  # training steps; words on either side that a byte learns
TYPED_TIMES = 8  # how much the images of typed prompts are enlarged
CHECKED = 1000  # drawings that validate the checker


def main() -> None:
    """Run every stage, then print the table."""
    parser = argparse.ArgumentParser(description="Text to image on drawings of shapes.")
    parser.add_argument("--out", type=Path, default=Path("runs") / "demo_text", help="its folder")
    parser.add_argument("--prompt", action="append", default=[], help="sample this too; repeatable")
    options = parser.parse_args()
    out = options.out
    stages = Stages(out, CONFIGS)
    held_out = train(out, stages)
    models = ("--gpt", out / "gpt", "--tokenizer", out / "tokenizer")
    models = (*models, "--conditions.text_encoder", out / "t5")
    if options.prompt:
        sample_typed(out, options.prompt, models, training_captions(out))
    prompts = ("--conditions.prompts", out / "held_out.txt")
    stages.command("autoregressive.sample", "sample.yaml", out / "samples", *models, *prompts)
    print_table(out, held_out, stages.times())


def train(out: Path, stages: Stages) -> list[Scene]:
    """Draw the images and train the three models, each once -> the scenes that are held out."""
    images, t5, run = out / "train", out / "t5", stages.command
    scenes = all_scenes()
    held_out, training = split(scenes)
    settings = fingerprint([scene.caption for scene in training])
    stages.step(images, settings, lambda: write_images(out, training, held_out))
    stages.step(t5, settings, lambda: write_t5(t5, sorted(training_captions(out))))
    pairs = ("--pairs.source", images)
    run("tokenizer.train", "tokenizer.yaml", out / "tokenizer", "--data", images)
    codes, with_tokenizer = out / "codes", ("--tokenizer", out / "tokenizer")
    run("tokenizer.encode", "codes.yaml", codes, *with_tokenizer, *pairs)
    run("language.encode", "features.yaml", out / "features", "--t5", t5, *pairs)
    trained_on = ("--data.codes", f"[{codes}]", "--data.features", out / "features")
    run("autoregressive.train", "gpt.yaml", out / "gpt", *trained_on)
    return held_out


def training_captions(out: Path) -> set[str]:
    """The captions of the training images."""
    return {path.read_text() for path in (out / "train").glob("*.txt")}


def sample_typed(
    out: Path, prompts: list[str], models: tuple[object, ...], captions: set[str]
) -> None:
    """Sample four images of each prompt, and name the words that no training caption has."""
    typed = out / "typed"
    shutil.rmtree(typed, ignore_errors=True)
    typed.mkdir()
    (typed / "prompts.txt").write_text("\n".join(prompts) + "\n", "utf-8")
    asked = ("--conditions.prompts", typed / "prompts.txt", "--conditions.images_per_prompt", 4)
    flags = (*models, *asked, "--out", typed / "samples")
    run_stage("autoregressive.sample", CONFIGS / "sample.yaml", *flags)
    with np.load(typed / "samples" / "samples.npz", allow_pickle=False) as file:
        images = [Image.fromarray(image) for image in file["arr_0"]]
    enlarged_grid(images, columns=4, times=TYPED_TIMES).save(typed / "typed.png")
    print(f"\nyour prompts, four images each: {typed / 'typed.png'}")
    known = {word for caption in captions for word in words_of(caption)}
    new = [word for word in dict.fromkeys(words_of(" ".join(prompts))) if word not in known]
    if new:
        print(f"words that training never saw: {', '.join(new)}")


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return re.findall(r"\w+", text.lower())


def split(scenes: list[Scene]) -> tuple[list[Scene], list[Scene]]:
    """Scenes -> those that are held out, and those of the training images, IMAGES of each."""
    order = np.random.default_rng(0).permutation(len(scenes))
    held = np.concatenate(
        [
            [i for i in order if len(scenes[i].things) == things][:count]
            for things, count in zip((1, 2), HELD_OUT, strict=True)
        ]
    )
    training = np.setdiff1d(order, held).repeat(IMAGES)
    return [scenes[i] for i in held], [scenes[i] for i in training]


def write_images(out: Path, training: list[Scene], held_out: list[Scene]) -> None:
    """Draw the training images, and list the captions that are held out."""
    temporary, random = out / "train.tmp", np.random.default_rng(0)
    random.permutation(len(all_scenes()))  # the numbers that the split took
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for number, scene in enumerate(training):
        path = temporary / f"{number:05d}.png"
        Image.fromarray(draw(scene, random)).save(path)
        path.with_suffix(".txt").write_text(scene.caption)
    (out / "held_out.txt").write_text("".join(f"{scene.caption}\n" for scene in held_out))
    shutil.rmtree(out / "train", ignore_errors=True)
    temporary.rename(out / "train")


def write_t5(folder: Path, captions: list[str]) -> None:
    """A tiny T5 encoder over bytes, trained for a minute, as a folder of transformers."""
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    torch.manual_seed(0)
    config = T5Config(vocab_size=384, d_model=128, d_kv=32, num_heads=4, num_layers=3, d_ff=256)
    model, tokenizer = T5EncoderModel(config), ByT5Tokenizer(extra_ids=125)
    print(f"\ntraining a tiny T5 on {len(captions)} captions", flush=True)
    train_t5(model, tokenizer, captions)
    temporary = folder.with_name("t5.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def train_t5(model: Any, tokenizer: Any, captions: list[str]) -> None:  # noqa: ANN401
    """Train each byte to predict its own word and the words around it.

    Released T5 encoders have learnt far more; this much is needed to tell "a red circle above a
    blue cross" from its reverse.
    """
    words = sorted({word for caption in captions for word in caption.split()})
    number = {word: i + 1 for i, word in enumerate(words)}  # 0: no word there
    offsets = range(-T5_CONTEXT, T5_CONTEXT + 1)
    head = torch.nn.Linear(model.config.d_model, len(offsets) * (len(words) + 1))
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=T5_STEPS)
    random = np.random.default_rng(0)
    for step in range(T5_STEPS):
        chosen = [captions[i] for i in random.integers(0, len(captions), 32)]
        given = tokenizer(chosen, padding=True, return_tensors="pt")
        targets = torch.full((*given.input_ids.shape, len(offsets)), -100)
        for row, caption in enumerate(chosen):
            named = [number[word] for word in caption.split()]
            place = 0
            for i, word in enumerate(caption.split()):
                around = [named[i + o] if 0 <= i + o < len(named) else 0 for o in offsets]
                targets[row, place : place + len(word)] = torch.tensor(around)
                place += len(word) + 1
        features = model(given.input_ids, attention_mask=given.attention_mask).last_hidden_state
        guesses = head(features).unflatten(-1, (len(offsets), -1))
        loss = torch.nn.functional.cross_entropy(guesses.flatten(0, 2), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1} of {T5_STEPS}: loss {loss.item():.3f}", flush=True)


def print_table(out: Path, held_out: list[Scene], times: list[tuple[str, str]]) -> None:
    """Print the scores of the run and where its images are."""
    random = np.random.default_rng(1)
    scenes = all_scenes()
    chosen = [scenes[i] for i in random.integers(0, len(scenes), CHECKED)]
    checker = np.mean([check(scene, draw(scene, random)).both for scene in chosen])
    with np.load(out / "samples" / "samples.npz", allow_pickle=False) as file:
        verdicts = np.array([check(*pair) for pair in zip(held_out, file["arr_0"], strict=True)])
    colour, shape, both = verdicts.mean(0)
    print()
    for name, value in (
        (f"alignment, colour ({len(held_out)} held-out prompts)", f"{colour:.3f}"),
        ("alignment, shape", f"{shape:.3f}"),
        ("alignment, both", f"{both:.3f}"),
        (f"the checker on {CHECKED} drawings", f"{checker:.3f}"),
        *times,
    ):
        print(f"{name:<46} {value}")
    print(f"\n{out / 'samples' / 'samples.png'}\n{out / 'gpt' / 'curves.png'}")


if __name__ == "__main__":
    main()
