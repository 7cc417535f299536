"""Metrics of a tokenizer training run: mean losses, codebook usage, reconstructions."""

from pathlib import Path

import numpy as np
import torch

from core.config import InputError
from core.data.grids import side_by_side
from core.data.images import images_to_pixels, pixels_to_images
from core.data.loader import CenterCrop, OrderedImages, ordered_batches
from core.data.open import open_images
from core.data.skip_log import SkipLog
from core.distributed.world import World
from core.training.session import Session
from evaluations.features.config import ExtractorConfig
from evaluations.features.extractors import FeatureExtractor, build_extractor
from evaluations.metrics.frechet import Gaussian, frechet_distance
from evaluations.metrics.psnr_ssim import psnr
from tokenizer.models.vq_model import VQModel
from tokenizer.quantizers.usage import CodebookUsage


class Totals:
    """Sums of the losses and counts of the codes since the last report, on the device."""

    def __init__(self, vocab_size: int, world: World) -> None:
        self.world, self.vocab_size = world, vocab_size
        self.grad_norm = torch.zeros((), device=world.device)
        self._reset()

    def add(self, losses: dict[str, torch.Tensor], codes: torch.Tensor) -> None:
        """Add the losses (scalars) and codes of one micro-batch."""
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
            self.counts[name] = self.counts.get(name, 0) + 1
        self.usage.update(codes)

    def take(self) -> dict[str, float | torch.Tensor]:
        """Means over all ranks and the codebook usage since the last call; resets the sums."""
        metrics: dict[str, float | torch.Tensor] = {"grad_norm": self.grad_norm}
        for name, value in self.sums.items():
            metrics[name] = self.world.sum(value / self.counts[name]) / self.world.size
        metrics.update(self.usage.result(self.world))
        self._reset()
        return metrics

    def _reset(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}
        self.usage = CodebookUsage(self.vocab_size, self.world.device)


def load_images(source: Path, count: int, image_size: tuple[int, int]) -> torch.Tensor:
    """Up to `count` images of a folder or list, centre-cropped: (n, height, width, 3) uint8."""
    images = open_images(source)
    count = min(len(images), count)
    # Spread over the whole list, which is sorted by class.
    chosen = np.linspace(0, len(images) - 1, count).astype(int).tolist()
    dataset = OrderedImages(images, CenterCrop(*image_size))
    batch = next(ordered_batches(dataset, chosen, count, num_workers=0))
    SkipLog().add(batch.skipped)
    if batch.pixels is None:
        raise InputError(f"{source}: none of {count} images can be read")
    return batch.pixels


class Validation:
    """Validation images (n, height, width, 3) uint8, and what is measured on them.

    metrics: The network of the Frechet distance of their reconstructions; None for none.
    Only rank 0 computes.
    """

    def __init__(self, pixels: torch.Tensor, metrics: ExtractorConfig | None, world: World) -> None:
        self.pixels, self.world = pixels, world
        self.extractor = build_extractor(metrics, world) if metrics and world.is_main else None
        self.batch_size = metrics.batch_size if metrics else 1
        self.real: Gaussian | None = None

    def evaluate(self, session: Session, vq: VQModel) -> None:
        """Report the scores of the reconstructions and draw them."""
        if self.world.is_main:
            fake = reconstruct(vq, self.pixels, self.world)
            session.log_evaluation(self.scores(fake))
            session.draw(side_by_side(self.pixels[:16], fake[:16], columns=8))

    def scores(self, fake: torch.Tensor) -> dict[str, float]:
        """PSNR in dB, and the Frechet distance, named for its network, of reconstructions."""
        scores = {"validation_psnr": float(psnr(self.pixels, fake).mean())}
        if self.extractor:
            if self.real is None:
                self.real = self._statistics(self.pixels, self.extractor)
            name = "rfid" if self.extractor.metric == "fid" else self.extractor.metric
            distance = frechet_distance(self._statistics(fake, self.extractor), self.real)
            scores[f"validation_{name}"] = distance
        return scores

    def _statistics(self, pixels: torch.Tensor, extractor: FeatureExtractor) -> Gaussian:
        batches = (part.to(self.world.device) for part in pixels.split(self.batch_size))
        return Gaussian.of_rows(torch.cat([extractor(batch).pooled.cpu() for batch in batches]))


@torch.no_grad()
def reconstruct(vq: VQModel, images: torch.Tensor, world: World) -> torch.Tensor:
    """Images (n, height, width, 3) uint8 -> their reconstructions."""
    training = vq.training
    vq.eval()
    rebuilt = []
    for pixels in images.split(16):
        batch = pixels_to_images(pixels.to(world.device))
        rebuilt.append(images_to_pixels(vq.decode(vq.encode(batch))).cpu())
    vq.train(training)
    return torch.cat(rebuilt)
