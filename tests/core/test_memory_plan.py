"""The memory plan against processes that train, and against torch's own tracker."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers.clusters import one_of_many
from helpers.commands import command, environment
from helpers.fsdp_memory import LARGE, PARALLEL, objective_of, plan_of
from helpers.paths import ROOT
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

from autoregressive.models.gpt import Block
from core.distributed.parallel import prepare
from core.training.initialization import initialize
from core.training.optimizer import OptimizerConfig, build_adamw


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
@pytest.mark.parametrize("precision", ["bf16"])
def test_the_plan_is_within_a_tenth_of_the_peak_of_four_sharded_processes(precision):
    # By default the C library keeps what is freed, as much again as what is in use.
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    at_once = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        command("helpers.fsdp_memory", precision, processes=4),
        env={**environment(), **at_once, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    bytes_ = json.loads(done.stdout)
    assert bytes_["planned"] == pytest.approx(bytes_["measured"], rel=0.1)


@pytest.mark.slow
def test_the_plan_is_within_a_tenth_of_what_torch_s_tracker_counts_on_one_of_four_processes():
    """On real tensors: under FakeTensorMode it counts what never exists (see core/README.md)."""
    with one_of_many(0, 4) as world:
        objective = objective_of(LARGE)
        model = prepare(objective, PARALLEL, world, "bf16", Block)
        objective.gpt.build_rotary()
        initialize(objective.gpt, 0)
        optimizer = build_adamw(objective.gpt, OptimizerConfig())
        tracker = FSDPMemTracker(objective, optimizer)
        tracker.track_inputs(())
        with tracker:
            for _ in range(2):
                codes = torch.zeros(1, LARGE.num_codes, dtype=torch.int64)
                with world.autocast("bf16"):
                    loss = model(codes, torch.zeros(1, dtype=torch.int64))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                tracker.reset_mod_stats()
        plan = plan_of(objective, LARGE, "bf16", None)
    counted = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    states = next(count for kind, count in counted.items() if str(kind).endswith("OPT"))
    assert states == pytest.approx(plan.parts("fsdp", 4, 4)["Adam's moments"], rel=0.01)
    assert plan.bytes_per_process("fsdp", 4, 4) == pytest.approx(counted["Total"], rel=0.1)
