"""Loads a tokenizer: a released file, a run or checkpoint folder of ours, or a Hub repository."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from core.checksums import CHECKSUMS, read_checksums
from core.config import InputError, load_config
from core.released import released_architecture
from core.weights import (
    Weights,
    check_shapes,
    file_sha256,
    find_model,
    load_weights,
    read_file,
    tensors_sha256,
)
from tokenizer.models.config import VQConfig
from tokenizer.models.released_layouts import read_tokenizer
from tokenizer.models.vq_model import VQModel


class LoadedTokenizer(NamedTuple):
    """A tokenizer in eval mode, and the sha256 of the file that its weights came from.

    source_sha256: of the file that a converted folder was made from, if it was recorded.
    """

    vq: VQModel
    sha256: str
    source_sha256: str | None = None

    def is_known_as(self, sha256: object) -> bool:
        """Whether this is the tokenizer's identity, or what older versions took for it: the sha256
        of its file, or of the file that it was converted from.
        """
        return sha256 in (self.sha256, self.source_sha256) or sha256 == self.identity()

    def identity(self) -> str:
        """The sha256 of the weights in float32; equal for a released file and its conversion.

        Call it before the weights are converted to another precision.
        """
        return tensors_sha256(self.vq.state_dict())


def load_tokenizer(
    source: str | Path,
    weights: Weights = "auto",
    revision: str | None = None,
    verify_weights: bool = True,
    **overrides: Any,  # noqa: ANN401 - any config field
) -> LoadedTokenizer:
    """Load a tokenizer; every tensor of the file must fit, and none may be missing.

    source, weights, revision, verify_weights: as for autoregressive.models.pretrained.load_gpt;
        "auto" takes the EMA weights if there are any.
    overrides: fields of VQConfig that a released file cannot tell, e.g. l2_normalize=False.
    Raises InputError if the weights do not fit, are damaged, or would run code.
    """
    path, config_path, sha256 = find_model(source, weights, revision, verify_weights)
    if config_path:
        config = dataclasses.replace(load_config(VQConfig, config_path), **overrides)
        tensors = read_file(path).weights("model", path)
    else:
        tensors, fields = read_tokenizer(path, weights)
        told = released_architecture(source)
        config = VQConfig(**{**_infer_shape(tensors, path), **fields, **told, **overrides})
    with torch.device("meta"):  # sizes that do not fit the weights need no memory
        check_shapes(VQModel(config), {key: value.shape for key, value in tensors.items()}, path)
    vq = VQModel(config)
    load_weights(vq, {key: value.float() for key, value in tensors.items()}, path)
    recorded = path.with_name(CHECKSUMS).exists() and config_path
    source_sha256 = read_checksums(path.parent).source_sha256 if recorded else None
    return LoadedTokenizer(vq.eval(), sha256 or file_sha256(path), source_sha256)


def _infer_shape(tensors: Mapping[str, torch.Tensor], path: Path) -> dict[str, Any]:
    """The fields of VQConfig that follow from the shapes."""
    try:
        vocab_size, codebook_dim = tensors["quantize.embedding.weight"].shape
        base_channels = tensors["encoder.conv_in.weight"].shape[0]
        z_channels = tensors["encoder.conv_out.weight"].shape[0]
    except KeyError as error:
        raise InputError(f"{path}: not a tokenizer of this project ({error} is missing)") from error
    except (ValueError, IndexError) as error:
        raise InputError(f"{path}: codebook or convolutions are of another shape") from error
    widths, blocks = [], 0
    while (key := f"encoder.conv_blocks.{len(widths)}.res.0.conv1.weight") in tensors:
        widths.append(tensors[key].shape[0])
    while f"encoder.conv_blocks.0.res.{blocks}.conv1.weight" in tensors:
        blocks += 1
    return {
        "base_channels": base_channels,
        "channel_multipliers": tuple(width // base_channels for width in widths),
        "num_res_blocks": blocks,
        "z_channels": z_channels,
        "vocab_size": vocab_size,
        "codebook_dim": codebook_dim,
    }
