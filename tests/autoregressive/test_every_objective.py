"""What every objective must do: gradients, batches, exact resume, round trips, sampling.

A new objective takes part with one line in CASES.
"""

import dataclasses
import shutil
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.clusters import run_in_processes
from helpers.codes import write_codes, write_codes_of
from helpers.models import tiny, write_models
from helpers.training import flags, losses, weights
from torch.distributed.tensor import DTensor

from autoregressive import GPT, generate
from autoregressive.objectives.base import Objective
from autoregressive.objectives.build import LOSSES, build_objective
from autoregressive.objectives.config import (
    AlignmentOptions,
    ClustersOptions,
    NextPatchOptions,
    NoisyContextOptions,
    ObjectiveConfig,
    ZLossOptions,
)
from autoregressive.train import build_models, train
from autoregressive.training.config import TrainConfig
from core.config import InputError, load_config, parse_config, save_config
from core.distributed.world import World

CASES: dict[str, dict[str, typing.Any]] = {
    "next_token": {},
    "next_patch": {},
    "alignment": {"alignment": AlignmentOptions(hidden=16)},
    "noisy_context": {"noisy_context": NoisyContextOptions(hidden=16)},
    "guidance_free": {},
    "contrastive": {},
    "clusters": {"clusters": ClustersOptions(count=10)},
    "random_order": {},
    "z_loss": {},
}
IMAGES = 40


@pytest.fixture(params=CASES)
def config(request, tmp_path) -> ObjectiveConfig:
    """The objective, with features for alignment."""
    options = dict(CASES[request.param])
    if request.param == "alignment":
        path = tmp_path / "features.npy"
        np.save(path, np.random.default_rng(0).standard_normal((IMAGES, 16, 6), np.float32))
        options = {"alignment": dataclasses.replace(options["alignment"], features=path)}
    return ObjectiveConfig(request.param, **options)


def build(config: ObjectiveConfig) -> Objective:
    gpt = tiny(**LOSSES[config.kind].model_fields).train()
    codebook = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    codebook = codebook if LOSSES[config.kind].needs_codebook else None
    objective = build_objective(config, gpt, 24, 3, codebook, IMAGES)
    objective.prepare(0, codebook)
    objective.begin_step(0.3)
    if objective.reference is not None:
        objective.reference.load_state_dict(gpt.state_dict())
    return objective


def batch(objective: Objective, count: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(7)
    codes, labels = torch.randint(50, (count, 16)), torch.arange(count) % 5
    dropped, positions = torch.arange(count) == 1, torch.arange(count) + 9
    extra = objective.extra(np.arange(count), lambda: labels.roll(-1))
    return codes, labels, dropped, positions, extra


def test_every_kind_has_a_case():
    kinds = typing.get_args(typing.get_type_hints(ObjectiveConfig)["kind"])
    assert set(kinds) == set(CASES) == set(LOSSES)


def test_the_loss_is_a_scalar_and_every_parameter_gets_a_finite_gradient(config):
    objective = build(config)
    loss = objective(*batch(objective, 4))
    assert loss.shape == () and loss.dtype == torch.float32
    loss.backward()
    trained = {n: p for n, p in objective.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())


def test_an_image_gives_the_same_loss_in_any_batch(config):
    # With the mean of losses over processes, so n processes train as one does.
    objective = build(config)
    codes, labels, dropped, positions, extra = batch(objective, 4)
    whole = objective(codes, labels, dropped, positions, extra)
    halves = [
        objective(codes[r], labels[r], dropped[r], positions[r], tuple(e[r] for e in extra))
        for r in (slice(0, 2), slice(2, 4))
    ]
    torch.testing.assert_close(torch.stack(halves).mean(), whole, atol=1e-5, rtol=1e-5)


def test_validation_is_the_plain_loss(config):
    objective = build(config).eval()
    codes, labels, *_ = batch(objective, 4)
    guidance = torch.ones(4) if objective.gpt.config.guidance_input else None
    logits = objective.gpt(codes, labels, guidance=guidance)
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), codes.flatten())
    torch.testing.assert_close(objective(codes, labels), plain)


