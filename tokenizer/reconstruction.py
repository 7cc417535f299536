"""Reconstruct validation images with a tokenizer and score them, each rank its own images.

tokenizer.reconstruct and autoregressive.reproduce call it.
"""

import dataclasses

import numpy as np
import torch
from tqdm import tqdm

from core.config import InputError, config_values
from core.data.grids import side_by_side
from core.data.images import images_to_pixels, pixels_to_images, save_png
from core.data.loader import CenterCrop, OrderedImages, ordered_batches
from core.data.open import open_images
from core.data.skip_log import Skipped
from core.distributed.world import World, dtype_of
from core.files import write_json
from core.rng import random_uniform
from evaluations.evaluator import Evaluator
from evaluations.features.extractors import build_extractor
from evaluations.metrics.lpips import LPIPS
from evaluations.metrics.psnr_ssim import SSIM_WINDOW, psnr, ssim, ssim_reference_inflated
from evaluations.scorer import check_size, open_scorer, score, scorer_from_originals
from tokenizer.models.config import choose_image_size
from tokenizer.models.pretrained import load_tokenizer
from tokenizer.models.vq_model import VQModel
from tokenizer.quantizers.config import PerturbationConfig
from tokenizer.quantizers.perturbation import perturbation_at
from tokenizer.quantizers.usage import CodebookUsage
from tokenizer.reconstruction_config import ReconstructionConfig


