import json
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.codes import write_codes
from helpers.commands import has_lines, kill_when, run_module
from helpers.training import STEPS, flags, losses, weights

DROPOUT = (
    "--model.token_dropout",
    0.1,
    "--model.residual_dropout",
    0.1,
    "--model.ffn_dropout",
    0.1,
)


def assert_same_run(one: Path, other: Path, part: str) -> None:
    first, second = weights(one, 40, part), weights(other, 40, part)
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_weights_bit_for_bit(tmp_path):
    codes = write_codes(tmp_path / "codes")
    more = (*DROPOUT, "--ema_decay", 0.9, "--gradient_accumulation", 2, "--num_steps", 40)
    run_module("autoregressive.train", *flags(codes, tmp_path / "whole", *more))
    killed = flags(codes, tmp_path / "killed", *more)
    log = tmp_path / "killed" / "metrics.jsonl"
    for lines in (1, 9, 20):
        kill_when(partial(has_lines, log, lines), "autoregressive.train", *killed)
        assert len(losses(tmp_path / "killed")) < 40, "the run was over before the kill"
    run_module("autoregressive.train", *killed)
    for part in ("model", "ema"):
        assert_same_run(tmp_path / "whole", tmp_path / "killed", part)
    # Each step is reported once, although some were computed twice.
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(tmp_path):
    codes = write_codes(tmp_path / "codes")
    run_module("autoregressive.train", *flags(codes, tmp_path / "one"))
    run_module("autoregressive.train", *flags(codes, tmp_path / "two"), processes=2)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == STEPS
    assert one == pytest.approx(two, abs=1e-5)


@pytest.mark.slow
def test_the_loss_falls_and_validation_is_reported(tmp_path):
    codes, held_out = write_codes(tmp_path / "codes"), write_codes(tmp_path / "val", count=10)
    more = ("--validation", f"[{held_out}]", "--report.sample_every", 6, "--optimizer.lr", 1e-2)
    run_module("autoregressive.train", *flags(codes, tmp_path / "run", *more))
    history = losses(tmp_path / "run")
    assert history[-1] < history[0] - 0.5
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert sum("validation_loss" in line for line in lines) == 2
    assert (tmp_path / "run" / "curves.png").exists()


@pytest.mark.slow
def test_a_finished_run_resumes_at_once_and_keeps_the_last_checkpoints(tmp_path):
    codes = write_codes(tmp_path / "codes")
    run_module("autoregressive.train", *flags(codes, tmp_path / "run"))
    before = weights(tmp_path / "run")
    again = run_module("autoregressive.train", *flags(codes, tmp_path / "run"))
    assert "continuing at step 12 of 12" in again.stderr
    assert all(torch.equal(before[k], v) for k, v in weights(tmp_path / "run").items())
    steps = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert steps == ["step_0000010", "step_0000012"]


@pytest.mark.slow
def test_a_run_of_another_architecture_is_refused_in_one_line(tmp_path):
    codes = write_codes(tmp_path / "codes")
    run_module("autoregressive.train", *flags(codes, tmp_path / "run", "--num_steps", 2))
    more = ("--model.dim", 64)
    failed = run_module("autoregressive.train", *flags(codes, tmp_path / "run", *more), ok=False)
    assert failed.returncode == 2
    assert "another architecture" in failed.stderr.splitlines()[-1]
    assert "Traceback" not in failed.stderr


@pytest.mark.slow
def test_validation_codes_of_another_vocabulary_are_refused(tmp_path):
    codes, other = write_codes(tmp_path / "a"), write_codes(tmp_path / "b", vocab_size=64)
    more = ("--validation", f"[{other}]")
    failed = run_module("autoregressive.train", *flags(codes, tmp_path / "run", *more), ok=False)
    assert failed.returncode == 2
    assert "vocab_size is 64" in failed.stderr


@pytest.mark.slow
@pytest.mark.parametrize("on_nan", ["stop", "skip"])
def test_a_loss_that_explodes_stops_or_skips_as_configured(tmp_path, on_nan):
    codes = write_codes(tmp_path / "codes")
    more = ("--optimizer.lr", 1e30, "--optimizer.on_nan", on_nan)
    done = run_module("autoregressive.train", *flags(codes, tmp_path / "run", *more), ok=False)
    if on_nan == "stop":
        assert done.returncode == 2
        assert "non-finite gradient at step" in done.stderr.splitlines()[-1]
    else:
        assert done.returncode == 0
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["skipped_steps"] > 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("--nope", 1), "nope"),
        (("--model.nope", 1), "nope"),
        (("--optimizer.lr", "fast"), "optimizer.lr"),
        (("--batch_size", 7, "--gradient_accumulation", 2), "batch_size 7"),
        (("--data.codes", "[nowhere]"), "nowhere"),
    ],
)
def test_bad_input_ends_with_one_line_and_exit_code_2(tmp_path, wrong, message):
    codes = write_codes(tmp_path / "codes")
    run = flags(codes, tmp_path / "run", *wrong)
    failed = run_module("autoregressive.train", *run, ok=False)
    assert failed.returncode == 2
    assert len(failed.stderr.strip().splitlines()) == 1
    assert message in failed.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_trackers_get_the_metrics_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    codes = write_codes(tmp_path / "codes")
    more = ("--report.trackers", "[wandb,tensorboard]", "--num_steps", 2)
    run_module("autoregressive.train", *flags(codes, tmp_path / "run", *more))
    assert list((tmp_path / "run").glob("wandb/offline-run-*"))
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))


@pytest.mark.slow
def test_activation_checkpointing_changes_no_loss(tmp_path):
    codes = write_codes(tmp_path / "codes")
    plain = flags(codes, tmp_path / "plain", "--num_steps", 3, *DROPOUT)
    run_module("autoregressive.train", *plain)
    for kind in ("selective", "full"):
        more = ("--num_steps", 3, *DROPOUT, "--parallel.activation_checkpointing", kind)
        run_module("autoregressive.train", *flags(codes, tmp_path / kind, *more))
        assert losses(tmp_path / kind) == pytest.approx(losses(tmp_path / "plain"), abs=1e-6)
        assert weights(tmp_path / kind, 3).keys() == weights(tmp_path / "plain", 3).keys()


@pytest.mark.slow
def test_the_first_losses_stay_what_they_were(tmp_path):
    # A refactor that changes these numbers changes every published training: it must say so.
    codes = write_codes(tmp_path / "codes")
    run_module("autoregressive.train", *flags(codes, tmp_path / "run", *DROPOUT))
    assert losses(tmp_path / "run")[:10] == pytest.approx(
        [3.46574, 3.46394, 3.46185, 3.45588, 3.45322, 3.44283, 3.44023, 3.43234, 3.42919, 3.41919],
        abs=2e-4,
    )
