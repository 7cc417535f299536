"""Guidance as an input (GFT) and adaptive norms (IBQ): equal to the published code, and sampled."""

import numpy as np
import pytest
import torch
from helpers.fill import weights_of
from helpers.models import tiny

from autoregressive import GPT, GPTConfig, generate
from autoregressive.inference.engine import InferenceEngine
from autoregressive.models.released_layouts import seed_name
from core.config import InputError
from core.files import read_json
from core.weights import load_weights

LABELS = torch.tensor([0, 4, 2])


def normal_codes(seed: int, vocab: int, shape: tuple[int, int]) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, vocab, shape))


@torch.no_grad()
def test_guidance_as_an_input_equals_the_published_model(goldens):
    golden = np.load(goldens / "variants" / "gft_2layer.npz")
    shape = {"num_layers": 2, "num_heads": 4, "dim": 256, "vocab_size": 1024, "grid": (8, 8)}
    gpt = GPT(GPTConfig(**shape, num_classes=10, guidance_input=True)).eval()
    state = {key: weights_of(key, tuple(value.shape)) for key, value in gpt.state_dict().items()}
    load_weights(gpt, state, "the published file")
    codes, labels = normal_codes(3100, 1024, (4, 64)), torch.from_numpy(golden["labels"]).long()
    betas = torch.from_numpy(golden["betas"]).float()
    sinusoids = gpt.t_embedder.sinusoids(betas)
    np.testing.assert_allclose(sinusoids.numpy(), golden["beta_sinusoid"], atol=1e-6)
    logits = gpt(codes, labels, guidance=betas)[:, ::8, :256]
    np.testing.assert_allclose(logits.numpy(), golden["logits"], atol=1e-4)
    without = gpt(codes, labels)[:, ::8, :256]
    np.testing.assert_allclose(without.numpy(), golden["logits_without_beta"], atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_adaptive_norms_equal_the_published_model(goldens):
    golden = np.load(goldens / "variants" / "ibq_ar_2layer.npz")
    gpt = GPT(GPTConfig(num_layers=2, num_heads=16, dim=1024, adaln="full")).eval()
    ours = {key: tuple(value.shape) for key, value in gpt.state_dict().items()}
    published = read_json(goldens / "variants" / "ibq_ar_b_keys.json")["state_dict"]
    names = {seed_name(key): key for key in published}
    state = {key: weights_of(names[key], shape) for key, shape in ours.items()}
    load_weights(gpt, state, "the published file")
    codes, labels = normal_codes(2100, 16384, (2, 256)), torch.tensor([207, 1000])
    logits = gpt(codes, labels)
    np.testing.assert_allclose(logits[:, ::16, :512].numpy(), golden["logits"], atol=1e-3)
    np.testing.assert_allclose(logits.logsumexp(-1).numpy(), golden["logsumexp"], atol=1e-3)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), codes.flatten())
    np.testing.assert_allclose(loss.item(), golden["loss"], rtol=1e-5)


def test_every_key_and_shape_of_the_published_variants_is_ours(goldens):
    variants = goldens / "variants"
    ibq = read_json(variants / "ibq_ar_b_keys.json")["state_dict"]
    gft = read_json(variants / "gft_keys.json")["models"]["GPT-L"]["state_dict"]
    cca = read_json(variants / "cca_npp_keys.json")["CCA GPT-B"]["state_dict"]
    with torch.device("meta"):
        models = (
            (GPT(GPTConfig(num_layers=16, num_heads=16, dim=1024, adaln="full")), ibq),
            (GPT.from_preset("GPT-L", guidance_input=True), gft),
            (GPT.from_preset("GPT-B"), cca),
        )
    for gpt, published in models:
        shapes = {key: list(value.shape) for key, value in gpt.state_dict().items()}
        assert shapes == {seed_name(key): shape for key, shape in published.items()}


def test_initial_adaptive_norms_have_the_published_spread(goldens):
    golden = np.load(goldens / "variants" / "ibq_ar_init.npz")
    torch.manual_seed(0)
    shape = {"num_layers": 2, "num_heads": 8, "dim": 512, "vocab_size": 4096}
    gpt = GPT(GPTConfig(**shape, adaln="full", adaln_gain=float(golden["alng"])))
    spread = dict(zip(golden["names"].tolist(), golden["std"].tolist(), strict=True))
    found = {}
    for i, block in enumerate(gpt.blocks):
        for part, rows in enumerate(block.ada_lin[1].weight.split(512)):
            found[f"blocks.{i}.ada_lin.1.weight[{part}]"] = rows.std().item()
    for part, rows in enumerate(gpt.norm_ada_lin[1].weight.split(512)):
        found[f"head_nm.ada_lin.1.weight[{part}]"] = rows.std().item()
    shown = {name: value for name, value in spread.items() if "ada_lin.1.weight" in name}
    assert len(shown) == len(found)
    np.testing.assert_allclose(list(found.values()), list(shown.values()), rtol=0.03)
    ours = {seed_name(name): value for name, value in spread.items() if name not in shown}
    state = gpt.state_dict()
    assert set(ours) <= set(state)
    for name, expected in ours.items():
        assert state[name].std().item() == pytest.approx(expected, rel=0.03, abs=1e-7), name


def varied(**overrides) -> GPT:
    """A small model whose added layers do something."""
    gpt = tiny(seed=3, **overrides)
    torch.manual_seed(5)
    for name, parameter in gpt.named_parameters():
        if "ada_lin" in name or "t_embedder" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return gpt


