import dataclasses
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.commands import has_lines, kill_when, run_module
from helpers.tokenizer_training import STEPS, flags, train_here, write_images
from safetensors.torch import load_file, save_file

from core.config import InputError, parse_config
from tokenizer.models.config import DiscriminatorConfig
from tokenizer.train import TrainConfig, accumulate, build_models

ADVERSARIAL = ("--loss.discriminator_start", 3, "--discriminator.base_channels", 8)
ADVERSARIAL = (*ADVERSARIAL, "--discriminator.num_layers", 1, "--loss.adaptive_weight", "true")
STYLEGAN = ("--loss.discriminator_start", 0, "--discriminator.kind", "stylegan")
STYLEGAN = (*STYLEGAN, "--discriminator.max_channels", 8)


def metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out: Path, part: str) -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoints" / f"step_{STEPS:07d}" / f"{part}.safetensors")


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_weights_bit_for_bit(tmp_path):
    data = write_images(tmp_path / "data")
    more = (*ADVERSARIAL, "--training.ema_decay", 0.9, "--training.gradient_accumulation", 2)
    run_module("tokenizer.train", *flags(data, tmp_path / "whole", *more))
    # Recomputed activations change nothing, and their wrappers stay out of the checkpoints.
    recompute = ("--parallel.activation_checkpointing", "full")
    killed = flags(data, tmp_path / "killed", *more, *recompute)
    log = tmp_path / "killed" / "metrics.jsonl"
    for lines in (1, 5):  # before the first checkpoint, and in adversarial training
        kill_when(partial(has_lines, log, lines), "tokenizer.train", *killed)
        assert not (tmp_path / "killed" / "checkpoints" / f"step_{STEPS:07d}").exists()
    run_module("tokenizer.train", *killed)
    for part in ("model", "ema", "training/discriminator"):
        whole, resumed = (weights(tmp_path / name, part) for name in ("whole", "killed"))
        assert all(torch.equal(resumed[key], value) for key, value in whole.items()), part


@pytest.mark.slow
@pytest.mark.parametrize("loss", [("--loss.adversarial_weight", 0), STYLEGAN])
def test_two_processes_give_the_losses_of_one(tmp_path, loss):
    data = write_images(tmp_path / "data")
    run_module("tokenizer.train", *flags(data, tmp_path / "one", *loss))
    run_module("tokenizer.train", *flags(data, tmp_path / "two", *loss), processes=2)
    names = {"reconstruction", "codebook", "commitment", "generator", "discriminator"}
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        for name in names & one.keys():
            assert one[name] == pytest.approx(two[name], abs=1e-5), (one["step"], name)


@pytest.mark.slow
def test_the_loss_falls_and_nothing_adversarial_happens_before_its_start(tmp_path):
    data = write_images(tmp_path / "data")
    more = (*ADVERSARIAL, "--optimizer.lr", 3e-3, "--report.sample_every", 4)
    run_module("tokenizer.train", *flags(data, tmp_path / "run", *more))
    history = [line for line in metrics(tmp_path / "run") if "reconstruction" in line]
    assert history[-1]["reconstruction"] < history[0]["reconstruction"]
    for name in ("discriminator", "generator", "adaptive_weight"):
        assert [line["step"] for line in history if name in line] == [4, 5, 6, 7, 8]
    # The discriminator is not in the checkpoints of the steps before it is trained.
    kept = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert len(kept) == 2
    assert all((step / "training" / "discriminator.safetensors").exists() for step in kept)
    assert all(0 < line["codebook_usage"] <= 1 for line in history)
    measured = [m["step"] for m in metrics(tmp_path / "run") if "validation_psnr" in m]
    assert measured == [0, 4, 8]
    drawn = sorted(path.name for path in (tmp_path / "run" / "samples").iterdir())
    assert drawn == ["step_0000000.png", "step_0000004.png", "step_0000008.png"]
    assert (tmp_path / "run" / "curves.png").exists()


@pytest.mark.slow
def test_fine_tuning_starts_from_weights_without_optimiser_state(tmp_path, world):
    data = write_images(tmp_path / "data")
    train_here(flags(data, tmp_path / "first"), world)
    state = weights(tmp_path / "first", "model")
    torch.save({"model": state}, tmp_path / "inference_only.pt")
    more = ("--init_from", tmp_path / "inference_only.pt", "--optimizer.lr", 1e-9)
    train_here(flags(data, tmp_path / "second", *more), world)
    after = weights(tmp_path / "second", "model")
    assert all(torch.allclose(after[k], v, atol=1e-6) for k, v in state.items())


