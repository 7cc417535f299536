import shutil
import subprocess
import sys

import pytest
import torch
from helpers.paths import ROOT
from helpers.training import checkpointer, network, train
from torch import nn

from core.checksums import find_damage
from core.config import InputError
from core.files import file_sha256
from core.training.checkpoint import Checkpointer
from core.weights import inference_files
from tokenizer import VQConfig


def test_a_restored_run_continues_bit_for_bit(tmp_path, world):
    whole = network()
    train(whole, checkpointer(tmp_path / "a", world, whole)[1], range(6))
    first = network()
    keeper, stepper = checkpointer(tmp_path / "b", world, first)
    train(first, stepper, range(3))
    keeper.save(3, samples=15)
    keeper.wait()
    second = network()
    keeper, stepper = checkpointer(tmp_path / "b", world, second)
    assert keeper.restore_latest() == {"step": 3, "samples": 15}
    train(second, stepper, range(3, 6))
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_old_checkpoints_go_and_a_fresh_folder_restores_nothing(tmp_path, world):
    keeper, _ = checkpointer(tmp_path, world, network())
    assert keeper.restore_latest() == {"step": 0}
    for step in (1, 2, 3):
        keeper.save(step)
        keeper.wait()
    assert keeper.steps() == [2, 3]
    assert not list(tmp_path.glob(".*"))


def test_every_nth_checkpoint_is_kept_for_good(tmp_path, world):
    net = network()
    keeper = Checkpointer(tmp_path, VQConfig(), world, keep_last=1, keep_every=4, model=net)
    for step in range(1, 10):
        keeper.save(step)
        keeper.wait()
    assert keeper.steps() == [4, 8, 9]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, world):
    net = network()
    keeper, stepper = checkpointer(tmp_path, world, net)
    train(net, stepper, range(1))
    before = [parameter.clone() for parameter in net.parameters()]
    keeper.save(1)
    train(net, stepper, range(1, 3))  # what is written is what was there
    keeper.wait()
    keeper.restore_latest()
    for a, b in zip(before, net.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_part_that_is_unused_is_left_out_and_kept_as_it_was_built(tmp_path, world):
    net, other = network(), network()
    keeper = Checkpointer(tmp_path, VQConfig(), world, 2, None, model=net, other=other)
    keeper.save(1, unused=("other",), samples=4)
    keeper.finish()
    assert not (tmp_path / "step_0000001" / "training" / "other.safetensors").exists()
    before = [parameter.clone() for parameter in other.parameters()]
    assert keeper.restore_latest() == {"step": 1, "samples": 4}
    keeper.save(2)
    keeper.finish()
    assert (tmp_path / "step_0000002" / "training" / "other.safetensors").exists()
    with torch.no_grad():
        next(other.parameters()).zero_()
    assert keeper.restore_latest() == {"step": 2}
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))


def test_a_folder_beside_the_checkpoints_is_no_checkpoint(tmp_path, world):
    keeper, _ = checkpointer(tmp_path / "checkpoints", world, network())
    for step in (9, 10):
        keeper.save(step)
        keeper.wait()
    newest = tmp_path / "checkpoints" / "step_0000010"
    for name in ("step_0000011.bak", "step_0000012_old", "step_x", "step_", "step_\u0663"):
        shutil.copytree(newest, newest.with_name(name))
    (newest.parent / "step_0000013").touch()
    assert keeper.steps() == [9, 10]
    assert keeper.restore_latest()["step"] == 10
    assert inference_files(tmp_path, "auto").weights.parent == newest
    keeper.save(11)
    keeper.wait()
    assert keeper.steps() == [10, 11]
    assert (newest.parent / "step_0000011.bak").exists()


