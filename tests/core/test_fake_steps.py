"""Optimizer and EMA steps on fake tensors: a step of training never waits for the device.

On a fake CPU, because the gradients of fake CUDA tensors need a driver. The host reads of a step
are the same on both.
"""

import pytest
import torch
from helpers.fake_cuda import fake_tensors, to_fake
from helpers.training import CPU, network
from torch._subclasses.fake_tensor import DataDependentOutputException

from core.training.config import OptimizerConfig
from core.training.ema import EMA
from core.training.optimizer import Stepper, build_adamw

CONFIGS = [
    {},
    {"clip_norm": None},
    {"spike_norm": 5.0, "on_nan": "skip"},
    {"schedule": "wsd", "decay_steps": 3},
]


def two_steps(config: OptimizerConfig, plant=lambda stepper: None) -> None:
    with fake_tensors():
        net, average = (to_fake(network(), CPU) for _ in range(2))
        stepper = Stepper(build_adamw(net, config), config, CPU)
        ema = EMA(net, 0.9, average)
        for step in range(2):
            net(torch.ones(5, 3)).square().mean().backward()
            norm = stepper.step(step, 10)
            ema.update(net)
            plant(stepper)
            assert norm.shape == ()


@pytest.mark.parametrize("settings", CONFIGS, ids=str)
def test_steps_of_optimizer_and_ema_read_no_value(settings):
    two_steps(OptimizerConfig(**settings))


def test_a_planted_host_read_fails():
    with pytest.raises(DataDependentOutputException):
        two_steps(OptimizerConfig(), lambda stepper: stepper.check())
