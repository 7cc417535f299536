"""The memory plan against processes that train."""

import json
import os
import subprocess
import sys

import pytest
from helpers.commands import command, environment
from helpers.paths import ROOT


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