@pytest.mark.slow
def test_bad_images_are_counted_and_named_and_training_goes_on(tmp_path):
    data = write_images(tmp_path / "data")
    whole = (data / "class0" / "0.png").read_bytes()
    (data / "class0" / "broken.png").write_bytes(whole[: len(whole) // 2])
    (data / "class1" / "text.jpg").write_text("no image")
    more = ("--training.num_steps", 2 * STEPS)
    done = run_module("tokenizer.train", *flags(data, tmp_path / "run", *more))
    named = (tmp_path / "run" / "skipped_rank0.txt").read_text()
    assert "broken.png\tdamaged image" in named
    assert "text.jpg\tnot an image" in named
    reports = [line for line in metrics(tmp_path / "run") if "reconstruction" in line]
    assert reports[-1]["skipped_images"] == 2
    assert "2 images skipped" in done.stdout


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("--loss.nope", 1), "nope"),
        (("--image_size", "[15,16]"), "image_size"),
        (("--training.batch_size", "many"), "training.batch_size"),
        (("--data", "nowhere"), "nowhere"),
        (
            ("--loss.perceptual", "efficientnet_lite0", "--loss.vgg_weights", "no.pth"),
            "loss.vgg_weights is for loss.perceptual lpips",
        ),
        (("--loss.perceptual_weight", 1, "--loss.vgg_weights", "no.pth"), "vgg16-397923af.pth"),
    ],
)
def test_bad_input_is_refused_by_name_before_anything_is_written(tmp_path, world, wrong, message):
    data = write_images(tmp_path / "data")
    with pytest.raises(InputError, match=message):
        train_here(flags(data, tmp_path / "run", *wrong), world)
    assert not (tmp_path / "run").exists()


def test_an_empty_class_folder_is_refused(tmp_path, world):
    data = write_images(tmp_path / "data")
    (data / "class9").mkdir()
    with pytest.raises(InputError, match="class9"):
        train_here(flags(data, tmp_path / "run"), world)


def test_a_loss_that_explodes_stops_at_a_named_step(tmp_path, world):
    data = write_images(tmp_path / "data")
    with pytest.raises(InputError, match="non-finite gradient at step"):
        train_here(flags(data, tmp_path / "run", "--optimizer.lr", 1e30), world)


def test_bad_input_ends_with_one_line_and_exit_code_2(tmp_path):
    data = write_images(tmp_path / "data")
    run = flags(data, tmp_path / "run", "--training.batch_size", "many")
    failed = run_module("tokenizer.train", *run, ok=False)
    assert failed.returncode == 2
    assert len(failed.stderr.strip().splitlines()) == 1


def test_the_discriminator_starts_from_given_weights(tmp_path, world):
    config = parse_config(TrainConfig, [str(a) for a in flags(tmp_path, tmp_path, *STYLEGAN)])
    net = build_models(config, world).discriminator
    torch.nn.init.ones_(net.logit.weight)
    torch.save({"model": {}, "discriminator": net.state_dict()}, tmp_path / "released.pt")
    save_file(net.state_dict(), tmp_path / "discriminator.safetensors")
    for name in ("released.pt", "discriminator.safetensors"):
        again = dataclasses.replace(config, init_discriminator=str(tmp_path / name))
        found = build_models(again, world).discriminator.state_dict()
        assert all(torch.equal(found[key], value) for key, value in net.state_dict().items())
    other = dataclasses.replace(again, discriminator=DiscriminatorConfig())
    with pytest.raises(InputError, match="another architecture"):
        build_models(other, world)


def test_the_discriminator_s_loss_is_scaled_and_the_generator_s_chosen_when_asked_for(
    tmp_path, world
):
    def losses(*more: object) -> tuple[dict[str, float], float]:
        arguments = flags(tmp_path, tmp_path, *STYLEGAN, *more)
        config = parse_config(TrainConfig, [str(argument) for argument in arguments])
        models = build_models(config, world)
        images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
        found, _ = accumulate(models, images, config, world, adversarial=True)
        gradient = models.discriminator.get_parameter("logit.bias").grad
        assert gradient is not None
        return {name: value.item() for name, value in found.items()}, gradient.item()

    plain, gradient = losses()
    scaled, smaller = losses("--loss.scale_discriminator", "true")
    assert scaled["discriminator"] == pytest.approx(0.5 * plain["discriminator"])
    assert smaller == pytest.approx(0.5 * gradient)
    assert scaled["generator"] == plain["generator"]
    chosen, same = losses("--loss.generator", "non_saturating")
    assert chosen["generator"] != plain["generator"]
    assert chosen["generator"] > 0
    assert same == gradient
