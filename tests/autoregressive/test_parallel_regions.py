"""Parallel regions (PAR): equal to the published code, trained, loaded and sampled."""

import numpy as np
import pytest
import torch
from helpers.codes import write_codes_of
from helpers.fill import fill_
from helpers.models import captions, tiny, write_models
from helpers.quantizers import relative_error
from helpers.training import flags

from autoregressive import GPT, GPTConfig, generate
from autoregressive.inference.continuous import ContinuousBatch
from autoregressive.inference.engine import InferenceEngine
from autoregressive.inference.generate import generate_rows, generation_request
from autoregressive.inference.parallel_decoding.regions import region_schedule
from autoregressive.inference.precision_check import compare
from autoregressive.inference.sampling_config import SamplingConfig
from autoregressive.models.conditioning import TextCondition, as_condition
from autoregressive.models.parallel_regions import region_order
from autoregressive.objectives.base import Batch
from autoregressive.objectives.build import LOSSES, build_objective
from autoregressive.objectives.config import AlignmentOptions, ClustersOptions, ObjectiveConfig
from autoregressive.objectives.next_token import NextTokenLoss
from autoregressive.sampling.config import SampleRunConfig
from autoregressive.sampling.run import sample
from autoregressive.serving.export import export_vllm
from autoregressive.train import train
from autoregressive.training.config import TrainConfig
from core.config import InputError, parse_config


@pytest.fixture
def golden(goldens):
    return np.load(goldens / "variants" / "par_16x16_n4.npz")


def test_order_positions_and_mask_are_the_published_ones(golden):
    shape = {"num_layers": 1, "num_heads": 3, "dim": 192, "vocab_size": 512, "num_classes": 10}
    gpt = GPT(GPTConfig(**shape, parallel_regions=4))
    regions, device = gpt.spe_tok_embeddings, torch.device("cpu")
    order = region_order((16, 16), 4)
    assert order.tolist() == golden["order"].tolist()
    codes = torch.from_numpy(golden["idx"]).long()
    assert torch.equal(codes[:, order], torch.from_numpy(golden["permuted"]).long())
    assert torch.equal(regions.in_raster_order(codes[:, order]), codes)
    # The published tables also have the last group, which is predicted only.
    rows = torch.cat([torch.zeros(1).long(), regions.rotary_rows(1, device)])
    rotary = gpt.rotary[rows]
    assert (rotary == 0).flatten(1).all(1).nonzero()[:, 0].tolist() == [0, 5, 6, 7]
    np.testing.assert_allclose(rotary[::9].numpy(), golden["rotary"][: len(rotary[::9])], atol=1e-6)
    published = np.unpackbits(golden["mask_packed"], axis=1)[:256, :256].astype(bool)
    mask = regions.attend(1, device).keywords["mask"]
    assert np.array_equal(mask[0, 0].numpy(), published)


def test_loss_logits_and_gradients_are_the_published_ones(golden):
    shape = {"num_layers": 2, "num_heads": 3, "dim": 192, "vocab_size": 512, "num_classes": 10}
    gpt = fill_(GPT(GPTConfig(**shape, parallel_regions=4))).train()
    codes, labels = (torch.from_numpy(golden[name]).long() for name in ("idx", "labels"))
    logits = gpt(codes, labels)[:, region_order((16, 16), 4)].detach()
    np.testing.assert_allclose(logits[:, ::16, :200].numpy(), golden["logits"], atol=1e-4)
    np.testing.assert_allclose(logits.logsumexp(-1).numpy(), golden["logsumexp"], atol=1e-4)
    batch = Batch(codes, labels, labels < 0, torch.arange(2), ())
    loss = NextTokenLoss(gpt, 100).training_loss(batch)
    loss.backward()
    assert relative_error(loss, golden["loss"]) < 1e-5
    found = {name: p.grad.norm().item() for name, p in gpt.named_parameters()}
    assert set(found) == set(golden["grad_names"].tolist())
    norms = [found[name] for name in golden["grad_names"].tolist()]
    np.testing.assert_allclose(norms, golden["grad_norms"], rtol=1e-4, atol=1e-6)


