import json

import numpy as np
import pytest
import torch
from helpers.models import captions, tiny
from torch.nn import functional as F

from autoregressive import GPT, generate
from autoregressive.inference.engine import GenerationRequest, InferenceEngine
from autoregressive.inference.precision_check import next_code_logits
from autoregressive.models.conditioning import as_condition
from autoregressive.models.config import PRESETS
from core.config import InputError


def cached_logits(gpt: GPT, codes: torch.Tensor, condition, scale: float = 1.0) -> torch.Tensor:
    """The logits of every step of an engine whose sampler picks `codes`."""

    def force(
        logits: torch.Tensor, sample_bits: torch.Tensor, position: torch.Tensor
    ) -> torch.Tensor:
        return codes.gather(1, position)[:, 0]

    batch, count = codes.shape
    bits = torch.zeros(batch, 1, dtype=torch.int64)
    request = GenerationRequest(as_condition(condition), None, [scale] * count, bits, force)
    return next_code_logits(InferenceEngine(gpt), request, count, force)


@pytest.mark.parametrize("condition", ["class", "text"])
def test_keys_and_shapes_are_those_of_the_released_models(goldens, condition):
    listed = json.loads((goldens / "checkpoint_keys.json").read_text())
    prefix = {"class": "c2i ", "text": "t2i "}[condition]
    models = {name: facts for name, facts in listed.items() if name.startswith(prefix)}
    assert models
    for name, facts in models.items():
        with torch.device("meta"):
            gpt = GPT.from_preset(name.removeprefix(prefix), condition=condition)
        shapes = {key: list(value.shape) for key, value in gpt.state_dict().items()}
        assert shapes == facts["state_dict"], name
        assert sum(p.numel() for p in gpt.parameters()) == facts["params"], name


def test_every_preset_has_the_published_number_of_parameters():
    published = {
        "GPT-B": 110_888_448,
        "GPT-L": 342_910_976,
        "GPT-XL": 774_699_520,
        "GPT-XXL": 1_410_972_672,
        "GPT-XXXL": 3_893_027_840,
        "GPT-1B": 1_199_616_000,
        "GPT-3B": 3_096_659_200,
        "GPT-7B": 6_614_589_440,
    }
    assert set(published) == set(PRESETS)
    for name, count in published.items():
        with torch.device("meta"):
            assert sum(p.numel() for p in GPT.from_preset(name).parameters()) == count, name


@pytest.mark.slow
def test_class_model_equals_the_reference(goldens):
    from helpers.fill import fill_

    golden = np.load(goldens / "gpt_b_c2i_256.npz")
    gpt = fill_(GPT.from_preset("GPT-B")).eval()
    codes, labels = (torch.from_numpy(golden[k]).long() for k in ("idx", "labels"))
    with torch.no_grad():
        logits = gpt(codes, labels)
    check_against(golden, logits, codes)
    drawn = generate(gpt, labels, cfg_scale=float(golden["cfg_scale"]), greedy=True)
    assert (drawn.flatten(1).numpy() == golden["greedy_tokens"]).mean() >= 0.99


@pytest.mark.slow
def test_text_model_equals_the_reference(goldens):
    from helpers.fill import fill_

    golden = np.load(goldens / "gpt_4layer_t2i_256.npz")
    gpt = fill_(GPT.from_preset("GPT-XL", num_layers=4, condition="text")).eval()
    random = np.random.default_rng(int(golden["text_seed"]))
    lengths = golden["lengths"].tolist()
    features = torch.zeros(len(lengths), max(lengths), 2048)
    for i, length in enumerate(lengths):
        features[i, :length] = torch.from_numpy(random.standard_normal((length, 2048), np.float32))
    text = features * 0.1, torch.tensor(lengths)
    codes = torch.from_numpy(golden["idx"]).long()
    with torch.no_grad():
        logits = gpt(codes, text)
    check_against(golden, logits, codes)
    drawn = generate(gpt, text, cfg_scale=float(golden["cfg_scale"]), greedy=True)
    assert (drawn.flatten(1).numpy() == golden["greedy_tokens"]).mean() >= 0.99


