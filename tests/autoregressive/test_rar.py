"""The transformer of RAR and reAR: equal to the published code, loaded, trained and sampled."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers.codes import write_codes_of
from helpers.fill import weights_of
from helpers.models import tiny, write_models
from helpers.quantizers import normal, relative_error
from helpers.training import flags
from torch.nn import functional as F

from autoregressive import GPT, GPTConfig, generate
from autoregressive.inference.continuous import ContinuousBatch
from autoregressive.inference.engine import InferenceEngine
from autoregressive.inference.generate import generation_request
from autoregressive.inference.sampling_config import SamplingConfig
from autoregressive.models.released_layouts import RAR_HEADS, RAR_NAMES, RAR_ROWS, rar_tensors
from autoregressive.objectives.base import Projector
from autoregressive.objectives.build import LOSSES, build_objective
from autoregressive.objectives.config import ObjectiveConfig
from autoregressive.objectives.noisy_context import embedding_similarity
from autoregressive.sampling.config import SampleRunConfig
from autoregressive.sampling.run import sample
from autoregressive.train import train
from autoregressive.training.config import TrainConfig
from core.config import parse_config
from core.errors import InputError
from core.files import read_json
from core.weights import load_weights

RAR = {"family": "rar", "adaln": "full", "qk_norm": True, "norm_eps": 1e-6}
LABELS = torch.tensor([0, 4, 2])


@pytest.fixture
def golden(goldens):
    return np.load(goldens / "variants" / "rear_model.npz")


def published_shapes(goldens, **sizes: int) -> dict[str, tuple[int, ...]]:
    """Keys and shapes as published; sizes replace those of the B model, for `layers` blocks."""
    recorded = read_json(goldens / "variants" / "rear_b_keys.json")["state_dict"]
    layers = sizes.pop("layers")
    old = {"dim": 768, "head": 48, "ffn": 3072, "vocab": 1024, "z": 256, "hidden": 2048}
    change = {old[name]: size for name, size in sizes.items() if name in old}
    change |= {2304: 3 * sizes["dim"], 4608: 6 * sizes["dim"], 1536: 2 * sizes["dim"]}
    change |= {1280: sizes["codes"] + 1024, 356: sizes["codes"] + 100}
    change |= {2026: sizes["vocab"] + sizes["classes"] + 2}
    found = {}
    for key, shape in recorded.items():
        names = [key]
        if key.startswith("blocks.0."):
            names = [key.replace("blocks.0.", f"blocks.{i}.") for i in range(layers)]
        found |= {name: tuple(change.get(size, size) for size in shape) for name in names}
    return found


def filled(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    return {key: weights_of(key, shape) for key, shape in shapes.items()}


GOLDEN = {"layers": 3, "dim": 96, "head": 24, "ffn": 192, "vocab": 64, "z": 8, "hidden": 192}


def golden_model(goldens) -> tuple[GPT, dict[str, torch.Tensor]]:
    """The filled model, with one more position, which predicts nothing: theirs reads all codes."""
    state = filled(published_shapes(goldens, **GOLDEN, codes=16, classes=5))
    tensors, codes = rar_tensors(state, "the published file")
    assert codes == 16
    row = state["timesteps_embeddings"][0, 17:18]
    tensors["learned.steps"] = torch.cat([tensors["learned.steps"], row])
    tensors["learned.positions"] = F.pad(tensors["learned.positions"], (0, 0, 0, 1))
    tensors["target_position.weight"] = F.pad(tensors["target_position.weight"], (0, 0, 0, 1))
    shape = {"num_layers": 3, "num_heads": 4, "dim": 96, "ffn_width": 192, "vocab_size": 64}
    gpt = GPT(GPTConfig(**RAR, **shape, num_classes=5, grid=(1, 17), target_position=True)).train()
    load_weights(gpt, tensors, "the published file")
    return gpt, state


def heads(state: dict[str, torch.Tensor]) -> dict[str, Projector]:
    found = {}
    for name in RAR_HEADS:
        found[name] = Projector(96, 192, 8, 3)
        part = {f"net.{k.removeprefix(name)}": v for k, v in state.items() if k.startswith(name)}
        found[name].load_state_dict(part)
    return found


def theirs(gpt: GPT, projectors: dict[str, Projector]) -> dict[str, float]:
    """The norm of the gradient of every parameter, under the published names."""
    ours = {name: p.grad for name, p in gpt.named_parameters()}
    norms = {
        "cls_token": ours["learned.cls_token"],
        "pos_embed": ours["learned.positions"],
        "target_aware_pos_embed": ours["target_position.weight"][:16],
        "timesteps_embeddings": ours["learned.steps"],
        "lm_head.weight": ours["output.weight"][:, :-1],
        "lm_head.bias": ours["output.weight"][:, -1],
        "embeddings.weight": torch.cat(
            [ours["tok_embeddings.weight"], ours["cls_embedding.embedding_table.weight"]]
        ),
    }
    for i in range(3):
        for name, own in RAR_NAMES.items():
            for kind in ("weight", "bias"):
                norms[f"blocks.{i}.{name}.{kind}"] = ours[f"layers.{i}.{own}.{kind}"]
    for kind in ("weight", "bias"):
        norms[f"adaln_before_head.adaLN_modulation.1.{kind}"] = ours[f"norm_ada_lin.1.{kind}"]
    for name, projector in projectors.items():
        for key, parameter in projector.net.named_parameters():
            norms[f"{name}{key}"] = parameter.grad
    return {name: gradient.norm().item() for name, gradient in norms.items()}


def test_outputs_losses_and_gradients_are_the_published_ones(golden, goldens):
    gpt, state = golden_model(goldens)
    projectors = heads(state)
    codes, labels, perturbed = (
        torch.from_numpy(golden[name]).long() for name in ("idx", "labels", "perturbed")
    )
    replaced = torch.from_numpy(golden["mask"]).bool()
    taps = {0: torch.zeros(()), 2: torch.zeros(())}
    hidden = gpt.hidden_of(gpt.tok_embeddings(perturbed), labels, taps=taps)
    logits = gpt.output(hidden)
    # The published states begin with the first token, which predicts nothing.
    encoded, decoded = (
        projectors[name](taps[block]) for name, block in zip(RAR_HEADS, (0, 2), strict=True)
    )
    for found, name, skipped in (
        (logits, "logits", 0),
        (encoded, "encode_z", 1),
        (decoded, "decode_z", 1),
    ):
        np.testing.assert_allclose(found.detach().numpy(), golden[name][:, skipped:], atol=1e-4)
    cross_entropy = F.cross_entropy(logits[:, :16].flatten(0, 1), codes.flatten())
    vectors = F.normalize(normal(7001, (64, 8)), dim=-1)[codes]
    similarity = embedding_similarity(encoded[:, 1:], decoded[:, :16], vectors, replaced)
    loss = cross_entropy - similarity
    loss.backward()
    assert relative_error(cross_entropy, golden["ar_loss"]) < 1e-5
    assert relative_error(-similarity, golden["proj_loss"]) < 1e-5
    assert relative_error(loss, golden["loss"]) < 1e-5
    found, names = theirs(gpt, projectors), golden["grad_names"].tolist()
    assert set(found) == set(names)
    norms = [found[name] for name in names]
    np.testing.assert_allclose(norms, golden["grad_norms"], rtol=1e-4, atol=1e-5)


def test_every_key_and_shape_of_the_published_model_is_ours(goldens):
    b = {"dim": 768, "vocab": 1024, "codes": 256, "classes": 1000}
    shapes = published_shapes(goldens, layers=20, **b)
    assert sum(np.prod(shape) for shape in shapes.values()) == 230_988_800  # as recorded
    with torch.device("meta"):
        shape = {"num_layers": 20, "num_heads": 16, "dim": 768, "vocab_size": 1024}
        gpt = GPT(GPTConfig(**RAR, **shape, target_position=True))
        tensors, codes = rar_tensors({k: torch.zeros(s) for k, s in shapes.items()}, "a file")
    assert codes == 256
    found = {key: value.shape for key, value in tensors.items()}
    assert found == {key: value.shape for key, value in gpt.state_dict().items()}


def varied(**overrides) -> GPT:
    """A small model whose added layers do something."""
    gpt = tiny(seed=3, **{**RAR, "target_position": True, **overrides})
    torch.manual_seed(5)
    for name, parameter in gpt.named_parameters():
        if "norm" not in name and "output" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return gpt


def test_a_released_file_loads_and_what_does_not_fit_is_named(tmp_path):
    gpt = varied()
    state = published(gpt)
    torch.save(state, tmp_path / "rar.bin")
    found = GPT.from_pretrained(tmp_path / "rar.bin")
    assert found.config == dataclasses.replace(gpt.config, ffn_width=128)
    codes = torch.randint(50, (3, 16))
    torch.testing.assert_close(found(codes, LABELS), gpt(codes, LABELS))
    for wrong, message in (
        ({k: v for k, v in state.items() if k != "lm_head.bias"}, "'lm_head.bias' is missing"),
        ({k: v for k, v in state.items() if "fc2" not in k}, r"w2\.\w+ is missing"),
        ({**state, "more.weight": torch.zeros(1)}, r"more\.weight is"),
    ):
        torch.save(wrong, tmp_path / "wrong.bin")
        with pytest.raises(InputError, match=message):
            GPT.from_pretrained(tmp_path / "wrong.bin")


def published(gpt: GPT) -> dict[str, torch.Tensor]:
    """A model's weights as RAR's code saves them."""
    ours, dim = gpt.state_dict(), gpt.config.dim
    spare = torch.zeros(1024, dim)
    state = {
        "cls_token": ours["learned.cls_token"].view(1, 1, dim),
        "pos_embed": torch.cat([ours["learned.positions"], spare[:-2]])[None],
        "target_aware_pos_embed": torch.cat(
            [spare[:2], ours["target_position.weight"], spare[:-2]]
        )[None],
        "timesteps_embeddings": torch.cat([ours["learned.steps"], spare[:83]])[None],
        "embeddings.weight": torch.cat(
            [
                ours["tok_embeddings.weight"],
                spare[:1],
                ours["cls_embedding.embedding_table.weight"],
            ]
        ),
        "lm_head.weight": ours["output.weight"][:, :-1].clone(),
        "lm_head.bias": ours["output.weight"][:, -1].clone(),
    }
    back = {own: name for name, own in RAR_NAMES.items()}
    for key, value in ours.items():
        layer, _, rest = key.removeprefix("layers.").partition(".")
        if key.startswith("norm_ada_lin."):
            state[key.replace("norm_ada_lin", "adaln_before_head.adaLN_modulation")] = value
        if key.startswith("layers."):
            own, kind = rest.rsplit(".", 1)
            if own == "ada_lin.1":
                parts = value.chunk(6)
                value = torch.cat([parts[RAR_ROWS.index(row)] for row in range(6)])
            state[f"blocks.{layer}.{back[own]}.{kind}"] = value
    return state


@torch.no_grad()
@pytest.mark.parametrize("target_position", [True, False])
@pytest.mark.parametrize("cfg_interval", [None, 3])
def test_the_engine_samples_what_the_model_predicts(cfg_interval, target_position):
    gpt = varied(target_position=target_position)
    options = {"cfg_scale": 3.0, "cfg_interval": cfg_interval}
    codes = generate(gpt, LABELS, greedy=True, **options).flatten(1)
    logits, null = gpt(codes, LABELS), gpt(codes, torch.full_like(LABELS, 5))
    guided = null + 3.0 * (logits - null)
    last = 16 if cfg_interval is None else cfg_interval + 2
    logits = torch.cat([guided[:, :last], logits[:, last:]], dim=1)
    assert torch.equal(logits.argmax(-1), codes)


def test_several_codes_per_step_and_continuous_batching_work_as_for_other_models():
    gpt = varied()
    settings = {"cfg_scale": 2.0, "seed": 3}
    plain = generate(gpt, LABELS, **settings)
    assert torch.equal(generate(gpt, LABELS, **settings, speculation_window=4), plain)
    assert torch.equal(generate(gpt, LABELS, **settings, zipar_window=4), plain)
    engine = InferenceEngine(gpt)
    batch = ContinuousBatch(engine, 2)
    request = generation_request(engine, LABELS[:1], SamplingConfig(**settings))
    batch.reset(request)
    batch.begin(1, request)
    while batch.done[1] < 16:
        batch.step()
    assert torch.equal(batch.codes[1], plain[0].flatten())


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_other_precisions_sample(precision):
    codes = generate(InferenceEngine(varied(), precision), LABELS)
    assert codes.shape == (3, 4, 4)


@pytest.mark.parametrize("kind", ["next_token", "noisy_context", "random_order", "next_patch"])
def test_objectives_train_it(kind):
    gpt = tiny(**RAR, **LOSSES[kind].model_fields).train()
    codebook = torch.randn(50, 8) if LOSSES[kind].needs_codebook else None
    objective = build_objective(ObjectiveConfig(kind), gpt, 24, 3, codebook, 40)
    objective.prepare(0, codebook)
    codes, dropped = torch.randint(50, (3, 16)), torch.arange(3) == 1
    objective(codes, LABELS, dropped, torch.arange(3)).backward()
    trained = [p for p in objective.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


def test_what_cannot_be_combined_is_refused_by_name():
    for wrong, message in (
        ({"adaln": "none"}, "family rar needs model.adaln full and model.qk_norm true"),
        ({"qk_norm": False}, "family rar needs model.adaln full"),
        ({"parallel_regions": 4}, "parallel_regions needs rotary positions"),
        ({"dim": 16}, "model.dim 16 must be a multiple of 8 x model.num_heads 4"),
        ({"condition": "text"}, "adaln needs a condition of one token"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny(**{**RAR, **wrong})


@pytest.mark.slow
def test_the_commands_train_continue_fine_tune_and_sample_it(tmp_path, world):
    _, tokenizer = write_models(tmp_path, tiny())
    codes = write_codes_of(tokenizer, tmp_path / "codes")

    def run(name: str, steps: int, *more: object) -> None:
        lines = flags(codes, tmp_path / name, "--training.num_steps", steps, *more)
        train(parse_config(TrainConfig, [str(line) for line in lines]), world)

    rar = ("--model.family", "rar", "--model.adaln", "full", "--model.qk_norm", "true")
    noisy = ("--objective.kind", "noisy_context", "--objective.noisy_context.hidden", 16)
    torch.set_num_threads(1)
    run("rar", 1, *rar, *noisy)
    run("rar", 2, *rar, *noisy)
    run("lora", 2, *rar, "--init_from", tmp_path / "rar", "--lora.rank", 2)
    lines = ["--gpt", tmp_path / "lora", "--tokenizer", tokenizer, "--num_images", 3]
    lines += ["--out", tmp_path / "samples"]
    sample(parse_config(SampleRunConfig, [str(line) for line in lines]), world)
    assert (tmp_path / "samples" / "samples.npz").exists()
