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
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))
from shapes import Scene, all_scenes, check, draw
from stages import run_stage

from core.data.grids import enlarged_grid

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
    out, started = options.out, time.monotonic()
    held_out = write_images(out)
    seen = {path.read_text() for path in (out / "train").glob("*.txt")}
    write_t5(out / "t5", sorted(seen))
    pairs = ("--pairs.source", out / "train")
    tokenizer, gpt = out / "tokenizer", out / "gpt"
    stage("tokenizer.train", "tokenizer.yaml", "--data", out / "train", "--out", tokenizer)
    stage(
        "tokenizer.encode",
        "codes.yaml",
        *("--tokenizer", tokenizer, *pairs, "--out", out / "codes"),
    )
    stage("language.encode", "features.yaml", "--t5", out / "t5", *pairs, "--out", out / "features")
    stage(
        "autoregressive.train",
        "gpt.yaml",
        *("--data.codes", f"[{out / 'codes'}]", "--data.features", out / "features"),
        *("--out", gpt),
    )
    models = ("--gpt", gpt, "--tokenizer", tokenizer, "--conditions.text_encoder", out / "t5")
    if options.prompt:
        sample_typed(out, options.prompt, models, seen)
    stage(
        "autoregressive.sample",
        "sample.yaml",
        *(*models, "--conditions.prompts", out / "held_out.txt", "--out", out / "samples"),
    )
    print_table(out, held_out, time.monotonic() - started)


def sample_typed(
    out: Path, prompts: list[str], models: tuple[object, ...], captions: set[str]
) -> None:
    """Sample four images of each prompt, and name the words that no training caption has."""
    typed = out / "typed"
    shutil.rmtree(typed, ignore_errors=True)
    typed.mkdir()
    (typed / "prompts.txt").write_text("\n".join(prompts) + "\n", "utf-8")
    asked = ("--conditions.prompts", typed / "prompts.txt", "--conditions.images_per_prompt", 4)
    stage("autoregressive.sample", "sample.yaml", *models, *asked, "--out", typed / "samples")
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


def stage(module: str, config: str, *flags: object) -> None:
    """Run one command with this demo's configuration."""
    run_stage(module, Path("configs") / "demo_text" / config, *flags)


def write_images(out: Path) -> list[Scene]:
    """Draw the training images once, and list the captions that are held out."""
    random = np.random.default_rng(0)
    scenes = all_scenes()
    order = random.permutation(len(scenes))
    held = np.concatenate(
        [
            [i for i in order if len(scenes[i].things) == things][:count]
            for things, count in zip((1, 2), HELD_OUT, strict=True)
        ]
    )
    held_out = [scenes[i] for i in held]
    if (out / "train").exists():
        return held_out
    temporary = out / "train.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for number, i in enumerate(np.setdiff1d(order, held).repeat(IMAGES)):
        path = temporary / f"{number:05d}.png"
        Image.fromarray(draw(scenes[i], random)).save(path)
        path.with_suffix(".txt").write_text(scenes[i].caption)
    (out / "held_out.txt").write_text("".join(f"{scene.caption}\n" for scene in held_out))
    temporary.rename(out / "train")
    return held_out


def write_t5(folder: Path, captions: list[str]) -> None:
    """A tiny T5 encoder over bytes, trained for a minute, as a folder of transformers."""
    if folder.exists():
        return
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    torch.manual_seed(0)
    config = T5Config(vocab_size=384, d_model=128, d_kv=32, num_heads=4, num_layers=3, d_ff=256)
    model, tokenizer = T5EncoderModel(config), ByT5Tokenizer(extra_ids=125)
    print(f"\ntraining a tiny T5 on {len(captions)} captions", flush=True)
    train_t5(model, tokenizer, captions)
    temporary = folder.with_name("t5.tmp")
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
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


def print_table(out: Path, held_out: list[Scene], seconds: float) -> None:
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
        ("time", f"{seconds:.0f} s"),
    ):
        print(f"{name:<46} {value}")
    print(f"\n{out / 'samples' / 'samples.png'}\n{out / 'gpt' / 'curves.png'}")


if __name__ == "__main__":
    main()
