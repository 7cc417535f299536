"""Training on captions: data, stage 2, online encoding, forced codes."""

import dataclasses
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.codes import write_codes, write_features
from helpers.commands import run_module
from helpers.images import jpeg, write_tar
from helpers.models import captions, tiny
from helpers.training import losses
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from autoregressive import GPTConfig, generate
from autoregressive.data import captions as captions_module
from autoregressive.data.captions import TextDataset
from autoregressive.data.config import DataConfig
from autoregressive.training.config import TrainConfig
from autoregressive.training.validation import SampleGrid
from core.config import InputError, save_config
from core.data.shards import ShardReader, read_index
from core.distributed.world import World
from core.files import write_json
from core.training.config import ReportConfig
from core.weights import save_tensors
from language.features import DTYPES
from language.text_encoder import TextEncoder, load_text_encoder
from tokenizer import VQConfig, VQModel

CPU = ("--device", "cpu")
FP32 = (*CPU, "--precision", "fp32")
TRAIN_CPU = ("--training.device", "cpu", "--training.precision", "fp32")
MODEL = ("--model.num_layers", 1, "--model.num_heads", 2, "--model.dim", 32)


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_t5) -> Path:
    """30 captioned images (two without a caption), their features, and codes at two grids."""
    folder = tmp_path_factory.mktemp("text")
    pairs = folder / "pairs"
    pairs.mkdir()
    colours = {"red": (200, 0, 0), "blue": (0, 0, 200)}
    for i in range(30):
        name = list(colours)[i % 2]
        Image.new("RGB", (24, 24), colours[name]).save(pairs / f"{i:02d}.png")
        if i not in (3, 17):
            (pairs / f"{i:02d}.txt").write_text(f"a {name} cat. it is on a mat")
    torch.manual_seed(0)
    shape = {"base_channels": 32, "channel_multipliers": (1, 1), "num_res_blocks": 1}
    vq = VQModel(VQConfig(**shape, z_channels=32, vocab_size=50))
    (folder / "vq").mkdir()
    save_config(vq.config, folder / "vq" / "config.yaml")
    save_tensors(vq.state_dict(), folder / "vq" / "model.safetensors")
    source = ("--pairs.source", pairs)
    features = ("--t5", tiny_t5, "--max_tokens", 16, "--pairs.first_sentence", "true", *CPU)
    run_module("language.encode", *features, *source, "--out", folder / "features")
    for side in (8, 16):
        size = ("--image_size", f"[{side},{side}]", "--num_workers", 0, *CPU)
        run = ("--tokenizer", folder / "vq", *source, "--out", folder / f"codes{side}")
        run_module("tokenizer.encode", *run, *size)
    return folder


def train(made: Path, out: Path, *more: object, codes: str = "codes8", ok: bool = True):
    return run_module(
        "autoregressive.train",
        *("--data.codes", f"[{made / codes}]", "--data.features", made / "features"),
        *("--data.short_caption", "first_sentence", "--out", out, *MODEL, *TRAIN_CPU),
        *("--training.num_steps", 6, "--training.batch_size", 8, "--report.report_every", 1, *more),
        ok=ok,
    )