def test_the_newest_checkpoint_is_that_of_the_last_step_not_of_the_last_name(tmp_path, world):
    keeper, _ = checkpointer(tmp_path / "checkpoints", world, network())
    for step in (9_999_999, 10_000_000):
        keeper.save(step)
        keeper.wait()
    assert inference_files(tmp_path, "auto").weights.parent.name == "step_10000000"
    assert keeper.restore_latest()["step"] == 10_000_000


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_never_saved(tmp_path, world, bad):
    net = network()
    keeper, _ = checkpointer(tmp_path, world, net)
    keeper.save(1)
    keeper.wait()
    list(net.parameters())[-1].data[0] = bad
    with pytest.raises(InputError, match=r"model/2\.bias is not finite after step 2"):
        keeper.save(2)
    assert keeper.steps() == [1]
    assert not list(tmp_path.glob(".*"))
    assert keeper.restore_latest()["step"] == 1


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
@pytest.mark.parametrize(
    "file",
    [
        "model.safetensors",
        "config.yaml",
        "checksums.json",
        "training/optimizer.safetensors",
        "training/state.json",
    ],
)
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_used(
    tmp_path, world, caplog, damage, file
):
    net = network()
    keeper, stepper = checkpointer(tmp_path, world, net)
    train(net, stepper, range(1))
    keeper.save(1)
    keeper.wait()
    keeper.save(2)
    keeper.wait()
    path = tmp_path / "step_0000002" / file
    data = bytearray(path.read_bytes())
    if damage == "delete":
        path.unlink()
    else:
        data[-3] ^= 1
        path.write_bytes(data if damage == "flip" else data[:-3])
    assert find_damage(tmp_path / "step_0000002")
    assert keeper.restore_latest()["step"] == 1
    assert caplog.text.count("is damaged") == 1
    assert "step_0000002 is damaged" in caplog.text


def test_a_run_with_damaged_checkpoints_alone_does_not_start_again(tmp_path, world):
    keeper, _ = checkpointer(tmp_path, world, network())
    keeper.save(1)
    keeper.wait()
    (tmp_path / "step_0000001" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no checkpoint is intact"):
        keeper.restore_latest()


def test_weights_of_another_architecture_are_refused(tmp_path, world):
    keeper, _ = checkpointer(tmp_path, world, network())
    keeper.save(1)
    keeper.wait()
    other, _ = checkpointer(tmp_path, world, nn.Sequential(nn.Linear(3, 5)))
    with pytest.raises(InputError, match="another architecture"):
        other.restore_latest()


def test_inference_takes_the_newest_checkpoint_of_a_run(tmp_path, world):
    keeper, _ = checkpointer(tmp_path / "checkpoints", world, network())
    keeper.save(1)
    keeper.wait()
    keeper.save(12)
    keeper.wait()
    config, weights, sha256 = inference_files(tmp_path, "auto")
    assert config.parent.name == weights.parent.name == "step_0000012"
    assert weights.name == "model.safetensors"
    assert sha256 == file_sha256(weights)
    with pytest.raises(InputError, match=r"ema\.safetensors"):
        inference_files(tmp_path, "ema")


FULL_DISK = """
import resource, sys
from pathlib import Path
from helpers.training import checkpointer
from core.config import run_command
from core.distributed.world import World, choose_device
from torch import nn
def main():
    net = nn.Linear(300, 300)
    keeper, _ = checkpointer(Path(sys.argv[1]), World(0, 1, choose_device("cpu")), net)
    keeper.save(1)
    keeper.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # as a full disk: writing fails
    keeper.save(2)
    keeper.wait()
    print("training goes on", keeper.steps())
    if sys.argv[2] == "space again":
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    keeper.save(3)
    keeper.finish()
run_command(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", ["space again", "still full"])
def test_a_full_disk_leaves_the_last_good_checkpoint_and_training_goes_on(tmp_path, world, end):
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path), end]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": f"{ROOT}:tests"}
    )
    assert "training goes on [1]" in done.stdout
    lines = done.stderr.strip().splitlines()
    assert "cannot save the checkpoint of step 2" in lines[0]
    assert "checkpoint of step 1 is intact" in lines[0]
    assert find_damage(tmp_path / "step_0000001") == ""
    assert not list(tmp_path.glob(".*"))
    if end == "space again":
        assert len(lines) == 1
        assert find_damage(tmp_path / "step_0000003") == ""
    else:  # what was trained since would be lost without a word
        assert done.returncode == 1  # a disk may have space again: a launcher tries again
        assert "cannot save the checkpoint of step 3" in lines[-1]
