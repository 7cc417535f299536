"""LoRA: equal to its merged model, trained alone, saved alone, resumed, and tied to its base."""

import shutil
from pathlib import Path

import pytest
import torch
from helpers.codes import write_codes
from helpers.commands import run_module
from helpers.local_hub import LocalHub
from helpers.models import tiny
from helpers.training import flags, losses, weights

from autoregressive import GPT, generate
from autoregressive.convert import ConvertConfig, convert
from autoregressive.inference.engine import InferenceEngine
from autoregressive.models.config import TARGETS, GPTConfig, LoRAConfig
from autoregressive.models.lora import is_lora_weight
from autoregressive.models.pretrained import load_gpt
from autoregressive.train import build_models, train
from autoregressive.training.config import TrainConfig
from autoregressive.training.plan import plan_training
from core.config import InputError, load_config, parse_config, save_config
from core.files import file_sha256
from core.training.initialization import initialize
from core.training.memory_plan import plan_model

LORA = LoRAConfig(rank=3, alpha=6.0, targets=TARGETS, new_classes=2)
TINY = {"vocab_size": 32, "num_classes": 4}


def adapted(**overrides) -> GPT:
    """A GPT of 5 + 2 classes whose low-rank matrices and new classes do something."""
    gpt = tiny(**{"num_classes": 7, "lora": LORA, **overrides})
    torch.manual_seed(1)
    for name, parameter in gpt.named_parameters():
        if is_lora_weight(name):
            torch.nn.init.normal_(parameter, std=0.06)  # the products: as large as the weights
    return gpt


def write_base(folder: Path, seed: int = 0) -> Path:
    tiny(seed, **TINY).save_pretrained(folder)
    return folder


def fine_tune(world, codes: Path, base: Path | str, out: Path, *more: object) -> Path:
    """Four steps of LoRA, as the command does them, without the shape of the model."""
    lines = flags(codes, out, "--init_from", base, "--lora.rank", 2, "--training.num_steps", 4)
    at = lines.index("--model.num_layers")
    arguments = [str(line) for line in [*lines[:at], *lines[at + 6 :], *more]]
    torch.set_num_threads(1)
    train(parse_config(TrainConfig, arguments), world)
    return out


@pytest.mark.parametrize("shape", [{}, {"qk_norm": True}, {"adaln": "full"}, {"num_kv_heads": 2}])
@torch.no_grad()
def test_the_merged_model_equals_the_unmerged_one(shape):
    gpt = adapted(**shape)
    whole = gpt.merged()
    torch.manual_seed(0)
    codes, labels = torch.randint(50, (8, 16)), torch.arange(8) % 7
    dropped = torch.arange(8) == 3
    logits = gpt(codes, labels, dropped)
    torch.testing.assert_close(whole(codes, labels, dropped), logits, atol=1e-5, rtol=0)
    for parameter in map(gpt.state_dict().get, filter(is_lora_weight, gpt.state_dict())):
        parameter.zero_()
    assert (gpt(codes, labels, dropped) - logits).abs().max() > 0.1
    assert whole.config.lora is None and whole.merged() is whole
    assert whole.state_dict().keys() == tiny(num_classes=7, **shape).state_dict().keys()


@torch.no_grad()
def test_without_training_it_is_its_base_and_a_new_class_is_a_row_of_its_own():
    gpt, base = tiny(num_classes=7, lora=LORA), tiny()
    own = {n: t for n, t in gpt.state_dict().items() if not is_lora_weight(n)}
    base.load_state_dict(own)
    codes = torch.arange(16).expand(5, -1)
    assert torch.equal(gpt(codes, torch.arange(5)), base(codes, torch.arange(5)))
    torch.nn.init.normal_(gpt.cls_embedding.new_classes)
    rows = gpt.merged().cls_embedding.embedding_table.weight
    assert torch.equal(rows[5:7], gpt.cls_embedding.new_classes)
    assert torch.equal(rows[7], gpt.cls_embedding.embedding_table.weight[5])


@torch.no_grad()
def test_the_engine_merges_before_it_packs():
    gpt = adapted()
    labels = torch.tensor([0, 5, 6])
    codes = generate(gpt, labels, greedy=True, cfg_scale=1.0).flatten(1)
    assert torch.equal(gpt(codes, labels).argmax(-1), codes)
    packed, expected = (InferenceEngine(model, "int8") for model in (gpt, gpt.merged()))
    sampled = generate(packed, labels, seed=3)
    assert torch.equal(sampled, generate(expected, labels, seed=3))


