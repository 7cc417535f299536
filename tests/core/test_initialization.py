"""Initial weights depend on the seed and the names of tensors, never on how they are spread."""

import itertools

import pytest
import torch
from helpers.clusters import one_of_many
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autoregressive.models.config import GPTConfig
from autoregressive.models.gpt import GPT, Block
from autoregressive.objectives.next_token import NextTokenLoss
from core.config import InputError
from core.distributed.config import ParallelConfig
from core.distributed.parallel import first_row, local, prepare, shard
from core.distributed.world import World
from core.training import initialization
from core.training.ema import EMA
from core.training.initialization import copy_weights, initialize

CPU = torch.device("cpu")
SHAPE = {"num_layers": 2, "num_heads": 2, "dim": 40, "vocab_size": 301, "ffn_multiple": 2}
CONFIGS = {
    "class": GPTConfig(**SHAPE, num_classes=10, grid=(4, 4)),
    "text": GPTConfig(**SHAPE, condition="text", text_dim=12, max_text_tokens=9, grid=(4, 4)),
}
WORLDS = [("ddp", 1, None), ("fsdp", 1, None), ("fsdp", 2, None), ("fsdp", 4, None), ("hsdp", 4, 2)]


def on_meta(config: GPTConfig) -> NextTokenLoss:
    with torch.device("meta"):
        return NextTokenLoss(GPT(config), 64)


def build(config: GPTConfig, parallel: ParallelConfig, world: World) -> GPT:
    """The decoder as the training command builds it, without values."""
    objective = on_meta(config)
    prepare(objective, parallel, world, "fp32", Block)
    objective.gpt.build_rotary()
    return objective.gpt


def average_of(gpt: GPT, parallel: ParallelConfig, world: World) -> EMA[GPT]:
    averaged = on_meta(gpt.config).requires_grad_(False)
    shard(averaged, parallel, world, "fp32", Block)
    return EMA(gpt, 0.9, averaged.gpt)


def assert_rows_of(gpt: GPT, whole: dict[str, torch.Tensor]) -> None:
    state = gpt.state_dict()
    assert state.keys() == whole.keys()
    for name, tensor in state.items():
        own, start = local(tensor), first_row(tensor)
        assert torch.equal(own, whole[name][start : start + len(own)]), name


@pytest.mark.parametrize("condition", CONFIGS)
@pytest.mark.parametrize(("strategy", "size", "shard_size"), WORLDS)
def test_initial_weights_are_the_same_for_every_strategy_and_number_of_processes(
    condition, strategy, size, shard_size
):
    config = CONFIGS[condition]
    expected = GPT(config)
    initialize(expected, seed=3)
    whole = expected.state_dict()
    parallel = ParallelConfig(strategy, shard_size, activation_checkpointing="full")
    covered = {name: torch.zeros(len(tensor)) for name, tensor in whole.items()}
    for rank in range(size):
        with one_of_many(rank, size) as world:
            gpt = build(config, parallel, world)
            initialize(gpt, seed=3)
            assert_rows_of(gpt, whole)
            ema = average_of(gpt, parallel, world)
            assert_rows_of(ema.model, whole)
            assert torch.equal(gpt.rotary, expected.rotary)
            assert torch.equal(ema.model.rotary, expected.rotary)
            for name, tensor in gpt.state_dict().items():
                covered[name][first_row(tensor) :][: len(local(tensor))] += 1
    for name, count in covered.items():
        assert count.min() >= 1, name


def test_initial_weights_have_the_distributions_of_the_paper():
    config = GPTConfig(num_layers=1, num_heads=4, dim=256, num_classes=500, vocab_size=700)
    gpt = GPT(config)
    initialize(gpt, seed=0)
    state = gpt.state_dict()
    for name in ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight"):
        assert state[name].mean().item() == pytest.approx(0, abs=3e-4)
        assert state[name].std().item() == pytest.approx(0.02, rel=0.01)
        within = (state[name].abs() < 0.02).double().mean().item()
        assert within == pytest.approx(0.6827, abs=0.005)
    assert not state["output.weight"].any()
    for name in ("norm.weight", "layers.0.ffn_norm.weight", "layers.0.attention_norm.weight"):
        assert (state[name] == 1).all()
    text = GPT(GPTConfig(**SHAPE, condition="text", text_dim=400, max_text_tokens=100))
    assert text.cls_embedding.uncond_embedding.std().item() == pytest.approx(0.05, rel=0.02)


def test_each_tensor_and_each_seed_has_values_of_its_own():
    gpt = GPT(CONFIGS["class"])
    tensors = []
    for seed in (0, 1):
        initialize(gpt, seed)
        tensors += [p.flatten()[:100].clone() for p in gpt.parameters() if p.std() > 0]
    for one, other in itertools.combinations(tensors, 2):
        length = min(len(one), len(other))
        assert (one[:length] == other[:length]).double().mean() < 0.05


def test_a_model_built_by_a_user_follows_the_seed_of_torch():
    models = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        models.append(GPT(CONFIGS["class"]).tok_embeddings.weight)
    assert torch.equal(models[0], models[1])
    assert not torch.equal(models[0], models[2])


class Allocations(TorchDispatchMode):
    """Counts the bytes of all tensors made that are larger than `ignored` elements."""

    def __init__(self, ignored: int) -> None:
        super().__init__()
        self.ignored, self.total = ignored, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {self.place(x) for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)}
        for tensor in tree_leaves(out):
            if not torch.is_tensor(tensor) or tensor.is_meta or self.place(tensor) in given:
                continue
            if local(tensor).numel() > self.ignored:
                self.total += local(tensor).nbytes
        return out

    @staticmethod
    def place(tensor: torch.Tensor) -> int:
        return 0 if tensor.is_meta else local(tensor).untyped_storage().data_ptr()


@pytest.mark.parametrize("source", ["seed", "file"])
def test_no_process_allocates_more_than_its_shards(monkeypatch, source):
    monkeypatch.setattr(initialization, "_CHUNK", 64)
    config, parallel = CONFIGS["class"], ParallelConfig("fsdp")
    stored = GPT(config).bfloat16().state_dict()
    whole = sum(4 * tensor.numel() for tensor in stored.values())
    with one_of_many(1, 4) as world, Allocations(ignored=64) as made:
        gpt = build(config, parallel, world)
        if source == "seed":
            initialize(gpt, seed=0)
        else:
            copy_weights(gpt, stored, "file")
        average_of(gpt, parallel, world)
    rotary = 2 * gpt.rotary.nbytes + 20_000  # the tables, and what their computation takes
    assert whole / 4 * 2 * 0.9 < made.total < whole / 4 * 2 * 1.1 + rotary


def test_weights_of_a_file_are_copied_row_by_row_and_refused_where_they_do_not_fit():
    config, parallel = CONFIGS["text"], ParallelConfig("fsdp")
    stored = GPT(config).bfloat16().state_dict()
    for rank in range(2):
        with one_of_many(rank, 2) as world:
            gpt = build(config, parallel, world)
            copy_weights(gpt, stored, "file")
            assert_rows_of(gpt, {name: tensor.float() for name, tensor in stored.items()})
            with pytest.raises(InputError, match=r"x\.pt: .* norm.weight is missing"):
                copy_weights(gpt, {k: v for k, v in stored.items() if k != "norm.weight"}, "x.pt")