@pytest.fixture(scope="module")
def stage1(made, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "stage1"
    more = ("--validation", f"[{made / 'codes8'}]", "--validation_features", made / "features")
    train(made, out, *more, "--sample_prompts", "[a red cat]", "--optimizer.lr", 1e-2)
    return out


def data(made: Path, **changes: object) -> TextDataset:
    return TextDataset(DataConfig((made / "codes8",), features=made / "features", **changes))


@pytest.mark.slow
def test_codes_and_captions_are_joined_by_the_pair(made):
    joined = data(made)
    assert joined.pairs.tolist() == [i for i in range(30) if i not in (3, 17)]
    codes, condition = joined.batch(np.array([3]), np.array([0]), seed=0)
    assert torch.equal(
        codes[0],
        torch.from_numpy(
            ShardReader(made / "codes8", "codes")[np.array([4])][0, 0].astype(np.int64)
        ),
    )
    expected = joined.features.batch(np.array([4]), np.array([0]))
    assert torch.equal(condition.features, expected[0])
    assert torch.equal(condition.lengths, expected[1])


@pytest.mark.slow
def test_short_captions_come_at_their_rate_and_depend_on_the_position_alone(made):
    joined = data(made, short_caption="first_sentence", short_caption_rate=0.3)
    rows, positions = np.zeros(2000, np.int64), np.arange(2000)
    lengths = joined.batch(rows, positions, seed=0)[1].lengths
    assert 0.25 < (lengths == lengths.min()).float().mean() < 0.35
    again = joined.batch(rows[:10], positions[50:60], seed=0)[1].lengths
    assert torch.equal(lengths[50:60], again)
    with pytest.raises(InputError, match="no variant 'blip'"):
        data(made, caption="blip")


@pytest.mark.slow
def test_features_of_other_images_are_refused(made, tmp_path):
    for path in (made / "features").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    index = read_index(tmp_path)
    write_json(tmp_path / "index.json", {**index, "pairs_fingerprint": "other"})
    with pytest.raises(InputError, match="belong to other images"):
        TextDataset(DataConfig((made / "codes8",), features=tmp_path))


@pytest.mark.slow
def test_training_on_captions_lowers_the_loss_validates_and_draws_prompts(stage1):
    history = losses(stage1)
    assert history[0] == pytest.approx(np.log(50), abs=1e-3)
    assert history[-1] < history[0] - 0.3
    assert "validation_loss" in (stage1 / "metrics.jsonl").read_text()
    assert (stage1 / "samples" / "step_0000006.png").is_file()


@pytest.mark.slow
def test_stage_2_starts_from_stage_1_at_step_0_on_another_grid(made, stage1, tmp_path):
    refused = train(made, stage1, codes="codes16", ok=False)
    assert refused.returncode == 2
    assert f"--init_from {stage1}" in refused.stderr.splitlines()[-1]
    more = ("--init_from", stage1, "--optimizer.lr", 1e-9)
    train(made, tmp_path / "stage2", *more, codes="codes16")
    assert len(losses(tmp_path / "stage2")) == 6
    from autoregressive import GPT

    one, two = (GPT.from_pretrained(path) for path in (stage1, tmp_path / "stage2"))
    assert two.config.grid == (8, 8)
    for key, value in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[key], value, rtol=1e-5, atol=1e-6)
    classes = train(made, tmp_path / "other", "--init_from", made / "vq", ok=False)
    assert classes.returncode == 2


@pytest.mark.slow
def test_pairs_of_a_tar_are_encoded_while_training_and_bad_ones_counted(made, tiny_t5, tmp_path):
    members = {}
    for i in range(12):
        members |= {f"{i:03d}.jpg": jpeg(seed=i), f"{i:03d}.txt": b"a red cat on a mat"}
    members["001.jpg"] = members["001.jpg"][:300]
    del members["002.txt"]
    members |= {"003.txt": b"caf\xe9", "004.txt": b" ", "005.jpg": jpeg(side=1)}
    members["006.txt"] = b"a red cat " * 30
    write_tar(tmp_path / "00000.tar", members)
    run = ("--out", tmp_path / "run", *MODEL, *TRAIN_CPU)
    run = (*run, "--training.num_steps", 6, "--training.batch_size", 8)
    live = {
        "pairs.source": tmp_path / "00000.tar",
        "tokenizer": made / "vq",
        "t5": tiny_t5,
        "image_size": "[8,8]",
        "max_tokens": 16,
        "num_workers": 2,
    }
    flags = [word for key, value in live.items() for word in (f"--data.online.{key}", value)]
    run_module("autoregressive.train", *flags, *run)
    lines = (tmp_path / "run" / "skipped_rank0.txt").read_text().splitlines()
    assert dict(line.split("\t") for line in lines) == {
        "00000.tar/001": "damaged image",
        "00000.tar/002": "no caption",
        "00000.tar/003": "caption is not UTF-8",
        "00000.tar/004": "empty caption",
        "00000.tar/005": "smaller than 16 pixels",
    }
    source = ("--pairs.source", tmp_path, "--out", tmp_path / "features", *CPU)
    run_module("language.encode", "--t5", tiny_t5, "--max_tokens", 16, *source)
    index = read_index(tmp_path / "features")
    assert (index["count"], index["skipped"], index["cut"]) == (9, 3, 1)