def check_against(golden, logits: torch.Tensor, codes: torch.Tensor) -> None:
    loss = F.cross_entropy(logits.flatten(0, 1), codes.flatten())
    assert abs(loss.item() - float(golden["loss"])) < 1e-4
    difference = logits[:, ::16, :256] - torch.from_numpy(golden["logits"])
    assert difference.abs().max() < 1e-3


@pytest.mark.parametrize("rope_condition", ["zero", "identity"])
@pytest.mark.parametrize("num_kv_heads", [0, 2])
@pytest.mark.parametrize(("grid", "dim"), [((4, 4), 32), ((2, 6), 32), ((3, 3), 48)])
def test_cached_decoding_equals_full_forward(rope_condition, num_kv_heads, grid, dim):
    # The third has heads of 12, which decoding pads to 16.
    gpt = tiny(rope_condition=rope_condition, num_kv_heads=num_kv_heads, grid=grid, dim=dim)
    codes = torch.randint(0, 50, (3, grid[0] * grid[1]))
    labels = torch.tensor([0, 4, 2])
    with torch.no_grad():
        assert (gpt(codes, labels) - cached_logits(gpt, codes, labels)).abs().max() < 1e-4


def random_norms(gpt: GPT) -> GPT:
    """Query and key norms with weights that are not all one."""
    for block in gpt.blocks:
        torch.nn.init.uniform_(block.attention.q_norm.weight, 0.5, 2)
        torch.nn.init.uniform_(block.attention.k_norm.weight, 0.5, 2)
    return gpt


@pytest.mark.parametrize(("dim", "num_kv_heads"), [(32, 0), (48, 2), (400, 0)])
def test_cached_decoding_equals_full_forward_with_qk_norm(dim, num_kv_heads):
    # Heads of 8, of 12 and of 100, as in GPT-3B: the engine pads the last two.
    gpt = random_norms(tiny(qk_norm=True, dim=dim, num_kv_heads=num_kv_heads))
    codes, labels = torch.randint(0, 50, (3, 16)), torch.tensor([0, 4, 2])
    with torch.no_grad():
        assert (gpt(codes, labels) - cached_logits(gpt, codes, labels)).abs().max() < 1e-4


def test_qk_norm_makes_attention_independent_of_the_scale_of_queries_and_keys():
    gpt, plain = random_norms(tiny(qk_norm=True, norm_eps=1e-12)), tiny()
    codes, labels = torch.randint(0, 50, (2, 16)), torch.tensor([0, 1])
    for model, same in ((gpt, True), (plain, False)):
        with torch.no_grad():
            before = model(codes, labels)
            for block in model.blocks:
                block.attention.wqkv.weight[: 2 * 32] *= 50
            after = model(codes, labels)
        assert torch.allclose(before, after, atol=1e-3) == same


def test_qk_norm_adds_two_weights_to_a_block_and_none_when_off():
    gpt, plain = tiny(qk_norm=True), tiny()
    added = set(gpt.state_dict()) - set(plain.state_dict())
    names = ("q_norm", "k_norm")
    assert added == {f"layers.{i}.attention.{n}.weight" for i in range(2) for n in names}
    assert gpt.state_dict()["layers.0.attention.q_norm.weight"].shape == (8,)


def test_qk_norm_trains():
    gpt = tiny(qk_norm=True).train()
    codes, labels = torch.randint(0, 50, (2, 16)), torch.tensor([0, 1])
    F.cross_entropy(gpt(codes, labels).flatten(0, 1), codes.flatten()).backward()
    for block in gpt.blocks:
        for norm in (block.attention.q_norm, block.attention.k_norm):
            assert norm.weight.grad is not None
            assert norm.weight.grad.abs().max() > 0


