"""A kill at each write of a checkpoint and of a shard: the command continues with the same bits."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from helpers.training import checkpointer, network, train

from core.checksums import find_damage
from core.data.shards import ShardWriter

STEPS = 2
# What makes a file or folder appear, vanish, or lie on the disk.
CALLS = ((os, "replace"), (os, "fsync"), (shutil, "rmtree"))


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the project catches it."""


@contextmanager
def kill_at(number: int) -> Iterator[list[str]]:
    """Raise Killed in place of the call `number` of CALLS, and of all later ones -> the calls."""
    calls: list[str] = []

    def failing(name: str, function: Callable) -> Callable:
        def call(*arguments, **options):
            calls.append(name)
            if len(calls) > number:
                raise Killed(name)
            return function(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for module, name in CALLS:
            patch.setattr(module, name, failing(name, getattr(module, name)))
        yield calls


def train_to_the_end(folder: Path, world) -> dict[str, bytes]:
    """Resume or begin, train, save after every step -> the bytes of the last checkpoint."""
    net = network()
    keeper, stepper = checkpointer(folder, world, net, keep_last=1)
    first = keeper.restore_latest()["step"]
    for step in range(first, STEPS):
        keeper.wait_for_copy()
        train(net, stepper, range(step, step + 1))
        keeper.save(step + 1)
        keeper.wait()
    assert keeper.steps()[-1] == STEPS
    last = folder / f"step_{STEPS:07d}"
    assert find_damage(last) == ""
    return {str(p.relative_to(last)): p.read_bytes() for p in last.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_a_kill_at_any_write_of_a_checkpoint_changes_no_bit(tmp_path, world):
    expected = train_to_the_end(tmp_path / "whole", world)
    with kill_at(10**9) as calls:
        train_to_the_end(tmp_path / "counted", world)
    assert {"replace", "fsync", "rmtree"} <= set(calls)
    assert len(calls) >= 20
    for number in range(len(calls)):
        folder = tmp_path / str(number)
        with pytest.raises(Killed), kill_at(number):
            train_to_the_end(folder, world)
        assert train_to_the_end(folder, world) == expected, calls[number]
        assert not list(folder.glob(".*")), calls[number]


def write_all(folder: Path, world) -> dict[str, bytes]:
    """Write the shards that are missing, and the index -> every file of the folder."""
    writer = ShardWriter(folder, 20, 3, {"made_of": "squares"}, world)
    for shard in writer.begin():
        items = np.array(writer.items(shard))
        writer.write(shard, {"x": items[:, None] ** 2}, {"ragged": np.arange(shard)})
    writer.finish({})
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_kill_at_any_write_of_a_shard_changes_no_bit(tmp_path, world):
    expected = write_all(tmp_path / "whole", world)
    with kill_at(10**9) as calls:
        write_all(tmp_path / "counted", world)
    assert len(calls) >= 20
    for number in range(len(calls)):
        folder = tmp_path / str(number)
        with pytest.raises(Killed), kill_at(number):
            write_all(folder, world)
        assert write_all(folder, world) == expected, calls[number]
