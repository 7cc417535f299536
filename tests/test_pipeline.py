"""From images to scores through every command, small, as a user would run them."""

import json

import numpy as np
import pytest
from helpers.commands import run_module
from PIL import Image


def write_shapes(folder, count: int, seed: int) -> None:
    """Two classes that a small model can tell apart: bright top, bright bottom."""
    random = np.random.default_rng(seed)
    for i in range(count):
        pixels = random.integers(0, 60, (16, 16, 3), dtype=np.uint8)
        pixels[: 8 if i % 2 else 16, :, 0] += 100
        path = folder / ("top" if i % 2 else "whole") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


@pytest.mark.slow
def test_images_become_scores_through_every_command(tmp_path):
    write_shapes(tmp_path / "train", 24, 0)
    write_shapes(tmp_path / "val", 8, 1)
    cpu = ("--device", "cpu", "--precision", "fp32")
    train_cpu = ("--training.device", "cpu", "--training.precision", "fp32")
    shape = ("--image_size", "[16,16]", "--num_workers", 0)
    vq, codes, gpt = tmp_path / "vq", tmp_path / "codes", tmp_path / "gpt"
    run_module(
        "tokenizer.train",
        *("--data", tmp_path / "train", "--validation", tmp_path / "val", "--out", vq),
        *("--model.base_channels", 32, "--model.channel_multipliers", "[1,1,1]"),
        *("--model.num_res_blocks", 1, "--model.z_channels", 16, "--model.vocab_size", 64),
        *(
            "--loss.perceptual_weight",
            0,
            "--loss.adversarial_weight",
            0,
            "--training.ema_decay",
            0.9,
        ),
        *("--training.num_steps", 6, "--training.batch_size", 8, *shape, *train_cpu),
    )
    run_module(
        "tokenizer.reconstruct",
        *("--tokenizer", vq, "--data", tmp_path / "val", "--out", tmp_path / "rec", *shape, *cpu),
    )
    for name in ("train", "val"):
        run_module(
            "tokenizer.encode",
            *("--tokenizer", vq, "--data", tmp_path / name, "--out", codes / name, *shape, *cpu),
        )
    proxy = ("--metrics.extractor", "proxy", "--device", "cpu", *shape)
    reference = tmp_path / "reference.npz"
    run_module("evaluations.reference", "--images", tmp_path / "train", "--out", reference, *proxy)
    run_module(
        "autoregressive.train",
        *("--evaluation.every", 3, "--metrics.reference", reference),
        *("--metrics.extractor", "proxy", "--evaluation.num_images", 5),
        *("--data.codes", f"[{codes / 'train'}]", "--validation", f"[{codes / 'val'}]"),
        *("--out", gpt, "--model.num_layers", 1, "--model.num_heads", 2, "--model.dim", 32),
        *("--training.num_steps", 6, "--training.batch_size", 8, "--sample_columns", 3),
        *("--training.ema_decay", 0.9, *train_cpu),
    )
    run_module(
        "autoregressive.sample",
        *("--gpt", gpt, "--tokenizer", vq, "--out", tmp_path / "samples", "--num_images", 12),
        *("--compute.device", "cpu", "--compute.precision", "fp32", "--grid_columns", 6),
        *("--conditions.labels", "balanced"),
    )
    scores = {}
    for images in ("samples", "train", "val"):
        out = tmp_path / "scores" / images
        samples = ("--samples", tmp_path / images, "--metrics.reference", reference)
        run_module("evaluations.score", *samples, "--out", out, *proxy)
        scores[images] = json.loads((out / "scores.json").read_text())
    assert [scores[images]["n"] for images in ("samples", "train", "val")] == [12, 24, 8]
    # The reference's own images are at distance 0; six steps of training do not get near them.
    assert abs(scores["train"]["proxy_fd"]) < 1e-6
    assert scores["samples"]["proxy_fd"] > scores["val"]["proxy_fd"] > 1e-3
    history = [json.loads(line) for line in (gpt / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in history if "proxy_fd" in line] == [3, 6]
    for image in (
        vq / "curves.png",
        vq / "samples" / "step_0000006.png",
        gpt / "samples" / "step_0000006.png",
        tmp_path / "rec" / "reconstructions.png",
        tmp_path / "samples" / "samples.png",
    ):
        assert Image.open(image).size[0] > 16, image
