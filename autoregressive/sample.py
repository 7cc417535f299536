"""Sample images from a decoder and a tokenizer, and score them; run it again and it continues.

    python -m autoregressive.sample --gpt runs/gpt_b --tokenizer weights/vq16 --out samples/b \
        --num_images 50000 --sampling.cfg_scale 2.0 --npz false \
        --judge.reference VIRTUAL_imagenet256_labeled.npz
    torchrun --nproc-per-node 8 -m autoregressive.sample ...
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from autoregressive.model import GPT
from autoregressive.pretrained import load_gpt
from autoregressive.sampling import SamplingConfig, generate
from core.checkpoint import Weights
from core.config import InputError, config_values, parse_config, run_command, save_config
from core.distributed import DeviceName, Precision, World, distributed, dtype_of
from core.images import image_grid, images_to_pixels, save_npz, save_png
from core.randomness import random_uniform
from core.shards import ShardReader, ShardWriter
from evaluations.report import Scored, publish
from evaluations.scoring import Judge, JudgeConfig, check_size, open_judge, score
from tokenizer.model import VQModel
from tokenizer.pretrained import load_tokenizer

LABEL_STREAM = 3  # tells the draw of a sample's class from its other draws


@dataclass(frozen=True)
class SampleConfig:
    """What to sample, and where to.

    Args:
        gpt: The decoder: a run or checkpoint folder, a released file, or a Hub id.
        tokenizer: The tokenizer, likewise.
        out: The folder to write samples.png, samples.npz and index.json to.
        num_images: How many images.
        classes: Sample image i under classes[i % len]; empty to follow `labels`.
        labels: random draws a class per image (as published); balanced takes them in turn.
        sampling: Guidance, filters and seed.
        resize: Resize to resize x resize before rounding (bicubic, no antialiasing: how the
            reference evaluates 384 px models at 256); 0 to keep the size.
        batch_size: Images at a time on each process; does not change any image.
        shard_size: Images a shard: what a killed run loses at most, on each process.
        npz: Write samples.npz, arr_0 uint8 (n, height, width, 3) and the labels in arr_1. Without
            it only the codes are kept, 512 bytes an image of 16 x 16 codes.
        png: Also write png/000000.png and so on.
        judge: With a reference, score the images as they are sampled and write scores.json.
        grid_rows: Classes (or rows of images) of samples.png.
        grid_columns: Images a row of samples.png.
        gpt_weights: auto takes averaged weights of our runs.
        tokenizer_weights: auto takes averaged weights where there are any.
        grid: Rows and columns of codes where a released file does not tell; [0, 0] to infer them.
        precision: bf16 or fp32 for the decoder.
        tokenizer_precision: bf16 or fp32 for the tokenizer.
        device: auto, cpu, cuda or mps.
    """

    gpt: str
    tokenizer: str
    out: Path
    num_images: int = 50000
    classes: tuple[int, ...] = ()
    labels: Literal["random", "balanced"] = "random"
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    resize: int = 0
    batch_size: int = 32
    shard_size: int = 500
    npz: bool = True
    png: bool = False
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    grid_rows: int = 10
    grid_columns: int = 10
    gpt_weights: Weights = "auto"
    tokenizer_weights: Weights = "auto"
    grid: tuple[int, int] = (0, 0)
    precision: Precision = "bf16"
    tokenizer_precision: Precision = "fp32"
    device: DeviceName = "auto"

    def __post_init__(self) -> None:
        if min(self.num_images, self.batch_size, self.shard_size) < 1:
            raise ValueError("num_images, batch_size and shard_size must be >= 1")
        if min(self.grid_rows, self.grid_columns) < 1 or self.resize < 0:
            raise ValueError("grid_rows and grid_columns must be >= 1, resize >= 0")


def sample_labels(config: SampleConfig, num_classes: int) -> np.ndarray:
    """The class of every image, (num_images,) int64, from the seed and the image's number alone."""
    ids = np.arange(config.num_images)
    if config.classes:
        wrong = [label for label in config.classes if not 0 <= label < num_classes]
        if wrong:
            raise InputError(f"classes: {wrong[0]} is not in 0 .. {num_classes - 1}")
        return np.array(config.classes, np.int64)[ids % len(config.classes)]
    if config.labels == "balanced":
        return ids % num_classes
    stream = torch.tensor([LABEL_STREAM])
    uniform = random_uniform(config.sampling.seed, stream, torch.from_numpy(ids)).double()
    return (uniform * num_classes).long().numpy()


