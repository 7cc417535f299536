"""Muon for the matrices of the blocks: torch's own update, exact resume, refusals by name."""

import shutil

import pytest
import torch
from helpers.codes import write_codes
from helpers.models import tiny
from helpers.training import CPU, flags, weights

from autoregressive.train import train
from autoregressive.training.config import TrainConfig
from core.config import InputError, parse_config
from core.training.optimizer import MuonAdamW, OptimizerConfig, Stepper, build_optimizer
from tokenizer.training.config import TrainConfig as TokenizerTrainConfig

MUON = OptimizerConfig(kind="muon", lr=1e-2, weight_decay=0.1, clip_norm=None)
QKV, W2 = "layers.0.attention.wqkv.weight", "layers.1.feed_forward.w2.weight"


def gradients(gpt: torch.nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in gpt.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_matrices_of_the_blocks_get_torchs_muon_and_the_rest_adamw():
    ours, theirs = tiny(num_kv_heads=2), tiny(num_kv_heads=2)
    optimizer = build_optimizer(ours, MUON, ours.hidden_matrices())
    assert isinstance(optimizer, MuonAdamW)
    assert sum(p.numel() for g in optimizer.param_groups for p in g["params"]) == sum(
        p.numel() for p in ours.parameters()
    )
    stepper = Stepper(optimizer, MUON, CPU)
    named = dict(theirs.named_parameters())
    parts = [torch.nn.Parameter(p) for p in named[QKV].detach().clone().split([32, 16, 16])]
    settings = {"lr": 1e-2, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    muon = torch.optim.Muon([*parts, named[W2]], **settings)
    adamw = torch.optim.AdamW(
        [{"params": [named["output.weight"]], "weight_decay": 0.1}], lr=1e-2, betas=(0.9, 0.95)
    )
    for step in range(4):
        gradients(ours, step)
        stepper.step(step, 10)
        gradients(theirs, step)
        for part, grad in zip(parts, named[QKV].grad.split([32, 16, 16]), strict=True):
            part.grad = grad
        muon.step()
        adamw.step()
    found = dict(ours.named_parameters())
    torch.testing.assert_close(found[QKV], torch.cat(parts))
    for name in (W2, "output.weight"):
        torch.testing.assert_close(found[name], named[name])
    assert all(parameter.grad is None for parameter in ours.parameters())


def test_the_norm_of_the_gradient_is_that_of_all_parameters():
    gpt = tiny()
    config = OptimizerConfig(kind="muon")
    stepper = Stepper(build_optimizer(gpt, config, gpt.hidden_matrices()), config, CPU)
    gradients(gpt, 0)
    expected = torch.cat([p.grad.flatten() for p in gpt.parameters()]).norm()
    torch.testing.assert_close(stepper.step(0, 10), expected)


@pytest.mark.slow
def test_a_run_with_muon_resumes_bit_for_bit(tmp_path, world):
    codes = write_codes(tmp_path / "codes")
    torch.set_num_threads(1)

    def run(name: str, *more: object) -> dict[str, torch.Tensor]:
        given = ("--training.num_steps", 4, *more)
        lines = [str(line) for line in flags(codes, tmp_path / name, *given)]
        train(parse_config(TrainConfig, lines), world)
        return weights(tmp_path / name, 4)

    muon = ("--optimizer.kind", "muon")
    whole = run("whole", *muon)
    run("stopped", *muon)
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "step_0000004")
    resumed, adamw = run("stopped", *muon), run("adamw")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    assert not torch.equal(adamw[W2], whole[W2])
    with pytest.raises(InputError, match="state of other parameters"):
        shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "step_0000004")
        run("stopped")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("--optimizer.kind", "muon", "--parallel.strategy", "fsdp"), "strategy at ddp"),
        (("--optimizer.kind", "muon", "--optimizer.on_nan", "skip"), "on_nan at stop"),
        (("--optimizer.momentum", 0.9), r"needs optimizer\.kind muon"),
        (
            ("--optimizer.kind", "muon", "--lora.rank", 2, "--init_from", "x"),
            "not for those of lora",
        ),
    ],
)
def test_what_muon_cannot_train_is_refused_by_name(wrong, message):
    with pytest.raises(InputError, match=message):
        parse_config(
            TrainConfig, ["--out", "x", "--data.codes", "[x]", *(str(word) for word in wrong)]
        )


def test_the_tokenizer_has_no_muon():
    with pytest.raises(InputError, match=r"optimizer\.kind muon is for the transformer"):
        parse_config(
            TokenizerTrainConfig, ["--out", "x", "--data", "x", "--optimizer.kind", "muon"]
        )