@pytest.mark.slow
def test_the_command_trains_resumes_exactly_and_its_model_samples(config, tmp_path, world):
    _, tokenizer = write_models(tmp_path, tiny())
    codes = write_codes_of(tokenizer, tmp_path / "codes", IMAGES)
    more: tuple[object, ...] = ("--training.ema_decay", 0.9, "--model.token_dropout", 0.1)

    def run(name: str, steps: int, objective: ObjectiveConfig, *extra: object) -> None:
        lines = flags(codes, tmp_path / name, *more, "--training.num_steps", steps, *extra)
        parsed = parse_config(TrainConfig, [str(line) for line in lines])
        given = dataclasses.replace(parsed, objective=objective)
        save_config(given, tmp_path / "given.yaml")
        assert load_config(TrainConfig, tmp_path / "given.yaml") == given
        train(given, world)

    extra: tuple[object, ...] = ()
    if config.kind == "contrastive":
        run("first", 2, ObjectiveConfig())
        extra = ("--init_from", tmp_path / "first")
    torch.set_num_threads(1)
    run("whole", 4, config, *extra)
    run("resumed", 4, config, *extra)
    # As after a kill: the newest checkpoint is that of step 2.
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step_0000004")
    run("resumed", 4, config, *extra)
    for part in ("model", "ema"):
        whole, resumed = (weights(tmp_path / n, 4, part) for n in ("whole", "resumed"))
        assert all(torch.equal(resumed[key], value) for key, value in whole.items()), part
    assert np.isfinite(losses(tmp_path / "whole")).all()
    gpt = GPT.from_pretrained(tmp_path / "whole")
    sampled = generate(gpt, torch.tensor([0, 1, 2]), greedy=True)
    assert sampled.shape == (3, 4, 4)


def gradients_of(objective: ObjectiveConfig, gpt: Path, world: World, strategy: str):
    """The gradients of this process's share of a batch, after the processes averaged them."""
    lines = flags(Path("unused"), Path("unused"), "--parallel.strategy", strategy)
    lines += ["--init_from", gpt] if objective.kind == "contrastive" else []
    config = parse_config(TrainConfig, [str(line) for line in lines])
    config = dataclasses.replace(config, objective=objective)
    gpt_config = tiny(**LOSSES[objective.kind].model_fields).config
    codebook = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    codebook = codebook if LOSSES[objective.kind].needs_codebook else None
    models = build_models(config, gpt_config, world, True, IMAGES, codebook)
    models.objective.begin_step(0.3)
    for name, parameter in models.objective.gpt.named_parameters():
        if name.startswith("output"):  # zero at the start, as the gradients behind it would be
            parameter.data.copy_(parameter.data + 0.1)
    codes, labels, dropped, positions, extra = batch(models.objective, 4)
    own = slice(4 * world.rank // world.size, 4 * (world.rank + 1) // world.size)
    shares = (codes[own], labels[own], dropped[own], positions[own], tuple(e[own] for e in extra))
    models.parallel(*shares).backward()
    found = {n: p.grad for n, p in models.objective.named_parameters() if p.requires_grad}
    return {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in found.items()}


def run_rank(rank: int, gpt: Path, cases: list[ObjectiveConfig]) -> None:
    cpu = torch.device("cpu")
    for case in cases:
        whole = gradients_of(case, gpt, World(0, 1, cpu), "ddp")
        for strategy in ("ddp", "fsdp"):
            found = gradients_of(case, gpt, World(rank, 2, cpu), strategy)
            assert set(found) == set(whole)
            for name, expected in whole.items():
                torch.testing.assert_close(
                    found[name],
                    expected,
                    rtol=1e-3,
                    atol=1e-5,
                    msg=lambda text, at=(case.kind, strategy, name): f"{at}: {text}",
                )


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_one(tmp_path):
    gpt, _ = write_models(tmp_path, tiny())
    features = tmp_path / "features.npy"
    np.save(features, np.random.default_rng(0).standard_normal((IMAGES, 16, 6), np.float32))
    alignment = AlignmentOptions(features, hidden=16)
    cases = [
        ObjectiveConfig(kind, **(options if kind != "alignment" else {"alignment": alignment}))
        for kind, options in CASES.items()
    ]
    run_in_processes(run_rank, 2, tmp_path, gpt, cases)


def test_the_engine_adds_the_vector_of_the_position_to_predict():
    gpt = tiny(target_position=True)
    torch.nn.init.normal_(gpt.target_position.weight)
    labels = torch.tensor([0, 4, 2])
    codes = generate(gpt, labels, greedy=True, cfg_scale=1.0).flatten(1)
    assert torch.equal(gpt(codes, labels).argmax(-1), codes)


def test_the_normaliser_is_squared_and_has_its_gradient():
    objective = build(ObjectiveConfig("z_loss", z_loss=ZLossOptions(0.3)))
    codes, labels, dropped, positions, _ = batch(objective, 4)
    logits = objective.gpt(codes, labels, dropped)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), codes.flatten())
    expected = expected + 0.3 * logits.logsumexp(-1).square().mean()
    head = objective.gpt.output.weight
    loss = objective(codes, labels, dropped, positions)
    torch.testing.assert_close(loss, expected)
    (ours,), (theirs,) = (torch.autograd.grad(value, head) for value in (loss, expected))
    torch.testing.assert_close(ours, theirs)


