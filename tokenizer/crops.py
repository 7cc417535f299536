"""Crops of images, and their codes."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms.functional import ten_crop

from core.data.images import center_crop, pixels_to_images
from core.data.shards import codes_dtype
from tokenizer.models.vq_model import VQModel


@dataclass(frozen=True)
class Crops:
    """Cuts an image into crops: pixels (crops, height, width, 3) uint8.

    ranges: For each range, the image is resized to cover range times the crop, and ten crops are
        taken: corners and centre, then their flips. Empty: one centre crop.
    flip: Add the flipped centre crop.
    """

    height: int
    width: int
    ranges: tuple[float, ...]
    flip: bool

    @property
    def count(self) -> int:
        """Crops per image."""
        return 10 * len(self.ranges) if self.ranges else 1 + self.flip

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Crop an image."""
        if not self.ranges:
            crops = [center_crop(image, self.height, self.width)]
            crops += [ImageOps.mirror(crops[0])] if self.flip else []
        else:
            crops = []
            for ratio in self.ranges:
                covered = center_crop(image, int(self.height * ratio), int(self.width * ratio))
                # torchvision also crops PIL images, but its annotations only mention tensors.
                size = [self.height, self.width]
                crops += ten_crop(covered, size)  # pyright: ignore[reportArgumentType]
        return np.stack([np.asarray(crop) for crop in crops])


@torch.no_grad()
def encode_crops(vq: VQModel, pixels: torch.Tensor, batch_size: int) -> np.ndarray:
    """Pixels (n, crops, height, width, 3) uint8 -> codes (n, crops, tokens), see codes_dtype."""
    device = vq.quant_conv.weight.device
    codes = [
        vq.encode(pixels_to_images(part.to(device))).flatten(1)
        for part in pixels.flatten(0, 1).split(batch_size)
    ]
    dtype = codes_dtype(vq.quantize.vocab_size)
    return torch.cat(codes).view(*pixels.shape[:2], -1).cpu().numpy().astype(dtype)
