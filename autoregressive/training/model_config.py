"""The configuration of the model of a training run, by its data and, with LoRA, by its base."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from autoregressive.data.codes import tokenizer_names
from autoregressive.data.open import Dataset
from autoregressive.models.config import GPTConfig, LoRAConfig, TransformerConfig
from autoregressive.models.pretrained import Stored, read_gpt
from autoregressive.objectives.build import LOSSES, check_order
from autoregressive.training.config import LORA_LACKS, TrainConfig
from core.config import InputError
from core.distributed.world import World
from core.weights import tensors_sha256

# Fields of the transformer that training may choose for a base that has its weights.
REGULARISATION = ("token_dropout", "residual_dropout", "ffn_dropout", "drop_path")


def resolve_model(
    config: TrainConfig, data: Dataset, world: World
) -> tuple[TrainConfig, GPTConfig]:
    """The configuration of the model, and that of the run with the model's shape.

    All ranks call it. Raises InputError if the data do not fit the base of a LoRA.
    """
    if config.lora.rank is None:
        check_order(config.objective, config.model.parallel_regions)
        added = LOSSES[config.objective.kind].model_fields
        shape = dataclasses.asdict(config.model)
        return config, GPTConfig(**shape, **data.model_fields(), **added)
    assert config.init_from is not None
    if LOSSES[config.objective.kind].model_fields:
        raise InputError(f"lora: {LORA_LACKS.format(config.objective.kind)}")
    stored = read_gpt(config.init_from, grid=data.model_fields()["grid"])
    gpt_config = _lora_model(config, data, stored, world)
    names = [part.name for part in dataclasses.fields(TransformerConfig)]
    shape = TransformerConfig(**{name: getattr(gpt_config, name) for name in names})
    return dataclasses.replace(config, model=shape), gpt_config


def _lora_model(config: TrainConfig, data: Dataset, stored: Stored, world: World) -> GPTConfig:
    """The base's configuration, with the low-rank matrices and the classes of the data."""
    base, fields, source = stored.config, data.model_fields(), config.init_from
    assert config.lora.rank is not None and source is not None
    _check_shape(config.model, base, source)
    _check_data(fields, base, source)
    known = base.tokenizer_sha256
    if known and known not in tokenizer_names(data.index):
        raise InputError(
            f"init_from {source}: was trained on codes of another tokenizer (sha256 {known[:12]}); "
            "encode the images with that one"
        )
    new_classes = max(0, fields.get("num_classes", 0) - base.num_classes)
    if config.data.first_class > base.num_classes:
        raise InputError(
            f"data.first_class is {config.data.first_class}, but {source} has {base.num_classes} "
            f"classes: new ones begin at {base.num_classes}"
        )
    sha256 = world.broadcast(tensors_sha256(stored.tensors) if world.is_main else "")
    lora = LoRAConfig(
        config.lora.rank,
        config.lora.alpha,
        config.lora.targets,
        source,
        _path_from_checkpoint(source, stored.path, config.out),
        sha256,
        new_classes,
    )
    return dataclasses.replace(
        base,
        grid=fields["grid"],
        tokenizer_sha256=fields["tokenizer_sha256"] or known,
        num_classes=base.num_classes + new_classes,
        lora=lora,
        **{name: getattr(config.model, name) for name in REGULARISATION},
    )


def _check_shape(model: TransformerConfig, base: GPTConfig, source: str) -> None:
    """Raise InputError for a field of `model` that was set, and is not the base's."""
    for part in dataclasses.fields(model):
        ours, theirs = getattr(model, part.name), getattr(base, part.name)
        if part.name not in REGULARISATION and ours not in (part.default, theirs):
            raise InputError(
                f"model.{part.name} is {ours}, but LoRA keeps the shape of init_from {source}, "
                f"which has {theirs}: leave it out"
            )


def _check_data(fields: dict[str, Any], base: GPTConfig, source: str) -> None:
    """Raise InputError if the codes or captions are not such as the base was trained on."""
    for name in ("condition", "vocab_size", "text_dim", "max_text_tokens"):
        if name in fields and fields[name] != getattr(base, name):
            raise InputError(
                f"data: {name} is {fields[name]}, but init_from {source} has "
                f"{getattr(base, name)}, which LoRA cannot change"
            )
    ours, theirs = fields.get("text_encoder"), base.text_encoder
    if ours and theirs and ours != theirs:
        raise InputError(f"data.features: init_from {source} was trained with another text encoder")


def _path_from_checkpoint(source: str, weights: Path, out: Path) -> str | None:
    """The base's path from a checkpoint of the run in `out`; None if `source` is no local path.

    Of a run's folder it is the checkpoint that was read, because the run may go on.
    """
    if not Path(source).exists():
        return None
    ours = weights.name in ("model.safetensors", "ema.safetensors")
    base = weights.parent if ours else weights
    return os.path.relpath(base.resolve(), (out / "checkpoints" / "step").resolve())
