"""Every optional term of the tokenizer's training: published values, exact resume, refusals."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.models import small
from helpers.quantizers import normal, relative_error
from helpers.tokenizer_training import STEPS, flags, train_here, write_images
from safetensors.torch import load_file

from core.config import InputError, parse_config
from tokenizer.losses.config import LeCamConfig, LossConfig
from tokenizer.losses.lecam import LeCam
from tokenizer.losses.objective import discriminator_loss, generator_loss, seen_logits
from tokenizer.quantizers.config import PerturbationConfig
from tokenizer.quantizers.perturbation import LatentPerturbation, perturbation_at
from tokenizer.reconstruct import ReconstructionConfig, reconstruct
from tokenizer.training.config import TrainConfig
from tokenizer.training.models import build_models
from tokenizer.training.step import accumulate

GAN = ("--loss.discriminator_start", 1, "--discriminator.base_channels", 8)
GAN = (*GAN, "--discriminator.num_layers", 1)
OPTIONS = {
    "lecam logits": (*GAN, "--loss.lecam.weight", 0.05),
    "lecam means": (*GAN, "--loss.lecam.weight", 0.05, "--loss.lecam.compare", "means"),
    "distillation": (
        *("--loss.distillation.weight", 0.5),
        *("--loss.distillation.encoder", "efficientnet_lite0"),
    ),
    "perturbation": (
        *("--perturbation.image_share", 0.5, "--perturbation.neighbors", 4),
        *("--perturbation.anneal_steps", "[2,6]"),
    ),
    "image means": (*GAN, "--loss.logits", "image_means"),
    "efficientnet": ("--loss.perceptual", "efficientnet_lite0", "--loss.perceptual_weight", 1),
}
TERMS = {"lecam logits": "lecam", "lecam means": "lecam", "distillation": "distillation"}


@pytest.mark.parametrize(("compare", "prefix"), [("logits", "seed"), ("means", "tok1d")])
def test_lecam_equals_the_published_code(goldens, world, compare, prefix):
    golden = np.load(goldens / "variants" / "gan_losses.npz")
    lecam = LeCam(LeCamConfig(weight=1.0, compare=compare))
    weight = 1.0 if prefix == "seed" else 0.001
    recorded = golden[f"{prefix}_loss_" + ("unweighted" if prefix == "seed" else "weighted_0.001")]
    for t in range(5):
        real = (normal(6000 + 2 * t, (4, 1, 6, 6)) + 0.4).requires_grad_()
        fake = (normal(6001 + 2 * t, (4, 1, 6, 6)) - 0.4).requires_grad_()
        loss = weight * lecam(real, fake, world)
        loss.backward()
        assert loss.item() == pytest.approx(recorded[t], rel=1e-4)
        assert lecam.real.item() == pytest.approx(golden[f"{prefix}_ema_real"][t], rel=1e-4)
        assert lecam.fake.item() == pytest.approx(golden[f"{prefix}_ema_fake"][t], rel=1e-4)
        for part, logits in (("real", real), ("fake", fake)):
            norm = golden[f"{prefix}_grad_{part}"][t]
            assert logits.grad.norm().item() == pytest.approx(norm, rel=1e-4)
    assert relative_error(real.grad, golden[f"{prefix}_dreal"]) < 1e-4
    assert relative_error(fake.grad, golden[f"{prefix}_dfake"]) < 1e-4


def test_the_adversarial_losses_equal_the_published_code(goldens):
    golden = np.load(goldens / "variants" / "gan_losses.npz")
    real = normal(6100, (4, 1, 6, 6)).requires_grad_()
    fake = normal(6101, (4, 1, 6, 6), 3).requires_grad_()
    for kind, name in (("hinge", "hinge_disc"), ("vanilla", "vanilla_disc")):
        assert discriminator_loss(real, fake, kind).item() == pytest.approx(golden[name], rel=1e-4)
    seen = partial(seen_logits, LossConfig(logits="image_means"))
    generator = generator_loss(seen(fake), "non_saturating")
    assert generator.item() == pytest.approx(golden["ns_gen"], rel=1e-4)
    (gradient,) = torch.autograd.grad(generator, fake)
    assert relative_error(gradient, golden["ns_gen_dfake"]) < 1e-4
    # The published code leaves out the half that every other loss of the discriminator has.
    discriminator = 2 * discriminator_loss(seen(real), seen(fake), "non_saturating")
    assert discriminator.item() == pytest.approx(golden["ns_disc"], rel=1e-4)
    for gradient, part in zip(
        torch.autograd.grad(discriminator, (real, fake)), ("real", "fake"), strict=True
    ):
        assert relative_error(gradient, golden[f"ns_disc_d{part}"]) < 1e-4


def history(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "reconstruction" in line]


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_trains_and_resumes_bit_for_bit(name, tmp_path, world):
    data = write_images(tmp_path / "data")
    more = (*OPTIONS[name], "--training.gradient_accumulation", 2)
    train_here(flags(data, tmp_path / "whole", *more), world)
    half = ("--training.num_steps", STEPS // 2)
    train_here(flags(data, tmp_path / "parts", *more, *half), world)
    train_here(flags(data, tmp_path / "parts", *more), world)
    last = f"checkpoints/step_{STEPS:07d}"
    files = sorted(
        p.relative_to(tmp_path / "whole")
        for p in (tmp_path / "whole" / last).rglob("*.safetensors")
    )
    assert len(files) >= 2  # without a discriminator: the model and its optimizer
    for file in files:
        whole, parts = (load_file(tmp_path / run / file) for run in ("whole", "parts"))
        assert all(torch.equal(parts[key], value) for key, value in whole.items()), file
    lines = history(tmp_path / "whole")
    assert lines[-1]["reconstruction"] < 2 * lines[0]["reconstruction"]
    if name in TERMS:
        assert all(np.isfinite(line[TERMS[name]]) for line in lines[1:])


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_the_first_step_differs_only_in_the_terms_of_the_option(name, world, tmp_path):
    """The other losses of a step are those of the plain recipe, bit for bit."""

    def losses(*more: object) -> dict[str, torch.Tensor]:
        config = parse_config(TrainConfig, [str(a) for a in flags(tmp_path, tmp_path, *more)])
        models = build_models(config, world)
        images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
        adversarial = bool(config.loss.lecam.weight)
        return accumulate(
            models, images, config, world, adversarial, perturbation_at(config.perturbation, 0)
        )[0]

    plain = losses(*GAN)
    found = losses(*OPTIONS[name])
    changed = {"reconstruction"} if name == "perturbation" else set()
    for term in ("reconstruction", "codebook", "commitment"):
        assert (term in changed) or torch.equal(found[term], plain[term])


def test_perturbed_codes_are_among_the_nearest_and_gradients_pass_straight_through():
    vq = small(vocab_size=32)
    quantizer = vq.quantize
    z = torch.randn(4, quantizer.dim, 3, 5, requires_grad=True)
    quantized = quantizer(z)
    torch.manual_seed(0)
    moved = LatentPerturbation(0.5, 1.0, 4)(quantizer, quantized)
    assert torch.equal(moved[2:], quantized.vectors[2:])
    assert not torch.equal(moved[:2], quantized.vectors[:2])
    weight = torch.randn_like(moved)
    expected = torch.autograd.grad((quantized.vectors * weight).sum(), z, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad((moved * weight).sum(), z)[0], expected)
    entries = quantizer.lookup(torch.arange(32)[None, None])[0, :, 0].T
    near = torch.cdist(entries, entries).topk(4, largest=False).indices
    uniform = torch.rand(2, *quantized.codes.shape)
    codes = LatentPerturbation(1.0, 1.0, 4).codes(quantizer, quantized.codes, uniform)
    assert (near[quantized.codes] == codes[..., None]).any(-1).all()
    alone = LatentPerturbation(1.0, 1.0, 1).codes(quantizer, quantized.codes, uniform)
    assert torch.equal(alone, quantized.codes)
    kept = LatentPerturbation(1.0, 0.0, 4).codes(quantizer, quantized.codes, uniform)
    assert torch.equal(kept, quantized.codes)


def test_the_perturbation_falls_between_its_steps():
    config = PerturbationConfig(image_share=0.1, anneal_steps=(40, 120))
    assert perturbation_at(config, 40) == LatentPerturbation(0.1, 1.0, 100)
    assert perturbation_at(config, 80) == LatentPerturbation(0.1, 0.75, 75)
    assert perturbation_at(config, 999) == LatentPerturbation(0.1, 0.5, 50)
    assert perturbation_at(PerturbationConfig(), 0) is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("--loss.lecam.weight", 1, "--loss.adversarial_weight", 0), "needs a discriminator"),
        (("--loss.lecam.decay", 0.9), r"need loss\.lecam\.weight > 0"),
        (("--loss.distillation.encoder", "efficientnet_lite0"), r"loss\.distillation\.weight > 0"),
        (
            (*OPTIONS["distillation"], "--loss.distillation.encoder_weights", "x.pth"),
            "is for encoder dinov2",
        ),
        (
            ("--loss.distillation.weight", 1, "--loss.distillation.encoder_weights", "x.pth"),
            "x.pth",
        ),
        (("--perturbation.neighbors", 4), r"need perturbation\.image_share > 0"),
        (("--perturbation.image_share", 0.1), "neighbors 100: only 32 codes"),
        (
            ("--perturbation.image_share", 0.1, "--perturbation.anneal_steps", "[5,5]"),
            "must ascend",
        ),
        (("--metrics.extractor", "proxy"), "need rfid true"),
        (("--rfid", "true", "--validation_images", 1), "validation_images >= 2"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(tmp_path, world, wrong, message):
    data = write_images(tmp_path / "data")
    with pytest.raises(InputError, match=message):
        train_here(flags(data, tmp_path / "run", *wrong), world)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_distances_are_named_for_their_network_during_training_and_with_perturbed_codes(
    tmp_path, world
):
    data = write_images(tmp_path / "data")
    proxy = ("--rfid", "true", "--metrics.extractor", "proxy")
    train_here(flags(data, tmp_path / "run", *proxy), world)
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [line["validation_proxy_fd"] for line in lines if "validation_proxy_fd" in line]
    assert len(found) == 2
    assert min(found) > 0

    def scores(name: str, *more: str) -> dict[str, float]:
        arguments = ["--tokenizer", tmp_path / "run", "--data", data, "--out", tmp_path / name]
        arguments += ["--image_size", "[16,16]", "--num_workers", 0, *proxy, *more]
        config = parse_config(ReconstructionConfig, [str(argument) for argument in arguments])
        reconstruct(config, world)
        return json.loads((tmp_path / name / "scores.json").read_text())

    plain = scores("plain")
    share = ("--perturbation.image_share", "1", "--perturbation.neighbors", "8")
    moved = scores("moved", *share, "--batch_size", "5")
    assert moved["perturbed_psnr"] < plain["psnr"]
    assert "psnr" not in moved
    assert moved["codebook_usage"] == plain["codebook_usage"]
    assert moved["perturbed_proxy_fd"] > 0
    again = scores("again", *share)
    assert again["perturbed_psnr"] == pytest.approx(moved["perturbed_psnr"], rel=1e-9)
