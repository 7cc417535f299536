"""The whole pipeline on real handwritten digits, in minutes on two cores, with no download.

    make demo
    python scripts/demo.py --out runs/demo

Runs the commands of a full-size training with the configs in configs/demo/, and prints the results.
Run it again: finished stages are recognised, and a stage that was killed continues.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.svm import SVC

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = Path("configs") / "demo"
SIDE = 32  # pixels
HELD_OUT = 300  # real digits on which neither the models nor the classifier are trained


def main() -> None:
    """Run every stage, then print the table."""
    parser = argparse.ArgumentParser(description="The whole pipeline on handwritten digits.")
    parser.add_argument("--out", type=Path, default=Path("runs") / "demo", help="the demo's folder")
    out = parser.parse_args().out
    started = time.monotonic()
    write_digits(out / "digits")
    train, test = out / "digits" / "train", out / "digits" / "test"
    tokenizer, gpt, samples = out / "tokenizer", out / "gpt", out / "samples"
    stage("tokenizer.train", "tokenizer.yaml", "--data", train, "--out", tokenizer)
    stage(
        "tokenizer.reconstruct",
        "reconstruct.yaml",
        *("--tokenizer", tokenizer, "--data", test, "--out", out / "reconstructions"),
    )
    for name, images in (("train", train), ("test", test)):
        codes = out / "codes" / name
        stage(
            "tokenizer.encode",
            "encode.yaml",
            *("--tokenizer", tokenizer, "--data", images, "--out", codes),
        )
    codes = out / "codes"
    stage(
        "autoregressive.train",
        "gpt.yaml",
        *("--data.codes", f"[{codes / 'train'}]", "--validation", f"[{codes / 'test'}]"),
        *("--out", gpt),
    )
    stage(
        "autoregressive.sample",
        "sample.yaml",
        *("--gpt", gpt, "--tokenizer", tokenizer, "--out", samples),
    )
    stage("evaluations.reference", "reference.yaml", "--images", train, "--out", out / "real.npz")
    stage(
        "evaluations.score",
        "score.yaml",
        *("--samples", samples, "--metrics.reference", out / "real.npz", "--out", out / "scores"),
    )
    print_table(out, time.monotonic() - started)


def stage(module: str, config: str, *flags: object) -> None:
    """Run one command with this demo's configuration."""
    run_stage(module, CONFIGS / config, *flags)


def run_stage(module: str, config: Path, *flags: object) -> None:
    """Run one command as a user would; stop where it fails."""
    command = [sys.executable, "-m", module, "--config", str(config), *map(str, flags)]
    print(f"\n$ python {' '.join(command[1:])}", flush=True)
    code = subprocess.run(command, cwd=ROOT).returncode
    if code:
        sys.exit(code)


def write_digits(folder: Path) -> None:
    """scikit-learn's 1,797 handwritten digits as images, a folder per class, written once."""
    if folder.exists():
        return
    flat, classes = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(classes))
    temporary = folder.with_name("digits.tmp")
    for number, i in enumerate(order):
        split = "test" if number < HELD_OUT else "train"
        path = temporary / split / str(classes[i]) / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        grey = Image.fromarray((flat[i].reshape(8, 8) * 255 / 16).astype(np.uint8))
        grey.resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB").save(path)
    temporary.rename(folder)


def read_digits(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """A folder of digits -> pixels (n, side, side, 3) uint8, classes (n,)."""
    paths = sorted(folder.glob("*/*.png"))
    pixels = np.stack([np.asarray(Image.open(path)) for path in paths])
    return pixels, np.array([int(path.parent.name) for path in paths])


def classifier_features(pixels: np.ndarray) -> np.ndarray:
    """Pixels (n, side, side, 3) -> classifier input: grey at half size, (n, side**2 / 4)."""
    grey = pixels.astype(np.float32).mean(axis=3) / 255
    return (
        grey.reshape(len(grey), SIDE // 2, 2, SIDE // 2, 2).mean(axis=(2, 4)).reshape(len(grey), -1)
    )


def print_table(out: Path, seconds: float) -> None:
    """Print the scores of the run and where its images are."""
    classifier = SVC(C=10).fit(*_labelled_features(out / "digits" / "train"))
    real_accuracy = classifier.score(*_labelled_features(out / "digits" / "test"))
    with np.load(out / "samples" / "samples.npz", allow_pickle=False) as file:
        agreement = classifier.score(classifier_features(file["arr_0"]), file["arr_1"])
    reconstruction = json.loads((out / "reconstructions" / "scores.json").read_text())
    scores = json.loads((out / "scores" / "scores.json").read_text())
    lines = (out / "gpt" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line) for line in lines if "validation_loss" in line]
    rows = [
        ("reconstruction PSNR (held-out digits)", f"{reconstruction['psnr']:.2f} dB"),
        ("codebook usage", f"{100 * reconstruction['codebook_usage']:.1f} %"),
        ("validation loss (nats per code)", f"{losses[-1]['validation_loss']:.3f}"),
        ("agreement (1,000 generated digits)", f"{agreement:.3f}"),
        ("classifier accuracy on held-out real digits", f"{real_accuracy:.3f}"),
        ("proxy Frechet distance (NOT FID)", f"{scores['proxy_fd']:.4f}"),
        ("time", f"{seconds:.0f} s"),
    ]
    print()
    for name, value in rows:
        print(f"{name:<42} {value}")
    print()
    for path in ("samples/samples.png", "reconstructions/reconstructions.png", "gpt/curves.png"):
        print(out / path)


def _labelled_features(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    pixels, classes = read_digits(folder)
    return classifier_features(pixels), classes


if __name__ == "__main__":
    main()