def reconstruct(config: ReconstructionConfig, world: World) -> None:
    """Score every image on one of the ranks and write the results."""
    images = open_images(config.data)
    vq, sha256, _ = load_tokenizer(
        config.tokenizer, config.weights, verify_weights=config.verify_weights
    )
    size, remark = choose_image_size(vq.config, config.image_size)
    if min(size) < SSIM_WINDOW:
        raise InputError(f"image_size {size}: SSIM needs {SSIM_WINDOW} pixels")
    config = dataclasses.replace(config, image_size=size)
    if remark and world.is_main:
        print(f"{config.tokenizer}: {remark}")
    config.perturbation.check(vq.config.vocab_size)
    lpips = LPIPS(config.vgg_weights).to(world.device) if config.lpips else None
    vq = vq.for_inference(world.device, dtype_of(config.precision))
    rfid = RFID(config, size, world) if config.rfid else None
    dataset = OrderedImages(images, CenterCrop(*size))
    mine = list(range(world.rank, len(images), world.size))
    usage = CodebookUsage(vq.quantize.vocab_size, world.device)
    sums: dict[str, torch.Tensor] = {}
    count, skipped, shown = 0, [], []
    each = max(len(mine) // config.grid_images, 1) if config.grid_spread else 1
    spread = np.array(mine[::each])
    with tqdm(total=len(images), unit="image", disable=not world.is_main) as bar:
        for batch in ordered_batches(dataset, mine, config.batch_size, config.num_workers):
            skipped += batch.skipped
            bar.update((len(batch.indices) + len(batch.skipped)) * world.size)
            if batch.pixels is None:
                continue
            real = batch.pixels.to(world.device)
            fake, codes = rebuild(vq, real, batch.indices, config.perturbation)
            usage.update(codes)
            for name, values in scores(real, fake, lpips).items():
                sums[name] = sums.get(name, 0) + values.double().sum()
            if rfid:
                rfid.update(real, fake, batch.indices)
            if len(shown) < config.grid_images:
                chosen = np.flatnonzero(np.isin(batch.indices, spread))
                shown += [(real[i].cpu(), fake[i].cpu()) for i in chosen]
            count += len(real)
    distances = rfid.scores() if rfid else {}
    write(config, world, usage, sums, distances, count, skipped, sha256)
    if world.is_main and shown:
        pairs = zip(*shown[: config.grid_images], strict=True)
        real, fake = (torch.stack(part) for part in pairs)
        save_png(side_by_side(real, fake, config.grid_columns), config.out / "reconstructions.png")
        print(config.out / "reconstructions.png")


class RFID:
    """Compares reconstructions with a reference file, or with the original images."""

    def __init__(self, config: ReconstructionConfig, size: tuple[int, int], world: World) -> None:
        self.config, self.world = config, world
        metrics, self.scorer = config.metrics, None
        if metrics.reference:
            self.scorer = open_scorer(metrics, "reconstruction", world)
            check_size(size, config.data, self.scorer.reference)
        extractor = self.scorer.extractor if self.scorer else build_extractor(metrics, world)
        self.real = Evaluator(extractor, world.device, metrics.batch_size)
        self.fake = Evaluator(extractor, world.device, metrics.batch_size)

    def update(self, real: torch.Tensor, fake: torch.Tensor, ids: np.ndarray) -> None:
        """Add originals and reconstructions, pixels (n, h, w, 3) uint8, with ids (n,)."""
        self.fake.update(fake, ids)
        if self.scorer is None:
            self.real.update(real, ids)

    def scores(self) -> dict[str, float]:
        """The scores by name on rank 0, {} on other ranks; all ranks call it."""
        fake, real = self.fake.merge(self.world), self.real.merge(self.world)
        if not self.world.is_main or len(fake.ids) < 2:
            return {}
        scorer = self.scorer or scorer_from_originals(
            self.config.metrics, self.fake.extractor, self.config.data, real
        )
        return score(scorer, fake).values


@torch.no_grad()
def rebuild(
    vq: VQModel, pixels: torch.Tensor, ids: np.ndarray, perturbation: PerturbationConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels (n, h, w, 3) uint8 -> reconstructed pixels, and codes (n, rows, columns) int64.

    ids (n,): Numbers of the images, on which their perturbation depends. The codes that are
    returned are the original ones.
    """
    codes = vq.encode(pixels_to_images(pixels))
    decoded = codes
    if perturb := perturbation_at(perturbation, 0):
        image = torch.as_tensor(ids, device=codes.device)[:, None, None]
        position = torch.arange(codes[0].numel(), device=codes.device).view(codes[0].shape)
        draw = [torch.full_like(position, number) for number in range(3)]
        uniform = torch.stack([random_uniform(0, image, position, d) for d in draw])
        decoded = perturb.codes(vq.quantize, codes, uniform[:2])
        chosen = random_uniform(0, image, draw[2][:1, :1]) < perturb.image_share
        decoded = torch.where(chosen, decoded, codes)
    return images_to_pixels(vq.decode(decoded)), codes


def scores(real: torch.Tensor, fake: torch.Tensor, lpips: LPIPS | None) -> dict[str, torch.Tensor]:
    """The scores by name, per image (n,), of pixels (n, h, w, 3) uint8."""
    result = {
        "psnr": psnr(real, fake),
        "ssim": ssim(real, fake),
        "ssim_reference_inflated": ssim_reference_inflated(real, fake),
    }
    if lpips:
        result["lpips"] = lpips(pixels_to_images(real), pixels_to_images(fake))
    return result


def write(
    config: ReconstructionConfig,
    world: World,
    usage: CodebookUsage,
    sums: dict[str, torch.Tensor],
    distances: dict[str, float],
    count: int,
    skipped: list[Skipped],
    sha256: str,
) -> None:
    """Write scores.json: the means over all ranks, and the settings. All ranks call it."""
    counts = world.gather(count)
    means: dict[str, float] = {}
    # Ranks without images still take part in every sum.
    for name in sorted(set().union(*world.gather(list(sums)))):
        total = sums.get(name, torch.zeros((), dtype=torch.float64, device=world.device))
        means[name] = float(world.sum(total)) / sum(counts)
    used = usage.result(world)
    everywhere = [item for rank in world.gather(skipped) for item in rank]
    if not world.is_main:
        return
    if not sum(counts):
        raise InputError(f"{config.data}: no image can be read")
    config.out.mkdir(parents=True, exist_ok=True)
    found = means | distances
    if config.perturbation.image_share:
        found = {_perturbed(name): value for name, value in found.items()}
    found |= used
    result = {
        **found,
        "n": sum(counts),
        "skipped": [list(item) for item in everywhere],
        "tokenizer_sha256": sha256,
        "settings": config_values(config),
    }
    write_json(config.out / "scores.json", result)
    for name, value in found.items():
        print(f"{name:<26} {value:.4f}")
    print(f"{sum(counts)} images, {len(everywhere)} skipped: {config.out / 'scores.json'}")


def _perturbed(name: str) -> str:
    """The name of a score of reconstructions from perturbed codes."""
    return "pfid" if name == "rfid" else f"perturbed_{name}"
