"""What a training run of the transformer needs: memory per process, and the time of a step."""

import torch

from autoregressive.models.config import GPTConfig
from autoregressive.models.gpt import GPT
from autoregressive.models.transformer import Block
from autoregressive.objectives.build import build_objective
from autoregressive.training.config import TrainConfig
from core.distributed.world import World
from core.training.memory_plan import (
    Plan,
    count_parameters,
    plan_model,
    transformer_activations,
)
from core.training.speed_plan import StepPlan


def plan_training(
    config: TrainConfig,
    gpt_config: GPTConfig,
    samples: int,
    world: World,
    codebook: torch.Tensor | None = None,
) -> Plan:
    """The memory and the least time that the run needs, counted on a model on the meta device.

    samples: Number of training samples. codebook: As for build_objective.
    """
    seed, chunk = config.training.seed, config.loss_chunk
    with torch.device("meta"):
        objective = build_objective(
            config.objective, GPT(gpt_config), chunk, seed, codebook, samples
        )
    gpt = objective.gpt
    length = gpt_config.num_condition + gpt_config.num_codes - 1
    rows = config.training.batch_size // (world.size * config.training.gradient_accumulation)
    rows *= objective.sequences_per_image
    kept = transformer_activations(
        rows * length,
        gpt_config.dim,
        gpt_config.ffn_dim,
        gpt_config.num_layers,
        config.parallel.activation_checkpointing,
    )
    logits = 4 * min(config.loss_chunk, rows * gpt_config.num_codes) * gpt_config.vocab_size
    training, parameters = config.training, count_parameters(gpt)
    in_blocks = sum(count_parameters(block) for block in gpt.blocks)
    averaged = training.ema_decay is not None
    compute_bytes = 2 if training.precision == "bf16" else 4
    step = StepPlan(
        parameters,
        parameters - in_blocks,
        gpt_config.training_flops * training.batch_size * gpt_config.num_codes,
        kept * world.size * training.gradient_accumulation,
        compute_bytes,
        training.gradient_accumulation,
        config.parallel.activation_checkpointing,
        averaged,
    )
    frozen = sum(p.numel() for p in gpt.parameters() if not p.requires_grad)  # the base of LoRA
    return plan_model(
        objective,
        Block,
        gpt if averaged else None,
        kept + logits,
        samples,
        training.batch_size,
        training.num_steps,
        scored=config.evaluation.every is not None,
        accumulates=training.gradient_accumulation > 1,
        compute_bytes=compute_bytes,
        step=step,
        processes=world.size,
        one_moment=_muon_parameters(gpt) if config.optimizer.kind == "muon" else 0,
        ema_shared=frozen if averaged else 0,
        sampled=parameters,
    )


def _muon_parameters(gpt: GPT) -> int:
    state = gpt.state_dict()
    return sum(state[name].numel() for name in gpt.hidden_matrices())