class ShapesSeen(TorchDispatchMode):
    """Notes the shape of every tensor that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.Size] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if torch.is_tensor(value):
                self.seen.add(value.shape)
        return result


def test_a_training_step_on_captions_makes_no_square_mask():
    gpt = tiny(condition="text", grid=(32, 32), num_layers=1).train()
    text, codes = captions([120, 1, 60, 7, 30, 90, 15, 44]), torch.randint(0, 50, (8, 1024))
    with ShapesSeen() as shapes:
        logits = gpt(codes, text)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), codes.flatten()).backward()
    length = 120 + 1024 - 1
    assert any(length in shape for shape in shapes.seen)
    squares = [shape for shape in shapes.seen if sum(side >= length for side in shape) > 1]
    assert not squares
    assert max(shape.numel() for shape in shapes.seen) < 8 * length * length


@pytest.mark.parametrize("condition", ["class", "text"])
def test_given_codes_stay_and_the_rest_follows_from_them(condition):
    gpt = tiny(condition=condition, text_dim=12, max_text_tokens=9)
    given = torch.tensor([1, 2]) if condition == "class" else captions([3, 5], text_dim=12)
    whole = generate(gpt, given, cfg_scale=3.0, seed=1)
    forced = whole.clone()
    forced[:, 2:] = -1
    assert torch.equal(generate(gpt, given, cfg_scale=3.0, seed=1, forced_codes=forced), whole)
    forced[:, 0, 0] = (whole[:, 0, 0] + 1) % 50
    changed = generate(gpt, given, cfg_scale=3.0, seed=1, forced_codes=forced)
    assert torch.equal(changed[:, :2], forced[:, :2])
    with pytest.raises(InputError, match="forced_codes"):
        generate(gpt, given, forced_codes=forced[:, :1])


class Rank(World):
    """One of two processes, for what broadcasts alone."""

    def broadcast(self, value):
        return value


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_text_encoder_of_sample_prompts_is_loaded_once_and_only_where_they_are_drawn(
    tmp_path, tiny_t5, monkeypatch, dtype
):
    codes = write_codes(tmp_path / "codes", pairs_fingerprint="same")
    more = {"pairs_fingerprint": "same", "t5": str(tiny_t5), "dtype": dtype}
    data_config = DataConfig((codes,), features=write_features(tmp_path / "features", **more))
    loaded = []

    def load(*arguments) -> TextEncoder:
        encoder = load_text_encoder(*arguments)
        model = encoder.encoder.model
        assert model.dtype == DTYPES[dtype]  # of the features that the training sees
        loaded.append(weakref.ref(model))
        return encoder

    monkeypatch.setattr(captions_module, "load_text_encoder", load)
    prompts = ("a red cat", "a blue dog")
    config = TrainConfig(tmp_path / "run", data_config, sample_prompts=prompts)
    quiet = dataclasses.replace(config, report=ReportConfig(sample_every=None))
    joined = TextDataset(data_config)
    gpt_config = GPTConfig(num_layers=1, num_heads=2, dim=32, **joined.model_fields())
    vq = VQModel(VQConfig(base_channels=32, channel_multipliers=(1, 1), vocab_size=50))
    for wanted, shown, rank in ((config, vq, 1), (config, None, 0), (quiet, vq, 0)):
        SampleGrid(wanted, joined, gpt_config, shown, Rank(rank, 2, torch.device("cpu")))
    assert not loaded
    grid = SampleGrid(config, joined, gpt_config, vq, Rank(0, 2, torch.device("cpu")))
    assert len(loaded) == 1
    assert loaded[0]() is None  # let go
    assert (grid.condition.features.dtype, len(grid.condition)) == (DTYPES[dtype], 2)