def test_only_its_weights_have_gradients_and_the_plan_counts_them():
    gpt = adapted().train()
    gpt(torch.zeros(2, 16, dtype=torch.int64), torch.tensor([1, 6])).sum().backward()
    for name, parameter in gpt.named_parameters():
        assert (parameter.grad is not None) == is_lora_weight(name), name
    plan = plan_model(gpt, torch.nn.Module, None, 0.0, 1, 1, 1)
    trained = sum(p.numel() for n, p in gpt.named_parameters() if is_lora_weight(n))
    assert plan.parts("ddp", 1, 1)["Adam's moments"] == 8 * trained


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_ema_averages_lora_alone_and_the_plan_counts_what_is_kept(tmp_path, world, strategy):
    base, config = tiny(num_classes=7, lora=LORA).config, given(tmp_path, strategy)
    plan = plan_training(config, base, 40, world)
    with torch.device("meta"):
        sizes = {name: p.numel() for name, p in GPT(base).named_parameters()}
    trained = sum(size for name, size in sizes.items() if is_lora_weight(name))
    kept = trained if strategy == "ddp" else sum(sizes.values())
    assert plan.parts(strategy, 1, 1)["EMA weights"] == 4 * kept
    # A checkpoint holds LoRA, its moments and its EMA; the whole model is gathered for samples.
    gathered = 0 if strategy == "ddp" else 4 * sum(sizes.values())
    assert plan.host_bytes(strategy, 1, 1) == 16 * trained + gathered


def given(folder: Path, strategy: str) -> TrainConfig:
    """The configuration of a run with LoRA and EMA."""
    lines = flags(folder / "codes", folder / "run", "--init_from", "base", "--lora.rank", 3)
    lines += ["--training.ema_decay", 0.9, "--parallel.strategy", strategy]
    return parse_config(TrainConfig, [str(line) for line in lines])


def test_the_ema_keeps_no_copy_of_the_base(tmp_path, world, monkeypatch):
    monkeypatch.setattr("autoregressive.train.start_from", lambda gpt, *of: initialize(gpt, 1))
    gpt_config = tiny(num_classes=7, lora=LORA).config
    models = build_models(given(tmp_path, "ddp"), gpt_config, world, True)
    live = dict(models.objective.gpt.named_parameters())
    for name, own in models.ema.model.named_parameters():
        assert torch.equal(own, live[name])
        assert (own.data_ptr() == live[name].data_ptr()) == (not is_lora_weight(name)), name


@pytest.mark.slow
def test_its_base_can_be_a_model_of_the_hub(tmp_path, world, monkeypatch):
    folder = write_base(tmp_path / "base")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    codes = write_codes(tmp_path / "codes")
    with LocalHub() as hub:
        hub.use(monkeypatch, tmp_path / "cache")
        hub.add("owner/base", files)
        run = fine_tune(world, codes, "owner/base", tmp_path / "run", "--training.num_steps", 2)
        config = load_config(GPTConfig, run / "checkpoints" / "step_0000002" / "config.yaml")
        assert (config.lora.base, config.lora.base_path) == ("owner/base", None)
        fine_tune(world, codes, "owner/base", run)  # continues to step 4
        gpt, original = GPT.from_pretrained(run), GPT.from_pretrained("owner/base")
    assert torch.equal(gpt.output.weight, original.output.weight)
    name = "layers.0.attention.wo.weight"
    assert not torch.equal(gpt.state_dict()[name], original.state_dict()[name])


@pytest.mark.slow
def test_a_run_saves_only_lora_resumes_exactly_and_finds_its_base(tmp_path, world, monkeypatch):
    base = write_base(tmp_path / "base")
    codes = write_codes(tmp_path / "codes", num_classes=1)
    more = ("--data.first_class", 4, "--training.ema_decay", 0.9, "--model.token_dropout", 0.1)
    before = file_sha256(base / "model.safetensors")
    whole = fine_tune(world, codes, base, tmp_path / "whole", *more)
    resumed = fine_tune(world, codes, base, tmp_path / "resumed", *more)
    shutil.rmtree(resumed / "checkpoints" / "step_0000004")  # as after a kill at step 3
    fine_tune(world, codes, base, resumed, *more)
    for part in ("model", "ema"):
        stored = weights(whole, 4, part)
        assert stored and all(map(is_lora_weight, stored))
        assert all(torch.equal(weights(resumed, 4, part)[n], t) for n, t in stored.items())
    assert file_sha256(base / "model.safetensors") == before
    assert losses(whole) == losses(resumed)
    assert load_config(TrainConfig, whole / "config.yaml").model.dim == 32

    gpt, original = GPT.from_pretrained(whole, weights="model"), GPT.from_pretrained(base)
    stored = weights(whole, 4)
    assert gpt.config.num_classes == 5 and gpt.config.lora is None
    layer = "layers.1.feed_forward.w2"
    added = 8 * stored[f"{layer}.lora_b"] @ stored[f"{layer}.lora_a"]
    change = gpt.state_dict()[f"{layer}.weight"] - original.state_dict()[f"{layer}.weight"]
    torch.testing.assert_close(change, added, atol=1e-6, rtol=0)
    assert not torch.equal(added, torch.zeros_like(added))
    assert torch.equal(gpt.output.weight, original.output.weight)
    rows = gpt.cls_embedding.embedding_table.weight
    assert torch.equal(rows[4:5], stored["cls_embedding.new_classes"])

    # Both folders move together, and the command runs elsewhere.
    (tmp_path / "moved").mkdir()
    for name in ("base", "whole"):
        shutil.move(tmp_path / name, tmp_path / "moved" / name)
    monkeypatch.chdir(tmp_path)
    convert(ConvertConfig(source="moved/whole", weights="model", out=Path("merged")))
    merged = GPT.from_pretrained("merged").state_dict()
    assert all(torch.equal(merged[n], t) for n, t in gpt.state_dict().items())
    write_base(tmp_path / "moved" / "base", seed=1)
    with pytest.raises(InputError, match="LoRA weights of another base"):
        load_gpt("moved/whole")
    shutil.rmtree(tmp_path / "moved" / "base")
    with pytest.raises(InputError, match="whose base cannot be loaded"):
        load_gpt("moved/whole")


