"""The VQGAN tokenizer: images to a grid of codes and back.

Module names follow the released files, whose keys they must match.
"""

import dataclasses
import importlib
import pkgutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from core.config import InputError, config_text
from core.weights import save_model
from tokenizer import quantizers
from tokenizer.models.config import VQConfig
from tokenizer.models.layers import Decoder, Encoder
from tokenizer.quantizers.base import Quantizer, QuantizerSettings
from tokenizer.quantizers.perturbation import LatentPerturbation

PRESETS = {"VQ-16": (1, 1, 2, 2, 4), "VQ-8": (1, 2, 2, 4)}  # channel_multipliers


class Reconstruction(NamedTuple):
    """Images (b, 3, H, W), codes (b, h, w) int64, and the quantizer's losses by name.

    features: The features of the decoder at its lowest resolution, (b, width, h, w).
    """

    images: torch.Tensor
    codes: torch.Tensor
    losses: dict[str, torch.Tensor]
    features: torch.Tensor


def _read_quantizers() -> dict[str, type[Quantizer]]:
    """The quantizers of all files in tokenizer/quantizers, by their kind."""
    for file in pkgutil.iter_modules(quantizers.__path__):
        importlib.import_module(f"{quantizers.__name__}.{file.name}")
    return {found.kind: found for found in Quantizer.__subclasses__()}


QUANTIZERS = _read_quantizers()


def build_quantizer(config: VQConfig) -> Quantizer:
    """The quantizer that a configuration describes."""
    options = getattr(config, config.quantizer, None)
    sizes = (config.vocab_size, config.codebook_dim, config.l2_normalize)
    weights = (config.commitment_weight, config.entropy_weight)
    return QUANTIZERS[config.quantizer].build(QuantizerSettings(*sizes, *weights, options))


class VQModel(nn.Module):
    """Encoder, quantizer, decoder (LlamaGen, section 2.1)."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quantize = build_quantizer(config)
        self.quant_conv = nn.Conv2d(config.z_channels, self.quantize.dim, 1)
        self.post_quant_conv = nn.Conv2d(self.quantize.dim, config.z_channels, 1)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "VQModel":  # noqa: ANN401 - any field
        """A new model with random weights: from_preset("VQ-16", vocab_size=4096)."""
        if name not in PRESETS:
            raise InputError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
        return cls(VQConfig(**{"channel_multipliers": PRESETS[name], **overrides}))

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,  # noqa: ANN401
    ) -> "VQModel":
        """Load a released file, a folder of ours or a Hub repository, in eval mode.

            vq = VQModel.from_pretrained("llamagen_vq16", device="cuda")
            with torch.inference_mode():  # without it, decode keeps activations for gradients
                images = vq.decode(codes)

        device, dtype: default CPU and float32. Other options and what is raised: see
        models.pretrained.load_tokenizer.
        """
        from tokenizer.models.pretrained import load_tokenizer

        return load_tokenizer(path_or_hub_id, **options).vq.to(device=device, dtype=dtype)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.yaml and model.safetensors to a folder, for from_pretrained.

        vq.save_pretrained("weights/vq16")
        """
        save_model(self, config_text(self.config), Path(folder))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.quant_conv.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.quant_conv.weight.dtype

    def for_inference(
        self, device: torch.device, dtype: torch.dtype, compile: bool = False
    ) -> "VQModel":
        """Prepare this model for inference: eval mode, channels-last memory, device and dtype.

        compile: Compile encoder and decoder, to fuse norms with their neighbours on CUDA. On CPUs
            eager mode is faster.
        """
        self.eval().requires_grad_(False)
        self.to(device, dtype).to(memory_format=torch.channels_last)
        if compile:
            self.encoder.compile(dynamic=False)
            self.decoder.compile(dynamic=False)
        return self

    def folded(self) -> "VQModel":
        """The same model; a quantizer that equals a plain codebook (simvq) is written as one."""
        codebook = self.quantize.plain_codebook()
        if codebook is None:
            return self
        config = dataclasses.replace(self.config, quantizer="vq", l2_normalize=False)
        plain = VQModel(config).to(codebook.device)
        plain.quantize.load_state_dict({"embedding.weight": codebook}, strict=False)
        for name in ("encoder", "decoder", "quant_conv", "post_quant_conv"):
            getattr(plain, name).load_state_dict(getattr(self, name).state_dict())
        return plain.train(self.training)

    def forward(
        self, images: torch.Tensor, perturbation: LatentPerturbation | None = None
    ) -> Reconstruction:
        """Images (b, 3, H, W) in [-1, 1] -> their reconstruction, codes and losses.

        perturbation: Replaces some codes before the decoder. The codes that are returned are the
            original ones.
        """
        quantized = self.quantize(self._project(images))
        vectors = quantized.vectors
        if perturbation:
            vectors = perturbation(self.quantize, quantized)
        features = self.decoder.middle(self.post_quant_conv(vectors))
        decoded = self.decoder.upsample(features)
        return Reconstruction(decoded, quantized.codes, quantized.losses, features)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images (b, 3, H, W) in [-1, 1], any dtype -> codes (b, H / f, W / f) int64.

        Raises InputError unless the downsampling factor f divides both sides.
        """
        return self.quantize(self._project(images.to(self.quant_conv.weight.dtype))).codes

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes (b, h, w) int64 -> images (b, 3, h f, w f) in about [-1, 1], not clamped.

        Raises InputError for another shape or dtype and, on the CPU, for a code outside the
        codebook; on a GPU this would wait for it.
        """
        self._check_codes(codes)
        vectors = self.quantize.lookup(codes).to(self.post_quant_conv.weight.dtype)
        return self.decoder(self.post_quant_conv(vectors))

    def _check_codes(self, codes: torch.Tensor) -> None:
        if codes.ndim != 3 or codes.dtype not in (torch.int32, torch.int64):
            raise InputError(
                f"codes {tuple(codes.shape)} {codes.dtype}: expected (batch, height, width) int64"
            )
        size = self.quantize.vocab_size
        if codes.device.type == "cpu" and codes.numel():
            least, greatest = (int(value) for value in codes.aminmax())
            if not 0 <= least <= greatest < size:
                raise InputError(f"codes {least} .. {greatest}: the codebook has {size} entries")

    def _project(self, images: torch.Tensor) -> torch.Tensor:
        f = self.config.downsample
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % f or images.shape[3] % f:
            raise InputError(
                f"images {tuple(images.shape)}: expected (batch, 3, height, width), both sides "
                f"divisible by {f}"
            )
        return self.quant_conv(self.encoder(images))