LABELS = torch.arange(6) % 5
TEXT = {"condition": "text", "text_dim": 12, "max_text_tokens": 9}
MODELS = {
    "class": {},
    "captions": TEXT,
    "adaln and grouped keys": {"adaln": "full", "num_kv_heads": 2, "qk_norm": True},
    "16 regions": {"parallel_regions": 16, "grid": (8, 4)},
}


@pytest.fixture(params=MODELS)
def model(request):
    """A model with regions, and conditions for six images."""
    gpt = tiny(seed=6, **{"parallel_regions": 4, **MODELS[request.param]})
    torch.manual_seed(5)
    for name, parameter in gpt.named_parameters():
        if "ada_lin" in name or "spe_tok" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    condition = captions([1, 7, 4, 9, 2, 3], 12) if request.param == "captions" else LABELS
    return gpt, as_condition(condition)


@torch.no_grad()
def test_the_engine_samples_what_the_model_predicts(model):
    gpt, condition = model
    for scale in (1.0, 3.0):
        codes = generate(gpt, condition, greedy=True, cfg_scale=scale).flatten(1)
        logits = gpt(codes, condition)
        null = gpt(codes, condition, drop_condition=torch.ones(6, dtype=torch.bool))
        assert torch.equal((null + scale * (logits - null)).argmax(-1), codes)


@pytest.mark.parametrize(("side", "regions", "steps"), [(24, 4, 147), (24, 16, 51), (4, 4, 7)])
def test_it_takes_the_published_number_of_steps(side, regions, steps):
    order = region_order((side, side), regions).tolist()
    taken = list(region_schedule((side, side), regions))
    assert 1 + len(taken) == steps  # with the first code's
    assert [place for s in taken for place in range(s.first, s.first + s.count)] == list(
        range(1, side**2)
    )
    assert taken[-1].done == side**2
    for step in taken:
        assert set(range(step.done)) <= set(order[: step.first + step.count])


def test_images_do_not_depend_on_the_batch_and_come_row_by_row(model):
    gpt, condition = model
    settings = {"cfg_scale": 3.0, "cfg_interval": 5, "top_k": 9, "seed": 1}
    together = generate(gpt, condition, **settings)
    one = condition[torch.tensor([4])]
    alone = generate(gpt, one, **settings, sample_ids=torch.tensor([4]))
    assert torch.equal(alone[0], together[4])
    rows = list(generate_rows(gpt, generation_request(gpt, condition, SamplingConfig(**settings))))
    assert rows[-1].shape[1] == gpt.config.grid[0]
    assert all(torch.equal(part, together[:, : part.shape[1]]) for part in rows)
    forced = together.masked_fill(torch.rand(together.shape) < 0.5, -1)
    again = generate(gpt, condition, **settings, forced_codes=forced)
    assert torch.equal(again, together)


def test_a_caption_does_not_see_the_padding_of_another(model):
    gpt, condition = model
    if gpt.config.condition != "text":
        return
    codes = torch.randint(50, (6, 16))
    together = gpt(codes, condition)
    lengths = condition.lengths.tolist()
    for i, length in enumerate(lengths):
        alone = TextCondition(condition.features[i : i + 1, :length], condition.lengths[i : i + 1])
        torch.testing.assert_close(gpt(codes[i : i + 1], alone)[0], together[i])


def test_precisions_are_compared_code_by_code(model):
    gpt, condition = model
    engine = InferenceEngine(gpt)
    request = generation_request(engine, condition, SamplingConfig(seed=2))
    assert compare(engine, InferenceEngine(gpt), request, 9) == {"kl": 0.0, "same_likeliest": 1.0}


def test_a_released_file_and_a_folder_load(tmp_path):
    gpt = tiny(parallel_regions=4, dim=128, num_heads=2)
    torch.save({"model": gpt.state_dict()}, tmp_path / "gpt.pt")
    gpt.save_pretrained(tmp_path / "folder")
    for source, options in (("gpt.pt", {"grid": (4, 4)}), ("folder", {})):
        found = GPT.from_pretrained(tmp_path / source, **options)
        assert found.config == gpt.config
        codes = torch.randint(50, (3, 16))
        assert torch.equal(found(codes, LABELS[:3]), gpt(codes, LABELS[:3]))