def check_pair(gpt: GPT, vq: VQModel, tokenizer_sha256: str, name: str) -> None:
    """Raise InputError where the decoder was not trained on this tokenizer's codes."""
    if gpt.config.vocab_size != vq.config.vocab_size:
        raise InputError(
            f"{name}: a codebook of {vq.config.vocab_size}, but the decoder knows "
            f"{gpt.config.vocab_size} codes"
        )
    expected = gpt.config.tokenizer_sha256
    if expected and expected != tokenizer_sha256:
        raise InputError(
            f"{name}: its weights (sha256 {tokenizer_sha256[:12]}) are not those of the tokenizer "
            f"that the decoder was trained with ({expected[:12]})"
        )


@torch.no_grad()
def decode_pixels(vq: VQModel, codes: torch.Tensor, resize: int = 0) -> torch.Tensor:
    """Codes (n, h, w) int64 -> pixels (n, height, width, 3) uint8."""
    images = vq.decode(codes).float()
    if resize:
        images = F.interpolate(images, (resize, resize), mode="bicubic", antialias=False)
    return images_to_pixels(images)


def score_samples(
    gpt: GPT,
    vq: VQModel,
    labels: torch.Tensor,
    sampling: SamplingConfig,
    judge: Judge,
    world: World,
    batch_size: int,
) -> dict[str, float]:
    """Sample an image per label (n,) int64 and score them -> scores by name (empty off rank 0)."""
    evaluator = judge.evaluator(world)
    # Equally many on each rank, so that sharded weights are gathered in step; the judge counts
    # the repeated ones once.
    ids = torch.arange(math.ceil(len(labels) / world.size) * world.size) % len(labels)
    for part in ids[world.rank :: world.size].split(batch_size):
        codes = generate(gpt, labels[part], **asdict(sampling), sample_ids=part)
        evaluator.update(decode_pixels(vq, codes), part)
    collected = evaluator.merge(world)
    return score(judge, collected).values if world.is_main else {}


def sample(config: SampleConfig, world: World) -> None:
    """Sample all images, this rank's shards on this rank, then write npz, png, grid and index."""
    gpt, vq, settings = load_models(config, world)
    labels = sample_labels(config, gpt.config.num_classes)
    judge = open_judge(config.judge, "generation", world) if config.judge.reference else None
    if judge:
        height, width = (vq.config.downsample * side for side in gpt.config.grid)
        size = (config.resize, config.resize) if config.resize else (height, width)
        check_size(size, Path(config.gpt), judge.reference)
    evaluator = judge.evaluator(world) if judge else None
    writer = ShardWriter(config.out, config.num_images, config.shard_size, settings, world)
    finished = writer.finished() if judge else []
    todo = writer.begin()
    if world.is_main:
        save_config(config, config.out / "config.yaml")
    total = sum(len(writer.items(shard)) for shard in (*todo, *finished))
    with tqdm(total=total * world.size, unit="image", disable=not world.is_main) as bar:
        for shard in sorted((*todo, *finished)):
            items = torch.tensor(writer.items(shard))
            known = writer.read(shard, "codes").astype(np.int64) if shard in finished else None
            kept: dict[str, list[np.ndarray]] = {"codes": [], "pixels": []}
            for start in range(0, len(items), config.batch_size):
                ids = items[start : start + config.batch_size]
                if known is None:
                    chosen = torch.from_numpy(labels)[ids]
                    codes = generate(gpt, chosen, **asdict(config.sampling), sample_ids=ids)
                else:
                    # The images of an earlier run, for the scores.
                    codes = torch.from_numpy(known[start : start + len(ids)]).to(world.device)
                pixels = decode_pixels(vq, codes, config.resize)
                if evaluator:
                    evaluator.update(pixels, ids)
                kept["codes"].append(codes.cpu().numpy().astype(np.uint16))
                kept["pixels"].append(pixels.cpu().numpy())
                bar.update(len(ids) * world.size)
            if known is None:
                write_shard(config, writer, shard, kept)
    writer.finish({"image_labels": labels.tolist()})
    if world.is_main:
        _write_outputs(config, vq, labels)
    if judge and evaluator:
        scored = Scored(evaluator.merge(world), labels, (), [])
        publish(judge, scored, config.out, config_values(config), world)


