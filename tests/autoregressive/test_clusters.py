"""Training on many processes: the same losses, restarts, other world sizes, scheduler's signals."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.codes import write_codes, write_features
from helpers.commands import command, run_module
from helpers.paths import ROOT
from helpers.training import flags, losses, weights

from core.data.order import ShuffledOrder, local_positions
from core.distributed.preemption import REQUEUE
from core.distributed.world import World

FSDP = ("--parallel.strategy", "fsdp")
HSDP = ("--parallel.strategy", "hsdp", "--parallel.shard_size", 2)
QUICK = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def validation_losses(out: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}


@pytest.mark.slow
def test_sharded_processes_give_the_losses_and_the_checkpoint_of_one(tmp_path):
    codes, held_out = write_codes(tmp_path / "codes"), write_codes(tmp_path / "val", count=10)
    more = (
        "--training.num_steps",
        20,
        "--validation",
        f"[{held_out}]",
        "--training.ema_decay",
        0.9,
    )
    more = (*more, "--report.sample_every", 8)  # in the middle too: what is gathered is let go
    run_module("autoregressive.train", *flags(codes, tmp_path / "one", *more))
    for name, processes, strategy in (
        ("fsdp2", 2, (*FSDP, "--training.gradient_accumulation", 2)),
        ("fsdp4", 4, FSDP),
        ("hsdp", 4, HSDP),
    ):
        run = flags(codes, tmp_path / name, *more, *strategy)
        run_module("autoregressive.train", *run, processes=processes)
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
        expected = validation_losses(tmp_path / "one")
        assert validation_losses(tmp_path / name) == pytest.approx(expected, abs=1e-4)
        for part in ("model", "ema", "training/optimizer"):
            ours, theirs = (weights(tmp_path / n, 20, part) for n in (name, "one"))
            assert ours.keys() == theirs.keys()
            for key, value in theirs.items():
                torch.testing.assert_close(ours[key], value, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_sharded_processes_give_the_losses_of_one_on_captions(tmp_path):
    codes = write_codes(tmp_path / "codes", pairs_fingerprint="same")
    features = write_features(tmp_path / "features", pairs_fingerprint="same")
    more = ("--training.num_steps", 20, "--data.features", features)
    run_module("autoregressive.train", *flags(codes, tmp_path / "one", *more))
    for name, processes, strategy in (
        ("ddp2", 2, ()),
        ("fsdp2", 2, FSDP),
        ("fsdp4", 4, FSDP),
        ("hsdp", 4, HSDP),
    ):
        run = flags(codes, tmp_path / name, *more, *strategy)
        run_module("autoregressive.train", *run, processes=processes)
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), abs=1e-4)


@pytest.mark.slow
def test_a_sharded_checkpoint_continues_on_fewer_processes_and_under_ddp(tmp_path):
    codes, held_out = write_codes(tmp_path / "codes"), write_codes(tmp_path / "val", count=10)
    more = ("--validation", f"[{held_out}]", "--report.sample_every", 6)
    first = flags(codes, tmp_path / "first", *more, *FSDP)
    run_module("autoregressive.train", *first, "--training.num_steps", 6, processes=4)
    expected = validation_losses(tmp_path / "first")[6]
    ends = []
    for name, processes, strategy in (("two", 2, FSDP), ("one", 1, ()), ("ddp", 2, ())):
        subprocess.run(["cp", "-r", tmp_path / "first", tmp_path / name], check=True)
        # A step that changes nothing shows the loss that the restored weights have.
        still = (*more, *strategy, "--optimizer.lr", 1e-30, "--report.sample_every", 7)
        still = flags(codes, tmp_path / name, *still, "--training.num_steps", 7)
        run_module("autoregressive.train", *still, processes=processes)
        assert validation_losses(tmp_path / name)[7] == pytest.approx(expected, abs=1e-5)
        subprocess.run(["rm", "-r", tmp_path / name], check=True)
        subprocess.run(["cp", "-r", tmp_path / "first", tmp_path / name], check=True)
        done = run_module(
            "autoregressive.train",
            *flags(codes, tmp_path / name, *more, *strategy),
            processes=processes,
        )
        assert "continuing at step 6 of 12" in done.stderr
        ends.append(losses(tmp_path / name))
    assert ends[0] == pytest.approx(ends[1], abs=1e-4)
    assert ends[0] == pytest.approx(ends[2], abs=1e-4)


def test_every_sample_of_an_epoch_is_seen_once_whatever_the_number_of_processes():
    order, seen, first = ShuffledOrder(48, seed=3), [], 0
    for size, accumulation, steps in ((4, 1, 3), (2, 2, 4), (1, 4, 2), (8, 1, 9)):
        for _ in range(steps):
            for rank in range(size):
                world = World(rank, size, torch.device("cpu"))
                for positions in local_positions(first, 8, accumulation, world):
                    seen += order[positions].tolist()
            first += 8
    for epoch in np.array(seen).reshape(-1, 48):
        assert sorted(epoch) == list(range(48))


def start(arguments: list[object], log: Path) -> subprocess.Popen:
    """A run of two processes under torchrun, which starts them again when one dies."""
    line = command("autoregressive.train", *arguments, processes=2)
    position = line.index("--standalone")
    line[position:position] = ["--max-restarts=3", "--monitor-interval=0.1"]
    file = log.open("w")
    return subprocess.Popen(line, cwd=ROOT, env=QUICK, stdout=file, stderr=file)


def wait_for_lines(path: Path, count: int, process: subprocess.Popen) -> None:
    while process.poll() is None:
        if path.exists() and len(path.read_text().splitlines()) >= count:
            return
        time.sleep(0.005)
    raise AssertionError(f"the run ended with {process.returncode} before line {count}")


def children(process: subprocess.Popen) -> list[int]:
    listed = subprocess.run(
        ["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True
    )
    return [int(word) for word in listed.stdout.split()]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_rank_that_dies_is_replaced_and_the_weights_are_the_same_bits(tmp_path, strategy):
    codes = write_codes(tmp_path / "codes")
    more = ("--model.token_dropout", 0.1, "--training.num_steps", 80, "--report.save_every", 5)
    more = (*more, "--training.ema_decay", 0.9, "--parallel.strategy", strategy)
    whole = flags(codes, tmp_path / "whole", *more)
    run_module("autoregressive.train", *whole, processes=2)
    for name, number in (("killed", signal.SIGKILL), ("asked", signal.SIGTERM)):
        out = tmp_path / name
        process = start(flags(codes, out, *more), tmp_path / "log")
        wait_for_lines(out / "metrics.jsonl", random.randint(1, 20), process)
        ranks = children(process)
        for pid in ranks if number == signal.SIGTERM else ranks[:1]:
            os.kill(pid, number)
        log = (tmp_path / "log").read_text
        assert process.wait(timeout=120) == 0, log()[-3000:]
        for part in ("model", "ema", "training/optimizer"):
            first, second = (weights(tmp_path / n, 80, part) for n in ("whole", name))
            assert all(torch.equal(first[key], second[key]) for key in first), part
        killed = number == signal.SIGKILL
        happened = "(exitcode: -9)" if killed else f"leaving with code {REQUEUE}"
        assert happened in log(), "the run was over before the signal"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_asked_to_stop_saves_and_leaves_with_the_requeue_code(tmp_path, number):
    codes = write_codes(tmp_path / "codes")
    out = tmp_path / "run"
    run = flags(codes, out, "--training.num_steps", 100000, "--report.save_every", 100000)
    line = command("autoregressive.train", *run)
    process = subprocess.Popen(line, cwd=ROOT, env=QUICK, stderr=subprocess.PIPE, text=True)
    wait_for_lines(out / "metrics.jsonl", 3, process)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == REQUEUE == 75
    (start,) = json.loads((out / "run.json").read_text())
    assert start["ended"] >= start["started"]
    (saved,) = (out / "checkpoints").iterdir()
    assert f"saved after step {int(saved.name.removeprefix('step_'))}; leaving with code 75" in said


@pytest.mark.slow
def test_a_dry_run_shows_what_is_needed_and_writes_nothing(tmp_path):
    codes = write_codes(tmp_path / "codes")
    dry = flags(codes, tmp_path / "run", "--dry_run", "true")
    shown = run_module("autoregressive.train", *dry).stdout
    assert "num_steps: 12" in shown
    assert "parameters            59,712" in shown
    assert "steps per epoch       5.0" in shown
    assert "host GiB per node" in shown
    for strategy in ("ddp", "fsdp", "hsdp"):
        assert f"\n  {strategy} " in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_model_that_cannot_fit_is_refused_with_what_would(tmp_path):
    codes = write_codes(tmp_path / "codes")
    huge = ("--model.num_layers", 200, "--model.num_heads", 48, "--model.dim", 6144)
    done = run_module("autoregressive.train", *flags(codes, tmp_path / "run", *huge), ok=False)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "parallel.strategy fsdp fits on" in line
    assert not (tmp_path / "run").exists()


def launched(arguments: list[object], **environment: str) -> subprocess.CompletedProcess[str]:
    """scripts/launch.sh on two processes."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", ROOT / "scripts" / "launch.sh", "autoregressive.train", *map(str, arguments)],
        cwd=ROOT,
        env={**QUICK, "PATH": path, "NPROC": "2", "MAX_RESTARTS": "2", **environment},
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.mark.slow
def test_the_launcher_does_not_try_a_mistake_again(tmp_path):
    codes = write_codes(tmp_path / "codes")
    # A typo that every rank notices, and a mistake of one rank while the other waits for it.
    (tmp_path / "file").write_text("x")
    for run, line in (
        (flags(codes, tmp_path / "run", "--optimizer.lr", "fast"), "optimizer.lr"),
        (flags(codes, tmp_path / "file"), "is a file, expected a folder"),
    ):
        done = launched(run)
        assert done.returncode == 2, done.stderr[-3000:]
        said = [each for each in done.stderr.splitlines() if line in each]
        assert 1 <= len(said) <= 2, done.stderr  # of one attempt
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_launcher_tries_again_what_may_pass_by_itself(tmp_path):
    codes = write_codes(tmp_path / "codes")
    # The first attempt meets a full disk.
    (tmp_path / "sitecustomize.py").write_text(
        "import os, pathlib\n"
        f"mark = pathlib.Path({str(tmp_path / 'attempts')!r})\n"
        "if 'RANK' in os.environ:\n"
        "    with mark.open('a') as file:\n"
        "        file.write('x')\n"
        "    if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
        "        import core.training.run\n"
        "        def full(*_): raise OSError(28, 'no space left on device')\n"
        "        core.training.run.Run.start = full\n"
    )
    path = f"{tmp_path}:{ROOT}"
    done = launched(flags(codes, tmp_path / "run", "--training.num_steps", 2), PYTHONPATH=path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (
        "no space left on device; free space there, then run the same command again" in done.stderr
    )
    assert (tmp_path / "attempts").read_text() == "xxxx"  # two ranks, twice
    assert len(losses(tmp_path / "run")) == 2


@pytest.mark.slow
def test_a_run_starts_from_the_same_weights_under_every_strategy(tmp_path):
    codes = write_codes(tmp_path / "codes")
    # A step that changes nothing: what is saved after it are the initial weights.
    more = ("--training.num_steps", 1, "--optimizer.lr", 1e-30, "--training.ema_decay", 0.9)
    run_module("autoregressive.train", *flags(codes, tmp_path / "one", *more))
    for name, processes, strategy in (("fsdp2", 2, FSDP), ("hsdp", 4, HSDP)):
        run = flags(codes, tmp_path / name, *more, *strategy)
        run_module("autoregressive.train", *run, processes=processes)
        for part in ("model", "ema"):
            ours, theirs = (weights(tmp_path / n, 1, part) for n in (name, "one"))
            assert ours["output.weight"].abs().max() < 1e-29  # zero at the start
            for key in theirs.keys() - {"output.weight"}:
                assert torch.equal(ours[key], theirs[key]), (name, part, key)