@pytest.mark.parametrize("kind", ["next_token", "alignment", "guidance_free", "clusters", "z_loss"])
def test_objectives_train_it(kind, tmp_path):
    np.save(tmp_path / "features.npy", np.ones((40, 16, 6), np.float32))
    options = {
        "alignment": {"alignment": AlignmentOptions(tmp_path / "features.npy", hidden=16)},
        "clusters": {"clusters": ClustersOptions(count=10)},
    }
    config = ObjectiveConfig(kind, **options.get(kind, {}))
    gpt = tiny(parallel_regions=4, **LOSSES[kind].model_fields).train()
    codebook = torch.randn(50, 8) if LOSSES[kind].needs_codebook else None
    objective = build_objective(config, gpt, 24, 3, codebook, 40)
    objective.prepare(0, codebook)
    codes = torch.randint(50, (4, 16))
    extra = objective.extra(np.arange(4), lambda: LABELS[:4])
    dropped = torch.arange(4) == 1
    objective(codes, LABELS[:4], dropped, torch.arange(4), extra).backward()
    trained = [p for p in objective.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


def test_what_cannot_be_combined_is_refused_by_name(tmp_path):
    for wrong, message in (
        ({"parallel_regions": 6}, "parallel_regions is 6, must be a square"),
        ({"parallel_regions": 9}, r"cannot be cut into 3 x 3 equal regions"),
        ({"parallel_regions": 16}, r"equal regions of several codes"),
        ({"parallel_regions": 4, "target_position": True}, "target_position cannot be combined"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny(**wrong)
    gpt = tiny(parallel_regions=4)
    for several in ({"zipar_window": 1}, {"speculation_window": 2}):
        with pytest.raises(InputError, match=f"{next(iter(several))}: this model has parallel"):
            generate(gpt, LABELS, **several)
        name, value = next(iter(several.items()))
        lines = ["--out", "x", "--data.codes", "[x]", "--model.parallel_regions", "4"]
        with pytest.raises(ValueError, match=f"{name}: this model has parallel"):
            parse_config(TrainConfig, [*lines, f"--sampling.{name}", str(value)])
    with pytest.raises(InputError, match="continuous batching one"):
        ContinuousBatch(InferenceEngine(gpt), 2)
    with pytest.raises(InputError, match="whole images in raster order"):
        gpt(torch.zeros(1, 9).long(), LABELS[:1])
    with pytest.raises(InputError, match="parallel_regions"):
        export_vllm(gpt, tmp_path / "vllm")
    for kind in ("next_patch", "noisy_context", "random_order"):
        with pytest.raises(InputError, match=f"kind {kind} and model.parallel_regions 4"):
            build_objective(ObjectiveConfig(kind), gpt, 24, 3, None, 40)


@pytest.mark.slow
def test_the_commands_train_resume_and_sample_it(tmp_path, world, capsys):
    plain, tokenizer = write_models(tmp_path, tiny(num_classes=4))
    codes = write_codes_of(tokenizer, tmp_path / "codes")

    def run(name: str, steps: int, *more: object) -> None:
        lines = flags(codes, tmp_path / name, "--training.num_steps", steps, *more)
        train(parse_config(TrainConfig, [str(line) for line in lines]), world)

    regions = ("--model.parallel_regions", 4)
    torch.set_num_threads(1)
    run("whole", 2, *regions)
    run("whole", 4, *regions)
    run("from_plain", 2, *regions, "--init_from", plain)  # the tokens are new
    lines = ["--gpt", tmp_path / "whole", "--tokenizer", tokenizer, "--num_images", 3]
    lines += ["--out", tmp_path / "samples", "--compute.precision", "fp32"]
    sample(parse_config(SampleRunConfig, [str(line) for line in lines]), world)
    assert "parallel regions: 2.50 codes per step" in capsys.readouterr().out