@pytest.mark.slow
def test_it_trains_on_a_released_file_and_samples_from_it(tmp_path, world):
    released = tmp_path / "c2i_B_256.pt"
    torch.save({"model": tiny(dim=128, num_heads=2, **TINY).state_dict()}, released)
    codes = write_codes(tmp_path / "codes", num_classes=1)
    short = ("--training.num_steps", 2, "--data.first_class", 4, "--lora.targets", "[wqkv,w2]")
    run = fine_tune(world, codes, released, tmp_path / "run", *short)
    assert {name.split(".")[-2] for name in weights(run, 2)} == {"wqkv", "w2", "cls_embedding"}
    gpt = GPT.from_pretrained(run)
    assert generate(gpt, torch.tensor([4, 0]), seed=0).shape == (2, 4, 4)


@pytest.mark.slow
def test_a_run_does_not_continue_with_other_settings(tmp_path, world):
    base = write_base(tmp_path / "base")
    codes = write_codes(tmp_path / "codes")
    run = fine_tune(world, codes, base, tmp_path / "run", "--training.num_steps", 2)
    assert set(map(is_lora_weight, weights(run, 2))) == {True}
    assert "cls_embedding.new_classes" not in weights(run, 2)
    for more in (("--lora.alpha", 3), ("--lora.rank", "null")):
        with pytest.raises(InputError, match=r"its run has lora\.rank 2.*another --out"):
            fine_tune(world, codes, base, run, *more)
    with pytest.raises(InputError, match="another base"):
        fine_tune(world, codes, write_base(tmp_path / "other", 1), run)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_train_as_one(tmp_path, world, strategy):
    base = write_base(tmp_path / "base")
    codes = write_codes(tmp_path / "codes", num_classes=1)
    one = fine_tune(world, codes, base, tmp_path / "one", "--data.first_class", 4)
    given = load_config(TrainConfig, one / "config.yaml")
    save_config(given, tmp_path / "given.yaml")
    out = tmp_path / "two"
    more = ("--config", tmp_path / "given.yaml", "--parallel.strategy", strategy, "--out", out)
    run_module("autoregressive.train", *more, processes=2)
    assert losses(out) == pytest.approx(losses(one), abs=1e-5)
    ours, theirs = weights(out, 4), weights(one, 4)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("--data.first_class", 5), r"has 4 classes: new ones begin at 4"),
        (("--model.dim", 96), r"model\.dim is 96.*which has 32"),
        (("--init_from", "null"), "give init_from"),
        (("--lora.rank", 0), "rank must be >= 1"),
        (("--lora.targets", "[output]"), "lora.targets"),
        (("--lora.rank", "null", "--lora.alpha", 3), r"give lora\.rank"),
        (("--lora.rank", "null", "--data.first_class", 4), r"give lora\.rank"),
        (("--objective.kind", "guidance_free"), "parts that LoRA does not train"),
        (("--objective.kind", "contrastive"), "parts that LoRA does not train"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_written(tmp_path, world, wrong, message):
    base = write_base(tmp_path / "base")
    codes = write_codes(tmp_path / "codes", num_classes=1)
    with pytest.raises(InputError, match=message):
        fine_tune(world, codes, base, tmp_path / "run", *wrong)
    assert not (tmp_path / "run").exists()


def test_codes_that_the_base_was_not_trained_on_are_refused(tmp_path, world):
    base = tiny(**TINY, tokenizer_sha256="1" * 64)
    base.save_pretrained(tmp_path / "base")
    with pytest.raises(InputError, match="codes of another tokenizer"):
        fine_tune(world, write_codes(tmp_path / "a"), tmp_path / "base", tmp_path / "run")
    other = write_codes(tmp_path / "b", vocab_size=64)
    with pytest.raises(InputError, match=r"vocab_size is 64.*has 32"):
        fine_tune(world, other, tmp_path / "base", tmp_path / "run")
