"""DINOv2's ViT-L/14. FD-DINOv2 compares its class tokens (Stein et al. 2023)."""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from core.config import InputError
from core.weights import file_sha256, find_weights, load_weights, read_file
from evaluations.features.config import DINOV2_HUB_ID

ARCHITECTURE = "vit_large_patch14_dinov2"
SIDE, PATCH = 224, 14
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OFFSET = 0.1  # DINOv2 adds this to the target size when it interpolates position embeddings


def load_dinov2(weights: str) -> tuple[nn.Module, str]:
    """The network in eval mode and the sha256 of its file; raises InputError if it is missing."""
    try:
        path = find_weights(weights, "model.safetensors")
    except InputError as error:
        raise InputError(
            f"{error}. FD-DINOv2 needs dinov2_vitl14_pretrain.pth (published by DINOv2) or "
            f"{DINOV2_HUB_ID} (the Hub): give the file with --metrics.dinov2_weights, or use "
            "--metrics.extractor proxy (which is NOT FID)"
        ) from error
    network = build_dinov2()
    load_weights(network, _for_our_size(read_file(path).weights("model", path), path), path)
    return network.eval().requires_grad_(False), file_sha256(path)


def load_patch_encoder(architecture: str, weights: str | None) -> nn.Module:
    """A DINOv2 of timm's for images of any size, frozen and in eval mode.

    architecture: timm's name. weights: A file with timm's tensors; None for the Hub's. Raises
    InputError if the weights are missing.
    """
    import timm

    source = weights or f"timm/{architecture}/model.safetensors"
    try:
        path = find_weights(source, "model.safetensors")
    except InputError as error:
        raise InputError(
            f"{error}. DINOv2 needs timm's {architecture}: give its file, or use the encoder "
            "efficientnet_lite0"
        ) from error
    network = timm.create_model(architecture, num_classes=0, dynamic_img_size=True)
    load_weights(network, _without_mask_token(read_file(path).weights("model", path)), path)
    return network.eval().requires_grad_(False)


def build_dinov2() -> nn.Module:
    """timm's ViT-L/14 for images of 224 x 224, with random weights."""
    import timm

    return timm.create_model(ARCHITECTURE, pretrained=False, img_size=SIDE, num_classes=0)


def _for_our_size(tensors: dict[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    """Interpolate the position embeddings from 518 x 518 to 224 x 224; drop the mask token."""
    tensors = _without_mask_token(tensors)
    table, side = tensors.get("pos_embed"), SIDE // PATCH
    if table is None or round((table.shape[1] - 1) ** 0.5) ** 2 != table.shape[1] - 1:
        raise InputError(f"{path}: no square pos_embed; is it DINOv2's ViT-L/14 (no registers)?")
    stored = round((table.shape[1] - 1) ** 0.5)
    if stored != side:
        grid = table[:, 1:].unflatten(1, (stored, stored)).movedim(-1, 1)
        scale = (side + OFFSET) / stored
        grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
        tensors["pos_embed"] = torch.cat([table[:, :1], grid.flatten(2).movedim(1, 2)], dim=1)
    return tensors


def _without_mask_token(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != "mask_token"}


def features(network: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Pixels (n, h, w, 3) uint8 on the network's device -> class tokens (n, 1024) float32."""
    x = pixels.movedim(-1, 1).float() / 255
    if x.shape[2:] != (SIDE, SIDE):
        x = F.interpolate(x, (SIDE, SIDE), mode="bicubic", antialias=True).clamp_(0, 1)
    mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return network((x - mean) / std)
