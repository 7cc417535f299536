r"""Whether sampled images show what their prompts say: the right name among 100, by real images.

    python scripts/name_retrieval.py --pairs runs/noto64/pairs/held_out \
        --samples runs/noto64/samples/held_out --tokenizer runs/noto64/tokenizer

Each image is compared, by its features on EfficientNet-lite0, with the real image of its own name
and those of 99 other names. The same is printed for the tokenizer's reconstructions of the real
images, beyond which no sample can be expected to come, and for the real images moved by two pixels.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from class_agreement import features

from core.config import InputError
from core.data.config import ImageTextConfig
from core.data.image_text import ImageTextPairs
from core.data.images import center_crop, image_to_pixels, images_to_pixels, pixels_to_images
from core.data.shards import read_index
from evaluations.features.extractors import EfficientNetExtractor
from evaluations.metrics.retrieval import CANDIDATES, retrieval_ranks, top_k_shares
from tokenizer import VQModel

SHIFT = 2  # pixels, of the moved copies
FIELDS = {"prompts": list[str], "images_per_prompt": int}


def main() -> None:
    """Print the shares of the first place and of the first five."""
    parser = argparse.ArgumentParser(description="Retrieval of names by sampled images.")
    parser.add_argument("--pairs", type=Path, required=True, help="real images with their names")
    parser.add_argument("--samples", type=Path, required=True, help="samples of these names")
    parser.add_argument("--tokenizer", required=True, help="the tokenizer of the samples")
    parser.add_argument("--caption", default="text", help="where the name is, as in pairs.captions")
    arguments = parser.parse_args()
    try:
        print_scores(arguments)
    except InputError as error:
        parser.error(str(error))


@torch.no_grad()
def print_scores(arguments: argparse.Namespace) -> None:
    """Score samples, reconstructions and moved copies; print a line for each."""
    index = read_index(arguments.samples, FIELDS)
    with np.load(arguments.samples / "samples.npz", allow_pickle=False) as file:
        sampled = torch.from_numpy(file["arr_0"])
    options = ImageTextConfig(arguments.pairs, captions={"name": arguments.caption})
    names, real = real_images(options, sampled.shape[1])
    if len(names) < CANDIDATES:
        raise InputError(f"{arguments.pairs}: {len(names)} names, retrieval needs {CANDIDATES}")
    row = {name: i for i, name in enumerate(names)}
    asked = [index["prompts"][i // index["images_per_prompt"]] for i in range(len(sampled))]
    if unknown := [name for name in asked if name not in row]:
        raise InputError(f"{arguments.samples}: {arguments.pairs} has no image of: {unknown[0]}")
    wanted = torch.tensor([row[name] for name in asked])
    vq = VQModel.from_pretrained(arguments.tokenizer)
    rebuilt = [images_to_pixels(vq.decode(vq.encode(x))) for x in pixels_to_images(real).split(32)]
    shown = {
        "samples": sampled,
        "reconstructions": torch.cat(rebuilt)[wanted],
        f"real, moved by {SHIFT} pixels": torch.roll(real, (SHIFT, SHIFT), (1, 2))[wanted],
    }
    extractor = EfficientNetExtractor(torch.device("cpu"))
    gallery = torch.from_numpy(features(extractor, real))
    for title, pixels in shown.items():
        found = torch.from_numpy(features(extractor, pixels))
        shares = top_k_shares(retrieval_ranks(found, wanted, gallery))
        values = ", ".join(f"{name} {value:.3f}" for name, value in shares.items())
        print(f"{title}: {values} of {len(found)} images, {CANDIDATES} of {len(names)} names each")


def real_images(options: ImageTextConfig, side: int) -> tuple[list[str], torch.Tensor]:
    """The names, each once, and one image of each, pixels (n, side, side, 3) uint8."""
    pairs, images = ImageTextPairs(options), {}
    for i in range(len(pairs)):
        name = pairs.captions(i)[0]
        if name not in images:
            images[name] = image_to_pixels(center_crop(pairs.load(i), side, side))
    return list(images), torch.from_numpy(np.stack(list(images.values())))


if __name__ == "__main__":
    main()