def test_settings_that_make_no_sense_are_refused_by_name(tmp_path, world):
    with pytest.raises(ValueError, match=r"objective\.next_patch is set.*kind is next_token"):
        ObjectiveConfig(next_patch=NextPatchOptions(4))
    with pytest.raises(InputError, match=r"side 3 must divide"):
        build(ObjectiveConfig("next_patch", next_patch=NextPatchOptions(3)))
    with pytest.raises(InputError, match="features is missing"):
        build(ObjectiveConfig("alignment"))
    np.save(tmp_path / "empty.npy", np.zeros((4, 16, 0), np.float32))
    empty = AlignmentOptions(tmp_path / "empty.npy")
    with pytest.raises(InputError, match=r"empty\.npy: float32 .*, expected floats"):
        build(ObjectiveConfig("alignment", alignment=empty))
    with pytest.raises(InputError, match=r"clusters\.count 128 must divide"):
        build(ObjectiveConfig("clusters"))
    features = tmp_path / "features.npy"
    np.save(features, np.zeros((IMAGES, 16, 6), np.float32))
    aligned = ObjectiveConfig("alignment", alignment=AlignmentOptions(features))
    with pytest.raises(InputError, match=f"features of {IMAGES} images, the codes are of 7"):
        build_objective(aligned, tiny(), 24, 0, None, 7)
    for crops, folders in ((2, 1), (1, 2)):
        codes = [write_codes(tmp_path / f"{crops}{i}", IMAGES, crops) for i in range(folders)]
        listed = f"[{','.join(map(str, codes))}]"
        lines = flags(codes[0], tmp_path / "run", "--data.codes", listed)
        config = parse_config(TrainConfig, [str(line) for line in lines])
        with pytest.raises(InputError, match=r"alignment needs codes of one crop.*have 2 crops"):
            train(dataclasses.replace(config, objective=aligned), world)
        assert not (tmp_path / "run" / "config.yaml").exists()
    for kind, message in (
        ("guidance_free", "needs classes or captions"),
        ("contrastive", "the condition of these data is none"),
    ):
        with pytest.raises(InputError, match=message):
            build_objective(ObjectiveConfig(kind), tiny(condition="none"), 24, 0, None, IMAGES)
    guided = ["--out", "x", "--data.codes", "[x]", "--objective.kind", "guidance_free"]
    with pytest.raises(ValueError, match="condition_dropout must be > 0"):
        parse_config(TrainConfig, [*guided, "--condition_dropout", "0"])
    with pytest.raises(ValueError, match=r"cfg_scale is 4\.0, but this model takes guidance as an"):
        parse_config(TrainConfig, [*guided, "--sampling.cfg_scale", "4"])
    with pytest.raises(ValueError, match="give init_from"):
        parse_config(
            TrainConfig, ["--out", "x", "--data.codes", "[x]", "--objective.kind", "contrastive"]
        )


@pytest.mark.slow
def test_a_run_does_not_continue_with_an_objective_of_other_heads(tmp_path, world):
    _, tokenizer = write_models(tmp_path, tiny())
    codes = write_codes_of(tokenizer, tmp_path / "codes", IMAGES)
    noisy = ("--objective.kind", "noisy_context", "--objective.noisy_context.hidden")
    for name, first, second in (
        ("plain", (), (*noisy, 16)),
        ("noisy", (*noisy, 16), ()),
        ("wider", (*noisy, 16), (*noisy, 8)),
    ):
        for steps, objective in ((1, first), (2, second)):
            lines = flags(codes, tmp_path / name, "--training.num_steps", steps, *objective)
            config = parse_config(TrainConfig, [str(line) for line in lines])
            if steps == 1:
                train(config, world)
                continue
            with pytest.raises(InputError, match=r"its run has another objective\.kind, or other"):
                train(config, world)
