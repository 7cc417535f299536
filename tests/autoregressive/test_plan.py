"""What the plan of a training counts, beside the parameters of the models that it builds."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers.models import TINY

from autoregressive.data.config import DataConfig
from autoregressive.models.config import GPTConfig, TransformerConfig
from autoregressive.objectives.build import LOSSES
from autoregressive.objectives.config import (
    AlignmentOptions,
    ClustersOptions,
    NoisyContextOptions,
    ObjectiveConfig,
)
from autoregressive.train import build_models
from autoregressive.training.config import TrainConfig
from autoregressive.training.plan import plan_training
from core.training.config import OptimizerConfig, TrainingConfig

GPT_CONFIG = GPTConfig(**TINY, grid=(4, 4))
IMAGES = 40
CODEBOOK = torch.ones(TINY["vocab_size"], 8)


def config(folder, kind: str, batch_size: int = 8) -> TrainConfig:
    np.save(folder / "features.npy", np.zeros((IMAGES, 16, 6), np.float32))
    options = {
        "alignment": AlignmentOptions(features=folder / "features.npy", hidden=16),
        "noisy_context": NoisyContextOptions(hidden=16),
        "clusters": ClustersOptions(count=10),
    }
    return TrainConfig(
        folder / "run",
        DataConfig((folder / "codes",)),
        init_from="published" if kind == "contrastive" else None,
        training=TrainingConfig(6, batch_size, precision="fp32", ema_decay=0.9),
        model=TransformerConfig(num_layers=2, num_heads=4, dim=32),
        objective=ObjectiveConfig(kind, **{kind: options[kind]} if kind in options else {}),
    )


@pytest.mark.parametrize("kind", LOSSES)
def test_every_parameter_of_every_objective_is_counted(tmp_path, world, kind, monkeypatch):
    monkeypatch.setattr("autoregressive.train.start_from", lambda *of: None)
    run, codebook = config(tmp_path, kind), CODEBOOK if LOSSES[kind].needs_codebook else None
    plan = plan_training(run, GPT_CONFIG, IMAGES, world, codebook)
    models = build_models(run, GPT_CONFIG, world, True, IMAGES, codebook)
    trained = sum(p.numel() for p in models.objective.parameters() if p.requires_grad)
    optimized = [p for g in models.stepper.optimizer.param_groups for p in g["params"]]
    assert plan.parameters == trained == sum(p.numel() for p in optimized)
    everything = sum(p.numel() for p in models.objective.parameters())
    averaged = sum(p.numel() for p in models.ema.model.parameters())
    parts = plan.parts("ddp", 1, 1)
    assert parts["weights"] + parts.get("frozen weights", 0) == 4 * everything
    assert parts["Adam's moments"] == 8 * trained
    assert parts["EMA weights"] == 4 * averaged


def test_the_reference_and_the_heads_need_memory_and_two_sequences_twice_the_activations(
    tmp_path, world
):
    plans = {
        kind: plan_training(
            config(tmp_path, kind),
            GPT_CONFIG,
            IMAGES,
            world,
            CODEBOOK if kind == "noisy_context" else None,
        )
        for kind in ("next_token", "alignment", "noisy_context", "contrastive")
    }
    gpt = plans["next_token"].parameters
    assert plans["contrastive"].frozen == plans["contrastive"].parameters == gpt
    assert plans["alignment"].parameters == gpt + 33 * 16 + 17 * 16 + 17 * 6
    assert plans["noisy_context"].parameters == gpt + 2 * (33 * 16 + 17 * 16 + 17 * 8)
    assert plans["contrastive"].activations == 2 * plans["next_token"].activations


def test_muon_keeps_one_moment_of_a_matrix(tmp_path, world):
    run = config(tmp_path, "next_token")
    run = dataclasses.replace(run, optimizer=OptimizerConfig(kind="muon"))
    plan = plan_training(run, GPT_CONFIG, IMAGES, world)
    models = build_models(run, GPT_CONFIG, world, True, IMAGES)
    for parameter in models.objective.gpt.parameters():
        parameter.grad = torch.ones_like(parameter)
    models.stepper.step(0, 6)
    states = models.stepper.optimizer.state.values()
    kept = sum(t.numel() for state in states for t in state.values() if t.ndim)
    assert plan.parts("ddp", 1, 1)["moments of Muon and Adam"] == 4 * kept
