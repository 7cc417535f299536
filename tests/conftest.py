"""What several test files share: running commands, and small codes made on the spot."""

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from core.data.shards import ShardWriter
from core.distributed.world import World, choose_device

ROOT = Path(__file__).parent.parent
GOLDENS = ROOT.parent / "shared" / "goldens"
PICTURES = ROOT.parent / "shared" / "data"


@pytest.fixture
def goldens() -> Path:
    """The reference's outputs; skips where they are not at hand."""
    if not GOLDENS.is_dir():
        pytest.skip("the reference's outputs are not here")
    sys.path.insert(0, str(GOLDENS))
    yield GOLDENS
    sys.path.remove(str(GOLDENS))


@pytest.fixture
def world() -> World:
    """A world of one process on the CPU."""
    return World(0, 1, choose_device("cpu"))


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small T5 encoder with random weights and a real tokenizer file, made on the spot."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp("tiny_t5")
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    text = ["a red cat and the blue dog run on a mat in the sun", "abcdefghijklmnopqrstuvwxyz."]
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"d_model": 32, "d_kv": 16, "num_heads": 2, "num_layers": 2, "d_ff": 64}
    T5EncoderModel(T5Config(vocab_size=120, **shape)).save_pretrained(folder)
    return folder


def jpeg(side: int = 40, seed: int = 0) -> bytes:
    """A picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    """An uncompressed tar."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def command(module: str, *flags: object, processes: int = 1) -> list[str]:
    """The command line of a module, under torchrun for several processes."""
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    return [*launcher, module, *map(str, flags)]


def run_module(
    module: str, *flags: object, processes: int = 1, ok: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a command from the project's root; with `ok`, it must succeed."""
    done = subprocess.run(
        command(module, *flags, processes=processes),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert not ok or done.returncode == 0, done.stderr[-3000:]
    return done


def write_codes(
    folder: Path,
    count: int = 40,
    crops: int = 2,
    grid: tuple[int, int] = (4, 4),
    vocab_size: int = 32,
    num_classes: int = 4,
    seed: int = 0,
    **index: object,
) -> Path:
    """A folder as tokenizer.encode writes it; its codes depend on the class: they can be learnt."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % num_classes
    tokens = grid[0] * grid[1]
    base = random.integers(0, vocab_size, (num_classes, 1, tokens))
    noise = random.integers(0, 3, (count, crops, tokens))
    codes = ((base[labels] + noise) % vocab_size).astype(np.uint16)
    writer = ShardWriter(folder, count, 16, {}, World(0, 1, choose_device("cpu")))
    for shard in writer.begin():
        items = list(writer.items(shard))
        ids = np.array(items)
        writer.write(shard, {"codes": codes[items], "labels": labels[items], "images": ids})
    classes = [str(i) for i in range(num_classes)]
    writer.finish(
        {
            "tokenizer": "",
            "tokenizer_sha256": "0" * 64,
            "vocab_size": vocab_size,
            "grid": list(grid),
            "classes": classes,
            **index,
        }
    )
    return folder


def write_features(folder: Path, count: int = 40, dim: int = 12, **index: object) -> Path:
    """A folder as language.encode writes it, for the pictures of write_codes."""
    random = np.random.default_rng(0)
    writer = ShardWriter(folder, count, 16, {}, World(0, 1, choose_device("cpu")))
    for shard in writer.begin():
        ids = np.array(writer.items(shard))
        lengths = random.integers(1, 9, (len(ids), 1)).astype(np.int32)
        bits = torch.randn(int(lengths.sum()), dim).bfloat16().view(torch.int16).numpy()
        writer.write(shard, {"ids": ids, "lengths": lengths}, ragged={"features": bits})
    facts = {"dim": dim, "max_tokens": 9, "dtype": "bf16", "variants": ["long"], "clean": "none"}
    writer.finish({**facts, "t5": "", "t5_identity": "", **index})
    return folder
