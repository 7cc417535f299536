import json
import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.codes import write_codes
from helpers.commands import has_lines, kill_when, run_module
from helpers.models import tiny, write_models
from helpers.training import STEPS, flags, losses, weights

from autoregressive import GPT
from autoregressive.data.open import open_data
from autoregressive.inference.sampling_config import ComputeConfig, SamplingConfig
from autoregressive.models.config import GPTConfig
from autoregressive.sample import SampleConfig
from autoregressive.sampling.run import sample
from autoregressive.train import build_models, train
from autoregressive.training.config import TrainConfig
from autoregressive.training.validation import validation_loss
from core.config import InputError, parse_config
from core.data.shards import ShardReader
from core.distributed.world import World
from core.files import read_json
from tokenizer.models.pretrained import load_tokenizer

DROPOUT = (
    "--model.token_dropout",
    0.1,
    "--model.residual_dropout",
    0.1,
    "--model.ffn_dropout",
    0.1,
)


def train_here(arguments: list[object], world: World) -> None:
    """What the command does, in this process; like the subprocesses, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train(parse_config(TrainConfig, [str(argument) for argument in arguments]), world)
    finally:
        torch.set_num_threads(threads)


def assert_same_run(one: Path, other: Path, part: str) -> None:
    first, second = weights(one, 40, part), weights(other, 40, part)
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_weights_bit_for_bit(tmp_path):
    codes = write_codes(tmp_path / "codes")
    more = (
        *DROPOUT,
        "--training.ema_decay",
        0.9,
        "--training.gradient_accumulation",
        2,
        "--training.num_steps",
        40,
    )
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
def test_two_processes_give_the_losses_of_one(tmp_path, world):
    codes = write_codes(tmp_path / "codes")
    train_here(flags(codes, tmp_path / "one"), world)
    run_module("autoregressive.train", *flags(codes, tmp_path / "two"), processes=2)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == STEPS
    assert one == pytest.approx(two, abs=1e-5)


@pytest.mark.slow
def test_the_loss_falls_and_validation_is_reported(tmp_path, world):
    codes, held_out = write_codes(tmp_path / "codes"), write_codes(tmp_path / "val", count=10)
    more = ("--validation", f"[{held_out}]", "--report.sample_every", 6, "--optimizer.lr", 1e-2)
    more = (*more, "--training.num_steps", 24)
    train_here(flags(codes, tmp_path / "run", *more), world)
    history = losses(tmp_path / "run")
    assert history[-1] < history[0] - 0.5
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if "validation_loss" in line] == [
        *(0, 6, 12, 18, 24)
    ]
    assert (tmp_path / "run" / "curves.png").exists()


@pytest.mark.slow
def test_a_finished_run_resumes_at_once_and_keeps_the_last_checkpoints(tmp_path, world, caplog):
    codes = write_codes(tmp_path / "codes")
    train_here(flags(codes, tmp_path / "run"), world)
    before = weights(tmp_path / "run")
    train_here(flags(codes, tmp_path / "run"), world)
    assert "continuing at step 12 of 12" in caplog.text
    assert all(torch.equal(before[k], v) for k, v in weights(tmp_path / "run").items())
    steps = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert steps == ["step_0000010", "step_0000012"]


@pytest.mark.slow
def test_a_run_of_another_architecture_is_refused(tmp_path, world):
    codes = write_codes(tmp_path / "codes")
    train_here(flags(codes, tmp_path / "run", "--training.num_steps", 2), world)
    with pytest.raises(InputError, match="another architecture"):
        train_here(flags(codes, tmp_path / "run", "--model.dim", 64), world)


@pytest.mark.slow
def test_validation_codes_of_another_vocabulary_are_refused(tmp_path, world):
    codes, other = write_codes(tmp_path / "a"), write_codes(tmp_path / "b", vocab_size=64)
    with pytest.raises(InputError, match="vocab_size is 64"):
        train_here(flags(codes, tmp_path / "run", "--validation", f"[{other}]"), world)


@pytest.mark.slow
@pytest.mark.parametrize("on_nan", ["stop", "skip"])
def test_a_loss_that_explodes_stops_or_skips_as_configured(tmp_path, world, on_nan):
    codes = write_codes(tmp_path / "codes")
    more = ("--optimizer.lr", 1e30, "--optimizer.on_nan", on_nan)
    run = flags(codes, tmp_path / "run", *more)
    if on_nan == "stop":
        with pytest.raises(InputError, match="non-finite gradient at step"):
            train_here(run, world)
    else:
        train_here(run, world)
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["skipped_steps"] > 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("--nope", 1), "nope"),
        (("--model.nope", 1), "nope"),
        (("--optimizer.lr", "fast"), "optimizer.lr"),
        (("--training.batch_size", 7, "--training.gradient_accumulation", 2), "batch_size 7"),
        (("--data.codes", "[nowhere]"), "nowhere"),
    ],
)
def test_bad_input_is_refused_by_name_before_anything_is_written(tmp_path, world, wrong, message):
    codes = write_codes(tmp_path / "codes")
    with pytest.raises(InputError) as refused:
        train_here(flags(codes, tmp_path / "run", *wrong), world)
    assert message in str(refused.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_bad_input_ends_with_one_line_and_exit_code_2(tmp_path):
    codes = write_codes(tmp_path / "codes")
    run = flags(codes, tmp_path / "run", "--optimizer.lr", "fast")
    failed = run_module("autoregressive.train", *run, ok=False)
    assert failed.returncode == 2
    assert len(failed.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_validation_leaves_the_ema_model_in_evaluation_mode(tmp_path, world):
    codes = write_codes(tmp_path / "codes")
    run = flags(codes, tmp_path / "run", "--training.ema_decay", 0.9, *DROPOUT)
    config = parse_config(TrainConfig, [*map(str, run), "--validation", f"[{codes}]"])
    data = open_data(config.data, world, config.out)
    gpt_config = GPTConfig(**asdict(config.model), **data.model_fields())
    ema_objective = build_models(config, gpt_config, world, initialized=True).ema_objective
    validation_loss(ema_objective, data, config, world)
    assert not any(module.training for module in ema_objective.modules())


@pytest.mark.slow
def test_trackers_get_the_metrics_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    _, vq = write_models(tmp_path, tiny())
    identity = load_tokenizer(vq).identity()
    facts = {"tokenizer": "vq", "tokenizer_path": "../vq", "tokenizer_sha256": identity}
    codes = write_codes(tmp_path / "codes", vocab_size=50, **facts)
    more = ("--report.trackers", "wandb", "tensorboard", "--training.num_steps", 2)
    run_module("autoregressive.train", *flags(codes, tmp_path / "run", *more))
    (folder,) = (tmp_path / "run").glob("wandb/offline-run-*")
    (records,) = folder.glob("*.wandb")
    assert b'{"kind":"adamw","lr":0.001' in records.read_bytes()  # settings keep their nesting
    assert len(list(folder.glob("files/media/images/samples_*.png"))) == 2
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))


@pytest.mark.slow
def test_activation_checkpointing_changes_no_loss(tmp_path, world):
    codes = write_codes(tmp_path / "codes")
    short = ("--training.num_steps", 3, *DROPOUT)
    train_here(flags(codes, tmp_path / "plain", *short), world)
    for kind in ("selective", "full"):
        more = (*short, "--parallel.activation_checkpointing", kind)
        train_here(flags(codes, tmp_path / kind, *more), world)
        assert losses(tmp_path / kind) == pytest.approx(losses(tmp_path / "plain"), abs=1e-6)
        assert weights(tmp_path / kind, 3).keys() == weights(tmp_path / "plain", 3).keys()


@pytest.mark.slow
def test_the_first_losses_stay_what_they_were(tmp_path, world):
    # A refactor that changes these numbers changes every published training: it must say so.
    # They changed once, when initial weights began to depend on (seed, name) alone.
    codes = write_codes(tmp_path / "codes")
    train_here(flags(codes, tmp_path / "run", *DROPOUT), world)
    assert losses(tmp_path / "run")[:10] == pytest.approx(
        [3.46574, 3.46355, 3.4617, 3.45683, 3.45009, 3.44098, 3.44005, 3.43511, 3.42726, 3.41815],
        abs=2e-4,
    )


@pytest.mark.slow
def test_a_run_with_qk_norm_resumes_bit_for_bit_and_is_sampled_from(tmp_path, world):
    _, vq = write_models(tmp_path, tiny())
    sha256 = load_tokenizer(vq).identity()
    codes = write_codes(tmp_path / "codes", vocab_size=50, tokenizer_sha256=sha256)
    short = ("--model.qk_norm", "true", "--training.num_steps", 4)
    train_here(flags(codes, tmp_path / "whole", *short), world)
    stopped = tmp_path / "stopped"
    train_here(flags(codes, stopped, *short), world)
    shutil.rmtree(stopped / "checkpoints" / "step_0000004")
    train_here(flags(codes, stopped, *short), world)
    whole, resumed = (weights(tmp_path / name, 4) for name in ("whole", "stopped"))
    assert all(torch.equal(whole[key], value) for key, value in resumed.items())
    norm = whole["layers.0.attention.q_norm.weight"]
    assert norm.shape == (16,)
    assert not torch.equal(norm, torch.ones(16)), "the norm was not trained"
    plain = flags(codes, tmp_path / "plain", "--training.num_steps", 4)
    train_here(plain, world)
    assert "layers.0.attention.q_norm.weight" not in weights(tmp_path / "plain", 4)
    config = SampleConfig(
        gpt=str(tmp_path / "whole"),
        tokenizer=str(vq),
        out=tmp_path / "samples",
        num_images=4,
        compute=ComputeConfig(precision="fp32", device="cpu"),
        sampling=SamplingConfig(cfg_scale=1.0, greedy=True),
    )
    sample(config, world)
    sampled = ShardReader(config.out, "codes")[np.arange(4)].astype(np.int64)
    sampled = torch.from_numpy(sampled).flatten(1)
    labels = torch.tensor(read_json(config.out / "index.json")["image_labels"])
    logits = GPT.from_pretrained(tmp_path / "whole")(sampled, labels)
    assert torch.equal(logits.argmax(-1), sampled)
