"""Reconstruct validation images with a tokenizer and score them, each rank its own images.

tokenizer.reconstruct and autoregressive.reproduce call it.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from core.config import InputError, config_values
from core.data.grids import side_by_side
from core.data.images import images_to_pixels, pixels_to_images, save_png
from core.data.loader import CenterCrop, OrderedImages, ordered_batches
from core.data.open import open_images
from core.data.skip_log import Skipped
from core.distributed.world import DeviceName, Precision, World, dtype_of
from core.files import write_json
from core.rng import random_uniform
from core.weights import Weights
from evaluations.evaluator import Evaluator
from evaluations.image_source import check_reading
from evaluations.metrics.lpips import LPIPS
from evaluations.metrics.psnr_ssim import SSIM_WINDOW, psnr, ssim, ssim_reference_inflated
from evaluations.scorer import MetricsConfig, check_size, open_scorer, score, scorer_from_originals
from tokenizer.models.pretrained import load_tokenizer
from tokenizer.models.vq_model import VQModel
from tokenizer.quantizers.perturbation import PerturbationConfig
from tokenizer.quantizers.usage import CodebookUsage


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    """Which tokenizer, which images, and which scores.

    Args:
        tokenizer: A run or checkpoint folder, a released file, or a Hub id.
        data: Images: a folder of class folders, a flat folder, a list file, tars, or a folder of
            jsonl files.
        out: The folder for scores.json and reconstructions.png.
        image_size: Height and width of the centre crop.
        rfid: Also compute rFID and the other scores of evaluations.score, which need the weights
            of the feature extractor.
        metrics: For rfid: the feature extractor, and the reference; without a reference, the
            reconstructions are compared with `data` itself.
        perturbation: Replace codes by near ones before decoding. The scores then have the prefix
            perturbed_, and rfid is called pfid (RobustTok).
        lpips: Also compute LPIPS, which needs the weights of VGG16.
        vgg_weights: torchvision's vgg16-397923af.pth; null to use its cache or to download it.
        grid_images: Number of images in reconstructions.png.
        grid_columns: Images per row.
        grid_spread: Show images spread evenly over the data, and so over its classes, instead of
            the first ones.
        weights: The weights to load; auto takes the EMA weights if there are any.
        verify_weights: Compare the files of our checkpoints with their checksums.
        batch_size: Images per forward pass on each process.
        num_workers: Loader processes per rank.
        precision: bf16 or fp32.
        device: auto, cpu, cuda or mps.
    """

    tokenizer: str
    data: Path
    out: Path
    image_size: tuple[int, int] = (256, 256)
    rfid: bool = False
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    perturbation: PerturbationConfig = field(default_factory=PerturbationConfig)
    lpips: bool = False
    vgg_weights: Path | None = None
    grid_images: int = 16
    grid_columns: int = 8
    grid_spread: bool = False
    weights: Weights = "auto"
    verify_weights: bool = True
    batch_size: int = 32
    num_workers: int = 8
    precision: Precision = "fp32"
    device: DeviceName = "auto"

    def __post_init__(self) -> None:
        check_reading(self.image_size, self.num_workers)
        if min(self.image_size) < SSIM_WINDOW:
            raise ValueError(f"image_size {self.image_size}: SSIM needs {SSIM_WINDOW} pixels")
        if min(self.grid_images, self.grid_columns, self.batch_size) < 1:
            raise ValueError("grid_images, grid_columns and batch_size must be >= 1")
        if self.perturbation.anneal_steps:
            raise ValueError("perturbation.anneal_steps is for training; leave it null")


def reconstruct(config: ReconstructionConfig, world: World) -> None:
    """Score every image on one of the ranks and write the results."""
    images = open_images(config.data)
    vq, sha256, _ = load_tokenizer(
        config.tokenizer, config.weights, verify_weights=config.verify_weights
    )
    if any(side < 1 or side % vq.config.downsample for side in config.image_size):
        raise InputError(
            f"image_size {config.image_size} must be divisible by {vq.config.downsample}"
        )
    config.perturbation.check(vq.config.vocab_size)
    lpips = LPIPS(config.vgg_weights).to(world.device) if config.lpips else None
    vq = vq.for_inference(world.device, dtype_of(config.precision))
    rfid = RFID(config, world) if config.rfid else None
    dataset = OrderedImages(images, CenterCrop(*config.image_size))
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

    def __init__(self, config: ReconstructionConfig, world: World) -> None:
        self.config, self.world = config, world
        metrics, self.scorer = config.metrics, None
        if metrics.reference:
            self.scorer = open_scorer(metrics, "reconstruction", world)
            check_size(config.image_size, config.data, self.scorer.reference)
        extractor = self.scorer.extractor if self.scorer else metrics.build_extractor(world)
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
    if perturb := perturbation.at(0):
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
