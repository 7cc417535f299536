"""Training on a CUDA device: no wait for it in the loop, one card under FSDP2, exact resume."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.codes import write_codes
from helpers.models import tiny
from safetensors.torch import load_file

from autoregressive import generate
from autoregressive.data.config import DataConfig
from autoregressive.inference.engine import InferenceEngine
from autoregressive.inference.generate import generation_request
from autoregressive.inference.sampling_config import SamplingConfig
from autoregressive.models.config import GPTConfig, TransformerConfig
from autoregressive.train import build_models, train
from autoregressive.training.config import TrainConfig
from core.distributed.config import ParallelConfig
from core.distributed.world import World
from core.training.config import ReportConfig, TrainingConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
GRID = (4, 4)
SMALL = GPTConfig(num_layers=2, num_heads=4, dim=64, vocab_size=64, num_classes=9, grid=GRID)


@pytest.fixture
def one_card(tmp_path):
    """A world of one process with NCCL."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=CUDA)
    yield World(0, 1, torch.device("cuda", 0))
    dist.destroy_process_group()


def config(folder: Path, strategy: str = "ddp", **training: object) -> TrainConfig:
    return TrainConfig(
        folder / "run",
        DataConfig((folder / "codes",)),
        training=TrainingConfig(**{"num_steps": 6, "batch_size": 8, "ema_decay": 0.9, **training}),
        model=TransformerConfig(num_layers=2, num_heads=4, dim=64),
        parallel=ParallelConfig(strategy),
        report=ReportConfig(save_every=3, report_every=2),
        sample_columns=1,
    )


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_no_step_of_training_waits_for_the_device(one_card, tmp_path, strategy):
    models = build_models(config(tmp_path, strategy), SMALL, one_card, initialized=True)
    codes = torch.randint(64, (8, 16), device=CUDA)
    labels = torch.randint(9, (8,), device=CUDA)

    def step(i: int) -> None:
        with one_card.autocast("bf16"):
            loss = models.parallel(codes, labels)
        loss.backward()
        models.stepper.step(i, 10)
        assert models.ema is not None
        models.ema.update(models.objective.gpt)

    step(0)  # allocates
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(1, 4):
            step(i)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    models.stepper.check()


@pytest.mark.parametrize("compiled", [False, True])
def test_no_step_of_sampling_waits_for_the_device(compiled):
    gpt = tiny(seed=4, dim=64)
    engine = InferenceEngine(gpt, "bf16", compile=compiled, device=CUDA)
    labels = torch.tensor([0, 4, 2, 1], device=CUDA)
    generate(engine, labels, cfg_scale=2.0, top_k=9)  # compiles, captures
    request = generation_request(gpt, labels, SamplingConfig(cfg_scale=2.0, top_k=9))
    steps = engine.steps(request)
    next(steps)  # the prefill reads the request
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in steps:
            pass
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_resumed_run_ends_with_the_same_bits(one_card, tmp_path, strategy):
    write_codes(tmp_path / "codes")
    whole = config(tmp_path, strategy)
    train(whole, one_card)
    halves = replace(whole, out=tmp_path / "halves")
    train(replace(halves, training=replace(whole.training, num_steps=3)), one_card)
    train(halves, one_card)
    for name in ("model.safetensors", "ema.safetensors"):
        first, second = (
            load_file(run.out / "checkpoints" / "step_0000006" / name) for run in (whole, halves)
        )
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
