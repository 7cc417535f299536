"""The whole pipeline on real handwritten digits, in minutes on two cores, with no download.

    make demo
    python scripts/demo.py --out runs/demo

Runs the commands of a full-size training with the configs in configs/demo/, and prints the results.
Run it again: finished stages are recognised, and a stage that was killed continues.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.svm import SVC

sys.path.insert(0, str(Path(__file__).resolve().parent))
from stages import Stages

SIDE = 32  # pixels
HELD_OUT = 300  # real digits on which neither the models nor the classifier are trained
LARGER = 4  # how much the images of the table are enlarged


def main() -> None:
    """Run every stage, then print the table."""
    parser = argparse.ArgumentParser(description="The whole pipeline on handwritten digits.")
    parser.add_argument("--out", type=Path, default=Path("runs") / "demo", help="the demo's folder")
    out = parser.parse_args().out
    stages = Stages(out, Path("configs") / "demo")
    stages.step(out / "digits", "0", lambda: write_digits(out / "digits"))
    train, test = out / "digits" / "train", out / "digits" / "test"
    tokenizer, gpt, codes = out / "tokenizer", out / "gpt", out / "codes"
    with_tokenizer = ("--tokenizer", tokenizer)
    run = stages.command
    run("tokenizer.train", "tokenizer.yaml", tokenizer, "--data", train)
    rebuilt = out / "reconstructions"
    run("tokenizer.reconstruct", "reconstruct.yaml", rebuilt, *with_tokenizer, "--data", test)
    for name, images in (("train", train), ("test", test)):
        run("tokenizer.encode", "encode.yaml", codes / name, *with_tokenizer, "--data", images)
    trained_on = ("--data.codes", f"[{codes / 'train'}]", "--validation", f"[{codes / 'test'}]")
    run("autoregressive.train", "gpt.yaml", gpt, *trained_on)
    run("autoregressive.sample", "sample.yaml", out / "samples", "--gpt", gpt, *with_tokenizer)
    run("evaluations.reference", "reference.yaml", out / "real.npz", "--images", train)
    scored = ("--samples", out / "samples", "--metrics.reference", out / "real.npz")
    run("evaluations.score", "score.yaml", out / "scores", *scored)
    print_table(out, stages.times())


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


def print_table(out: Path, times: list[tuple[str, str]]) -> None:
    """Print the scores of the run and where its images are."""
    classify = digit_classifier(out)
    with np.load(out / "samples" / "samples.npz", allow_pickle=False) as file:
        agreement = classify(file["arr_0"], file["arr_1"])
    real_accuracy = classify(*read_digits(out / "digits" / "test"))
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
        ("recall (how much of the real is generated)", f"{scores['proxy_recall_fp32']:.3f}"),
        ("coverage", f"{scores['proxy_coverage']:.3f}"),
        ("precision", f"{scores['proxy_precision_fp32']:.3f}"),
        ("proxy Frechet distance (NOT FID)", f"{scores['proxy_fd']:.4f}"),
        *times,
    ]
    print()
    for name, value in rows:
        print(f"{name:<44} {value}")
    print("\nThe scores are the same on every machine with the same number of threads.\n")
    for name in ("samples", "reconstructions"):
        print(enlarge(out / name / f"{name}.png", out / f"{name}.png"))
    print(out / "gpt" / "curves.png")


def enlarge(source: Path, target: Path) -> Path:
    """Write a grid of small images LARGER times as large -> the new file."""
    grid = Image.open(source)
    size = (grid.width * LARGER, grid.height * LARGER)
    grid.resize(size, Image.Resampling.NEAREST).save(target)
    return target


def digit_classifier(out: Path) -> Callable[[np.ndarray, np.ndarray], float]:
    """A function from pixels and classes to how many a classifier of real digits agrees with."""
    pixels, classes = read_digits(out / "digits" / "train")
    classifier = SVC(C=10).fit(classifier_features(pixels), classes)
    return lambda pixels, labels: float(classifier.score(classifier_features(pixels), labels))


if __name__ == "__main__":
    main()
