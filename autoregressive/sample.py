"""Sample images from a decoder and a tokenizer; run it again and it continues.

    python -m autoregressive.sample --gpt runs/gpt_b --tokenizer weights/vq16 --out samples/b \
        --num_images 50000 --sampling.cfg_scale 2.0
    torchrun --nproc-per-node 8 -m autoregressive.sample ...
"""

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
from core.config import InputError, parse_config, run_command, save_config
from core.distributed import DeviceName, Precision, World, distributed, dtype_of
from core.images import image_grid, images_to_pixels, save_npz, save_png
from core.randomness import random_uniform
from core.shards import ShardReader, ShardWriter
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
        npz: Write samples.npz, arr_0 uint8 (n, height, width, 3) and the labels in arr_1.
        png: Also write png/000000.png and so on.
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
def sample_pixels(
    gpt: GPT,
    vq: VQModel,
    labels: torch.Tensor,
    sample_ids: torch.Tensor,
    sampling: SamplingConfig,
    resize: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels and ids (n,) int64 -> codes (n, h, w) int64, pixels (n, height, width, 3) uint8."""
    codes = generate(gpt, labels, **asdict(sampling), sample_ids=sample_ids)
    images = vq.decode(codes).float()
    if resize:
        images = F.interpolate(images, (resize, resize), mode="bicubic", antialias=False)
    return codes, images_to_pixels(images)


def sample(config: SampleConfig, world: World) -> None:
    """Sample all images, this rank's shards on this rank, then write npz, png, grid and index."""
    overrides: dict[str, Any] = {} if config.grid == (0, 0) else {"grid": config.grid}
    gpt, gpt_sha256 = load_gpt(config.gpt, config.gpt_weights, **overrides)
    vq, vq_sha256 = load_tokenizer(config.tokenizer, config.tokenizer_weights)
    check_pair(gpt, vq, vq_sha256, config.tokenizer)
    if gpt.config.condition != "class":
        raise InputError(f"{config.gpt}: conditioned on text; this command samples classes")
    gpt = gpt.to(world.device, dtype_of(config.precision))
    vq = vq.to(world.device, dtype_of(config.tokenizer_precision))
    labels = sample_labels(config, gpt.config.num_classes)

    settings = {
        "gpt": config.gpt,
        "gpt_sha256": gpt_sha256,
        "tokenizer": config.tokenizer,
        "tokenizer_sha256": vq_sha256,
        "sampling": asdict(config.sampling),
        "labels": config.labels,
        "classes": list(config.classes),
        "resize": config.resize,
        "precision": [config.precision, config.tokenizer_precision],
        "grid": list(gpt.config.grid),
    }
    writer = ShardWriter(config.out, config.num_images, config.shard_size, settings, world)
    todo = writer.begin()
    if world.is_main:
        save_config(config, config.out / "config.yaml")
    total = sum(len(writer.items(shard)) for shard in todo)
    with tqdm(total=total, unit="image", disable=not world.is_main) as bar:
        for shard in todo:
            codes, pixels = [], []
            for ids in torch.tensor(writer.items(shard)).split(config.batch_size):
                chosen = torch.from_numpy(labels)[ids]
                drawn = sample_pixels(gpt, vq, chosen, ids, config.sampling, config.resize)
                codes.append(drawn[0].cpu().numpy().astype(np.uint16))
                pixels.append(drawn[1].cpu().numpy())
                bar.update(len(ids) * world.size)
            arrays = {"codes": np.concatenate(codes), "pixels": np.concatenate(pixels)}
            if config.png:
                _write_pngs(arrays["pixels"], writer.items(shard), config.out / "png")
            writer.write(shard, arrays)
    writer.finish({"image_labels": labels.tolist()})
    if world.is_main:
        _write_outputs(config, labels)


def _write_pngs(pixels: np.ndarray, ids: range, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for i, picture in zip(ids, pixels, strict=True):
        save_png(picture, folder / f"{i:06d}.png")


def _write_outputs(config: SampleConfig, labels: np.ndarray) -> None:
    """The grid, and the npz streamed from the shards."""
    pixels = ShardReader(config.out, "pixels")
    shown = grid_ids(labels, config.grid_rows, config.grid_columns)
    save_png(image_grid(pixels[shown], config.grid_columns), config.out / "samples.png")
    written = [config.out / "samples.png", config.out / "index.json"]
    if config.npz:
        path = config.out / "samples.npz"
        save_npz(path, len(labels), _batches(pixels), arr_1=labels)
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
