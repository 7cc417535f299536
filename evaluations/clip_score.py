"""CLIP score: how well sampled images match their prompts. Needs open_clip_torch (an extra).

    python -m evaluations.clip_score --samples samples/prompts --clip_weights ViT-B-32.pt \
        --out scores/prompts

Papers use three conventions, with or without a prefix: the mean cosine of image and prompt, the
mean of 100 max(cosine, 0), and of 2.5 max(cosine, 0) (Hessel et al. 2021). Each has its own name.
"""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from tqdm import tqdm

from core.config import InputError, config_values, parse_config, run_command
from core.data.arrays import DAMAGE
from core.data.shards import read_index
from core.distributed.world import DeviceName, World, distributed
from core.files import check_regular_file, write_json
from core.lock import writer_lock
from core.weights import file_sha256
from evaluations.image_source import open_image_source


@dataclass(frozen=True)
class ClipScoreConfig:
    """Which samples, and which CLIP model.

    Args:
        samples: A run of autoregressive.sample with prompts and npz.
        out: The folder for clip_scores.json.
        clip_model: open_clip's name of the architecture.
        clip_weights: The file of weights (any of open_clip's for this architecture).
        prefix: Text before every prompt: null for none, or, in some papers, "A photo depicts ".
        batch_size: Images per forward pass on each process.
        device: auto, cpu, cuda or mps.
    """

    samples: Path
    out: Path
    clip_weights: Path
    clip_model: str = "ViT-B-32"
    prefix: str | None = None
    batch_size: int = 64
    device: DeviceName = "auto"

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}, must be >= 1")


def load_clip(config: ClipScoreConfig, device: torch.device) -> tuple[Any, Any, Any]:
    """(model, image transform, tokenizer) of open_clip; raises InputError if one is missing."""
    try:
        import open_clip  # pyright: ignore[reportMissingImports] - an extra
    except ImportError as error:
        raise InputError(
            "CLIP score needs open_clip: pip install -r requirements-extra.txt"
        ) from error
    if not config.clip_weights.is_file():
        raise InputError(
            f"{config.clip_weights}: no such file; give open_clip's weights of "
            f"{config.clip_model} with --clip_weights"
        )
    if config.clip_model not in open_clip.list_models():
        raise InputError(f"clip_model: open_clip knows no {config.clip_model}")
    check_regular_file(config.clip_weights)
    try:
        model, _, transform = open_clip.create_model_and_transforms(
            config.clip_model, pretrained=str(config.clip_weights), device=device
        )
    except (*DAMAGE, pickle.UnpicklingError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{config.clip_weights}: not weights of {config.clip_model}, or damaged ({reason})"
        ) from error
    return model.eval(), transform, open_clip.get_tokenizer(config.clip_model)


@torch.no_grad()
def clip_score(config: ClipScoreConfig, world: World) -> None:
    """Score every image against its prompt and write clip_scores.json."""
    fields = {"prompts": list[str], "images_per_prompt": int}
    index = read_index(config.samples, fields)
    images = open_image_source(config.samples, (1, 1))
    if len(index["prompts"]) * index["images_per_prompt"] < images.count:
        raise InputError(
            f"{config.samples}: index.json has {len(index['prompts'])} prompts of "
            f"{index['images_per_prompt']} images, the npz {images.count} images"
        )
    model, transform, tokenize = load_clip(config, world.device)
    mine = np.array_split(np.arange(images.count), world.size)[world.rank]
    cosines = []
    with tqdm(total=len(mine), unit="image", disable=not world.is_main) as bar:
        for ids, pixels in images.batches(mine, config.batch_size, 0):
            views = torch.stack([transform(Image.fromarray(p.numpy())) for p in pixels])
            texts = [index["prompts"][i // index["images_per_prompt"]] for i in ids]
            tokens = tokenize([(config.prefix or "") + text for text in texts])
            image = model.encode_image(views.to(world.device), normalize=True)
            text = model.encode_text(tokens.to(world.device), normalize=True)
            cosines.append((image.float() * text.float()).sum(1).double().cpu())
            bar.update(len(ids))
    empty = torch.empty(0, dtype=torch.float64)
    everywhere = torch.cat(world.gather(torch.cat([empty, *cosines])))
    if not world.is_main:
        return
    scores = {
        "clip_cosine": float(everywhere.mean()),
        "clip_score_x100": float(100 * everywhere.clamp(min=0).mean()),
        "clip_score_x2.5": float(2.5 * everywhere.clamp(min=0).mean()),
    }
    config.out.mkdir(parents=True, exist_ok=True)
    facts = {"n": len(everywhere), "weights_sha256": file_sha256(config.clip_weights)}
    path = config.out / "clip_scores.json"
    write_json(path, {**scores, **facts, "settings": config_values(config)})
    for name, value in scores.items():
        print(f"{name}: {value:.4f} on {len(everywhere)} images")
    print(path)


def main() -> None:
    """Entry point."""
    config = parse_config(ClipScoreConfig)
    with distributed(config.device) as world, writer_lock(config.out, world):
        clip_score(config, world)


if __name__ == "__main__":
    run_command(main)