def test_cached_decoding_equals_full_forward_for_captions_of_different_lengths():
    gpt = tiny(condition="text", text_dim=12, max_text_tokens=9)
    codes = torch.randint(0, 50, (3, 16))
    text = captions([1, 7, 4], text_dim=12)
    with torch.no_grad():
        assert (gpt(codes, text) - cached_logits(gpt, codes, text)).abs().max() < 1e-4


def test_guidance_before_the_head_equals_guidance_after_it():
    gpt = tiny(seed=2)
    codes, labels = torch.randint(0, 50, (3, 16)), torch.tensor([0, 4, 2])
    with torch.no_grad():
        conditional, null = gpt(codes, labels), gpt(codes, torch.full_like(labels, 5))
    after = null + 4 * (conditional - null)
    before = cached_logits(gpt, codes, labels, scale=4.0)
    assert ((before - after).abs() / after.abs().amax()).max() < 1e-5


def test_padding_of_a_caption_changes_nothing():
    gpt = tiny(condition="text", text_dim=12, max_text_tokens=9)
    codes = torch.randint(0, 50, (1, 16))
    features, lengths = captions([4], text_dim=12)
    padded = torch.cat([features, torch.randn(1, 5, 12)], dim=1)
    with torch.no_grad():
        difference = gpt(codes, (features, lengths)) - gpt(codes, (padded, lengths))
    assert difference.abs().max() < 1e-5


def test_zero_rows_make_the_condition_act_through_values_alone():
    from autoregressive.models.rope import rotary_table, rotate

    x = torch.randn(1, 3, 2, 8)
    zero = rotate(x, rotary_table((1, 2), 8, 10000.0, 1, "zero"))
    identity = rotate(x, rotary_table((1, 2), 8, 10000.0, 1, "identity"))
    assert zero[:, 0].abs().max() == 0
    torch.testing.assert_close(identity[:, 0], x[:, 0])
    torch.testing.assert_close(zero[:, 1:], identity[:, 1:])


def test_rotary_table_survives_a_change_of_dtype():
    gpt = tiny()
    before = gpt.rotary.clone()
    assert torch.equal(gpt.to(torch.bfloat16).rotary, before)


def test_a_dropped_condition_is_the_null_class():
    gpt = tiny()
    codes = torch.randint(0, 50, (2, 16))
    with torch.no_grad():
        dropped = gpt(codes, torch.tensor([1, 2]), torch.tensor([True, False]))
        null = gpt(codes, torch.tensor([5, 2]))
    torch.testing.assert_close(dropped, null)


def test_drop_path_grows_linearly_and_leaves_evaluation_alone():
    gpt = tiny(num_layers=3, drop_path=0.2)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in gpt.layers]
    assert rates == pytest.approx([0.0, 0.1, 0.2])
    codes, labels = torch.randint(0, 50, (2, 16)), torch.tensor([0, 1])
    torch.testing.assert_close(gpt(codes, labels), gpt(codes, labels))


def test_the_first_loss_is_that_of_a_uniform_guess():
    gpt = GPT.from_preset("GPT-B", num_layers=1)
    codes = torch.randint(0, 16384, (1, 256))
    logits = gpt(codes, torch.tensor([7]))
    assert logits.shape == (1, 256, 16384)
    assert logits.dtype == torch.float32
    loss = F.cross_entropy(logits.flatten(0, 1), codes.flatten()).item()
    assert loss == pytest.approx(9.704, abs=1e-3)


def test_impossible_configurations_are_refused_by_name():
    with pytest.raises(ValueError, match="num_heads"):
        GPT.from_preset("GPT-B", num_heads=7)
    with pytest.raises(ValueError, match="num_kv_heads"):
        GPT.from_preset("GPT-B", num_kv_heads=5)
    with pytest.raises(InputError, match="GPT-XXL"):
        GPT.from_preset("GPT-XS")
    with pytest.raises(ValueError, match="drop_path"):
        GPT.from_preset("GPT-B", drop_path=1.5)