@torch.no_grad()
@pytest.mark.parametrize(
    ("model", "sampling"),
    [
        ({"adaln": "full"}, {"cfg_scale": 3.0}),
        ({"adaln": "full"}, {"cfg_scale": 3.0, "cfg_interval": 3}),
        ({"adaln": "shared"}, {"cfg_scale": 3.0}),
        ({"guidance_input": True}, {"guidance": 0.5}),
        ({"guidance_input": True, "adaln": "full"}, {"guidance": 0.5}),
    ],
    ids=str,
)
def test_the_engine_samples_what_the_model_predicts(model, sampling):
    gpt = varied(**model)
    codes = generate(gpt, LABELS, greedy=True, **sampling).flatten(1)
    guidance = torch.full((3,), sampling["guidance"]) if "guidance" in sampling else None
    logits = gpt(codes, LABELS, guidance=guidance)
    if "cfg_scale" in sampling:
        null = gpt(codes, torch.full_like(LABELS, 5))
        guided = null + sampling["cfg_scale"] * (logits - null)
        last = sampling.get("cfg_interval", 100) + 2
        logits = torch.cat([guided[:, :last], logits[:, last:]], dim=1)
    assert torch.equal(logits.argmax(-1), codes)


@pytest.mark.parametrize("dim", [36, 30])
def test_a_head_that_has_no_four_equal_parts_is_refused(dim):
    with pytest.raises(ValueError, match=r"must be a multiple of 4 x model\.num_heads 2"):
        GPTConfig(dim=dim, num_heads=2)


def test_guidance_as_an_input_costs_one_row_per_image_and_matters():
    gpt = varied(guidance_input=True)
    engine = InferenceEngine(gpt)
    rows = []
    engine.blocks[0].register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    some = generate(engine, LABELS, guidance=0.3)
    assert set(rows) == {len(LABELS)}
    assert not torch.equal(some, generate(engine, LABELS, guidance=0.9))
    assert torch.equal(generate(engine, LABELS), generate(engine, LABELS, guidance=1.0))


def test_a_guidance_that_the_model_does_not_take_is_refused():
    with pytest.raises(InputError, match="does not take it as an input"):
        generate(tiny(), LABELS, guidance=0.5)
    with pytest.raises(InputError, match=r"cfg_scale is 3\.0, but this model takes guidance as an"):
        generate(varied(guidance_input=True), LABELS, cfg_scale=3.0)
    with pytest.raises(ValueError, match="guidance is 2"):
        generate(varied(guidance_input=True), LABELS, guidance=2.0)
    with pytest.raises(ValueError, match="one token"):
        GPTConfig(adaln="full", condition="text")


def test_shared_adaptive_norms_add_a_table_to_one_layer():
    # A model of full ones whose layers are the shared layer, with the table in the bias.
    shared, full = varied(adaln="shared"), tiny(adaln="full")
    state = shared.state_dict()
    weight, bias = (state.pop(f"shared_ada_lin.1.{name}") for name in ("weight", "bias"))
    for i in range(2):
        table = state.pop(f"layers.{i}.ada_lin.table").flatten()
        state[f"layers.{i}.ada_lin.1.weight"] = weight
        state[f"layers.{i}.ada_lin.1.bias"] = bias + table
    load_weights(full, state, "the shared ones")
    codes = torch.arange(16).expand(3, -1)
    torch.testing.assert_close(shared(codes, LABELS), full(codes, LABELS), atol=1e-5, rtol=0)
    added = 6 * 32 * 33 + 2 * 6 * 32 + 2 * 32 * 33  # the shared layer, the tables, the last norm's
    count = sum(p.numel() for p in shared.parameters())
    assert count == added + sum(p.numel() for p in tiny().parameters())


def test_shared_adaptive_norms_are_recognised_in_a_file(tmp_path):
    gpt = varied(adaln="shared", dim=128, num_heads=2)
    torch.save({"model": gpt.state_dict()}, tmp_path / "gpt.pt")
    found = GPT.from_pretrained(tmp_path / "gpt.pt", grid=(4, 4))
    assert found.config == gpt.config
    codes = torch.arange(16).expand(3, -1)
    assert torch.equal(found(codes, LABELS), gpt(codes, LABELS))


def test_shared_gains_begin_small_and_scales_as_published():
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(num_layers=2, num_heads=8, dim=512, vocab_size=64, adaln="shared"))
    table = gpt.blocks[1].ada_lin.table
    assert table[2:].std().item() == pytest.approx(0.5 / 512**0.5, rel=0.05)
    assert table[:2].std().item() == pytest.approx(1e-3 / 512**0.5, rel=0.1)
    weight = gpt.shared_ada_lin[1].weight
    assert weight[1024:].std().item() == pytest.approx(0.01, rel=0.03)
    assert weight[:1024].std().item() == pytest.approx(2e-5, rel=0.03)


@pytest.mark.parametrize("adaln", ["shared", "full"])
def test_both_variants_train(adaln):
    gpt = varied(guidance_input=True, adaln=adaln).train()
    gpt(torch.zeros(2, 16, dtype=torch.int64), LABELS[:2], guidance=torch.ones(2)).sum().backward()
    assert all(parameter.grad is not None for parameter in gpt.parameters())