def load_models(config: SampleConfig, world: World) -> tuple[GPT, VQModel, dict[str, Any]]:
    """Decoder and tokenizer on this rank's device, and what the images depend on."""
    overrides: dict[str, Any] = {} if config.grid == (0, 0) else {"grid": config.grid}
    gpt, gpt_sha256 = load_gpt(config.gpt, config.gpt_weights, **overrides)
    vq, vq_sha256 = load_tokenizer(config.tokenizer, config.tokenizer_weights)
    check_pair(gpt, vq, vq_sha256, config.tokenizer)
    if gpt.config.condition != "class":
        raise InputError(f"{config.gpt}: conditioned on text; this command samples classes")
    settings = {
        "gpt": config.gpt,
        "gpt_sha256": gpt_sha256,
        "tokenizer": config.tokenizer,
        "tokenizer_sha256": vq_sha256,
        "sampling": asdict(config.sampling),
        "labels": config.labels,
        "classes": list(config.classes),
        "resize": config.resize,
        "npz": config.npz,
        "precision": [config.precision, config.tokenizer_precision],
        "grid": list(gpt.config.grid),
    }
    gpt = gpt.to(world.device, dtype_of(config.precision))
    vq = vq.to(world.device, dtype_of(config.tokenizer_precision))
    return gpt, vq, settings


def write_shard(
    config: SampleConfig, writer: ShardWriter, shard: int, kept: dict[str, list[np.ndarray]]
) -> None:
    """A shard's codes, and its pixels where a file of them is wanted."""
    arrays = {name: np.concatenate(parts) for name, parts in kept.items()}
    if config.png:
        folder = config.out / "png"
        folder.mkdir(exist_ok=True)
        for i, picture in zip(writer.items(shard), arrays["pixels"], strict=True):
            save_png(picture, folder / f"{i:06d}.png")
    if not config.npz:
        del arrays["pixels"]
    writer.write(shard, arrays)


def _write_outputs(config: SampleConfig, vq: VQModel, labels: np.ndarray) -> None:
    """The grid, and the npz streamed from the shards."""
    shown = grid_ids(labels, config.grid_rows, config.grid_columns)
    codes = torch.from_numpy(ShardReader(config.out, "codes")[shown].astype(np.int64))
    pixels = [
        decode_pixels(vq, part.to(vq.quant_conv.weight.device), config.resize).cpu()
        for part in codes.split(config.batch_size)
    ]
    grid = image_grid(torch.cat(pixels).numpy(), config.grid_columns)
    save_png(grid, config.out / "samples.png")
    written = [config.out / "samples.png", config.out / "index.json"]
    if config.npz:
        path = config.out / "samples.npz"
        save_npz(path, len(labels), _batches(ShardReader(config.out, "pixels")), arr_1=labels)
        written.append(path)
    print("\n".join(str(path) for path in written))


def _batches(pixels: ShardReader) -> Iterator[np.ndarray]:
    for start in range(0, len(pixels), 500):
        yield pixels[np.arange(start, min(start + 500, len(pixels)))]


def grid_ids(labels: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Which images to show: a row per class where there are enough of each, else the first ones."""
    classes = list(dict.fromkeys(np.sort(np.unique(labels))[:rows].tolist()))
    by_class = [np.flatnonzero(labels == label)[:columns] for label in classes]
    if all(len(ids) == columns for ids in by_class):
        return np.concatenate(by_class)
    return np.arange(min(len(labels), rows * columns))


def main() -> None:
    """Entry point."""
    config = parse_config(SampleConfig)
    with distributed(config.device) as world:
        sample(config, world)


if __name__ == "__main__":
    run_command(main)
