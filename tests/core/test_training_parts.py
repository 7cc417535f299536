import itertools
import math
import subprocess
import sys

import pytest
import torch
from helpers.paths import ROOT
from helpers.training import CPU, network, train
from torch import nn

from core.config import InputError
from core.training.config import OptimizerConfig
from core.training.ema import EMA
from core.training.optimizer import Stepper, build_adamw, learning_rate


def test_schedules_at_their_corners():
    constant = OptimizerConfig(lr=1.0, warmup_steps=4)
    assert [learning_rate(s, constant, 100) for s in (0, 1, 3, 4, 99)] == [0.25, 0.5, 1, 1, 1]
    cosine = OptimizerConfig(lr=1.0, schedule="cosine", warmup_steps=10, final_lr=0.1)
    assert learning_rate(10, cosine, 110) == 1
    assert learning_rate(60, cosine, 110) == pytest.approx(0.55)
    assert learning_rate(110, cosine, 110) == pytest.approx(0.1)
    wsd = OptimizerConfig(lr=1.0, schedule="wsd", decay_steps=20)
    assert learning_rate(79, wsd, 100) == 1
    assert learning_rate(90, wsd, 100) == pytest.approx(0.5)
    assert learning_rate(100, wsd, 100) == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [("lr", 0.0), ("betas", (0.9, 1.0)), ("clip_norm", -1.0), ("final_lr", 2), ("decay_steps", 5)],
)
def test_settings_that_cannot_train_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        OptimizerConfig(**{field: value})


def test_only_matrices_are_decayed():
    groups = build_adamw(network(), OptimizerConfig(weight_decay=0.05)).param_groups
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    assert all(p.ndim >= 2 for p in groups[0]["params"])
    assert all(p.ndim < 2 for p in groups[1]["params"])


def test_the_optimiser_is_adamw_of_the_library():
    ours, theirs = network(), network()
    config = OptimizerConfig(lr=1e-2, weight_decay=0.1, clip_norm=None)
    train(ours, Stepper(build_adamw(ours, config), config, CPU), range(5))
    matrices = [p for p in theirs.parameters() if p.ndim >= 2]
    others = [p for p in theirs.parameters() if p.ndim < 2]
    groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(5):
        torch.manual_seed(step)
        theirs(torch.randn(5, 3)).square().mean().backward()
        adamw.step()
        adamw.zero_grad()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_step_with_nan_changes_nothing_and_is_named():
    config = OptimizerConfig(lr=1e-2)
    net = network()
    optimizer = build_adamw(net, config)
    stepper = Stepper(optimizer, config, CPU)
    train(net, stepper, range(3))
    before = [p.clone() for p in net.parameters()]
    moments = [optimizer.state[p]["exp_avg"].clone() for p in net.parameters()]
    train(net, stepper, range(3, 4), poison=3)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    for moment, p in zip(moments, net.parameters(), strict=True):
        assert torch.equal(moment, optimizer.state[p]["exp_avg"])
    with pytest.raises(InputError, match="at step 3"):
        stepper.check()
    skipping = Stepper(optimizer, OptimizerConfig(on_nan="skip"), CPU)
    train(net, skipping, range(4, 7), poison=5)
    assert skipping.check() == 1
    assert all(p.isfinite().all() for p in net.parameters())


def test_gradients_are_clipped_to_the_norm():
    config = OptimizerConfig(clip_norm=0.5)
    net = nn.Linear(2, 1, bias=False)
    stepper = Stepper(build_adamw(net, config), config, CPU)
    (net(torch.tensor([[30.0, 40.0]])) * 1).sum().backward()
    assert stepper.step(0, 10).item() == pytest.approx(50)
    state = stepper.optimizer.state[net.weight]
    assert state["exp_avg"].norm().item() == pytest.approx(0.5 * 0.1, rel=1e-3)


def test_averaged_weights_follow_by_their_decay():
    net = network()
    ema = EMA(net, 0.9)
    start = ema.model[0].weight.clone()
    with torch.no_grad():
        net[0].weight += 1
    ema.update(net)
    torch.testing.assert_close(ema.model[0].weight, start + 0.1)
    assert not any(p.requires_grad for p in ema.model.parameters())


COLLECTIVES = """
import json
import sys
from pathlib import Path
import torch
from core.distributed.world import distributed
with distributed("cpu") as world:
    total = world.sum(torch.tensor([world.rank + 1.0]))
    seen = [float(total), world.gather(world.rank), world.broadcast(world.rank + 5)]
    Path(sys.argv[1], f"{world.rank}.json").write_text(json.dumps(seen))
"""


@pytest.mark.slow
def test_two_processes_sum_gather_and_broadcast(tmp_path):
    (tmp_path / "collectives.py").write_text(COLLECTIVES)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, str(tmp_path / "collectives.py"), str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for rank in range(2):
        assert (tmp_path / f"{rank}.json").read_text() == "[3.0, [0, 1], 5]"


def test_the_cosine_is_smooth():
    config = OptimizerConfig(lr=1.0, schedule="cosine")
    rates = [learning_rate(step, config, 50) for step in range(50)]
    assert all(a >= b for a, b in itertools.pairwise(rates))
    assert math.isclose(rates[25], 0.5)


def test_a_gradient_above_the_spike_norm_changes_nothing_and_is_named():
    for on_nan in ("skip", "stop"):
        net = torch.nn.Linear(2, 1, bias=False)
        config = OptimizerConfig(on_nan=on_nan, spike_norm=10.0, lr=0.1)
        stepper = Stepper(build_adamw(net, config), config, CPU)
        before = net.weight.detach().clone()
        net(torch.full((1, 2), 1e3)).sum().backward()
        stepper.step(0, 10)
        assert torch.equal(net.weight, before)
        if on_nan == "skip":
            assert stepper.check() == 1
            net(torch.ones(1, 2)).sum().backward()
            stepper.step(1, 10)
            assert not torch.equal(net.weight, before)
        else:
            with pytest.raises(InputError, match=r"above optimizer.spike_norm 10.0\) at step 0"):
                stepper.check()
