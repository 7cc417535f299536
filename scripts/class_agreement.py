"""How often generated images show the class that was asked for, by a classifier of real images.

    python scripts/class_agreement.py --train scenes64/train --val scenes64/val \
        --samples runs/scenes64/samples

The classifier is a logistic regression on the features of EfficientNet-lite0. Its accuracy on
held-out real images is printed beside the agreement, which cannot be trusted beyond it.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from core.data.loader import CenterCrop, OrderedImages, ordered_batches
from core.data.open import open_images
from evaluations.features.extractors import EfficientNetExtractor
from evaluations.metrics.class_agreement import AgreementClassifier

DEVICE = torch.device("cpu")


def main() -> None:
    """Fit the classifier, and print its accuracy and the agreement."""
    parser = argparse.ArgumentParser(description="Class agreement of generated images.")
    parser.add_argument("--train", type=Path, required=True, help="real images, a folder per class")
    parser.add_argument("--val", type=Path, required=True, help="held-out images of these classes")
    parser.add_argument("--samples", type=Path, required=True, help="a folder of samples.npz")
    parser.add_argument("--images", type=int, default=3000, help="real images, at most")
    arguments = parser.parse_args()
    with np.load(arguments.samples / "samples.npz", allow_pickle=False) as file:
        pixels, wanted = torch.from_numpy(file["arr_0"]), file["arr_1"]
    extractor = EfficientNetExtractor(DEVICE)
    size = tuple(pixels.shape[1:3])
    classifier = AgreementClassifier(
        *real_features(extractor, arguments.train, arguments.images, size)
    )
    real = real_features(extractor, arguments.val, arguments.images, size)
    agrees = classifier.agrees(features(extractor, pixels), wanted)
    print(f"accuracy on held-out real images {classifier.agreement(*real):.3f}")
    print(f"agreement of {len(agrees)} generated images {agrees.mean():.3f}")
    for label in np.unique(wanted):
        print(f"  class {label}: {agrees[wanted == label].mean():.3f}")


def features(extractor: EfficientNetExtractor, pixels: torch.Tensor) -> np.ndarray:
    """Pixels (n, h, w, 3) uint8 -> features (n, dim)."""
    return torch.cat([extractor(part).pooled for part in pixels.split(64)]).numpy()


def real_features(
    extractor: EfficientNetExtractor, folder: Path, count: int, size: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Features (n, dim) and classes (n,) of at most `count` images, spread over the folder."""
    images = open_images(folder)
    chosen = np.linspace(0, len(images) - 1, min(count, len(images))).astype(int).tolist()
    dataset = OrderedImages(images, CenterCrop(*size))
    found, classes = [], []
    for batch in ordered_batches(dataset, chosen, 64, num_workers=0):
        if batch.pixels is not None:
            found.append(features(extractor, batch.pixels))
            classes += [int(images.labels[i]) for i in batch.indices]
    return np.concatenate(found), np.array(classes)


if __name__ == "__main__":
    main()
