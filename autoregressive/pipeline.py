"""The decoder and the tokenizer of a sampling command, ready on this process's device."""

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch.nn import functional as F

from autoregressive.inference.engine import GenerationRequest, InferenceEngine
from autoregressive.inference.generate import generation_request
from autoregressive.inference.precision_check import compare
from autoregressive.inference.quantized_linear import DecodePrecision
from autoregressive.inference.sampling_config import SamplingConfig
from autoregressive.models.gpt import GPT
from autoregressive.models.pretrained import load_gpt
from core.config import InputError
from core.data.images import images_to_pixels
from core.distributed.world import DeviceName, Precision, World, dtype_of
from core.weights import Weights
from tokenizer.models.pretrained import load_tokenizer
from tokenizer.models.vq_model import VQModel

# Decoding steps from which compiling is worth its 10 to 40 seconds: it took a sixth (bf16) to a
# quarter (int8) off a step on CPUs; on GPUs not measured.
COMPILE_FROM = 5000
# What lower precision is compared with.
EXACT: dict[str, DecodePrecision] = {
    "cpu": "fp32",
    "cuda": "bf16",
    "mps": "fp32",
}
COMPARED = 8  # images whose distributions are compared where precision changes them


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """Which models, and how they compute.

    Args:
        gpt: The decoder: a run or checkpoint folder, a released file, or a Hub id.
        tokenizer: The tokenizer, likewise.
        gpt_weights: auto takes averaged weights of our runs.
        tokenizer_weights: auto takes averaged weights where there are any.
        grid: Rows and columns of codes where a released file does not tell; [0, 0] to infer them.
        precision: fp32 or bf16 for the decoder; int8, or fp8 on GPUs, for its weights alone; on
            CPUs w8a8, int8 for what they multiply too, faster from some images on. How much these
            change the distribution is measured and printed first.
        cache_precision: int8 or fp8 for the decoder's keys and values: half the memory; likewise.
        tokenizer_precision: bf16 or fp32 for the tokenizer; bf16 is faster, and changes pixels by
            a level or two.
        compile: torch.compile the decoder, and on CUDA the tokenizer; null for yes from 5,000 steps
            on (a step is a code of a batch), where there is a compiler. The choice is printed.
        device: auto, cpu, cuda or mps.
    """

    gpt: str
    tokenizer: str
    gpt_weights: Weights = "auto"
    tokenizer_weights: Weights = "auto"
    grid: tuple[int, int] = (0, 0)
    precision: DecodePrecision = "bf16"
    cache_precision: Literal["model", "int8", "fp8"] = "model"
    tokenizer_precision: Precision = "fp32"
    compile: bool | None = None
    device: DeviceName = "auto"


class LoadedPair(NamedTuple):
    """Both models as loaded, and what pictures depend on, for an index.json."""

    gpt: GPT
    vq: VQModel
    settings: dict[str, Any]


def load_pair(config: PipelineConfig) -> LoadedPair:
    """Load both; raises InputError where one is missing or they do not fit each other."""
    overrides: dict[str, Any] = {} if config.grid == (0, 0) else {"grid": config.grid}
    gpt, gpt_sha256 = load_gpt(config.gpt, config.gpt_weights, **overrides)
    vq, vq_sha256 = load_tokenizer(config.tokenizer, config.tokenizer_weights)
    check_pair(gpt, vq, vq_sha256, config.tokenizer)
    settings = {
        "gpt": config.gpt,
        "gpt_sha256": gpt_sha256,
        "tokenizer": config.tokenizer,
        "tokenizer_sha256": vq_sha256,
        "precision": [config.precision, config.cache_precision, config.tokenizer_precision],
        "grid": list(gpt.config.grid),
    }
    return LoadedPair(gpt, vq, settings)


def make_ready(
    config: PipelineConfig, pair: LoadedPair, num_batches: int, world: World
) -> tuple[InferenceEngine, VQModel]:
    """Both on this rank's device, for that many batches here; prints how and why so.

    Raises InputError for a precision that the device does not have.
    """
    compiles, why = _compiles(config, world, num_batches * pair.gpt.config.num_codes)
    cache = None if config.cache_precision == "model" else config.cache_precision
    decoder = InferenceEngine(pair.gpt, config.precision, cache, compiles, world.device)
    if world.is_main:
        print(f"{decoder.described}; {why}", flush=True)
    if decoder.quantized:
        exact = InferenceEngine(pair.gpt, EXACT[world.device.type], device=world.device)
        change = compare(exact, decoder, _comparison(exact))
        if world.is_main:
            print(
                f"quality: against {exact.embedding.dtype}, a code's distribution moves by "
                f"{change['kl']:.5f} nats (KL); the likeliest code is the same for "
                f"{change['same_likeliest']:.1%}",
                flush=True,
            )
    precision = dtype_of(config.tokenizer_precision)
    fused = compiles and world.device.type == "cuda"
    return decoder, pair.vq.for_inference(world.device, precision, fused)


def _compiles(config: PipelineConfig, world: World, steps: int) -> tuple[bool, str]:
    """Whether to compile, and why."""
    if config.compile is not None:
        return config.compile, f"compile {config.compile}, as asked"
    if steps < COMPILE_FROM:
        return False, f"not compiled: {steps} steps are done before a compiler is"
    compilers = (os.environ.get("CXX", "c++"), "g++", "clang++")
    if world.device.type == "cpu" and not any(shutil.which(name) for name in compilers):
        return False, "not compiled: no C++ compiler found"
    if world.device.type == "mps":
        return False, "not compiled: on MPS this is not tried"
    return True, f"for {steps} steps"


def _comparison(decoder: InferenceEngine) -> GenerationRequest:
    """What is drawn to compare two decoders: a few images under classes, or no caption."""
    condition = decoder.cls_embedding.examples(COMPARED)
    return generation_request(decoder, condition, SamplingConfig())


def check_pair(gpt: GPT, vq: VQModel, tokenizer_sha256: str, name: str) -> None:
    """Raise InputError where the decoder was not trained on this tokenizer's codes."""
    if gpt.config.vocab_size != vq.config.vocab_size:
        raise InputError(
            f"{name}: a codebook of {vq.config.vocab_size}, but the decoder knows "
            f"{gpt.config.vocab_size} codes"
        )
    expected = gpt.config.tokenizer_sha256
    if expected and expected != tokenizer_sha256:
        raise InputError(
            f"{name}: its weights (sha256 {tokenizer_sha256[:12]}) are not those of the tokenizer "
            f"that the decoder was trained with ({expected[:12]})"
        )


@torch.no_grad()
def decode_pixels(vq: VQModel, codes: torch.Tensor, resize: int = 0) -> torch.Tensor:
    """Codes (n, h, w) int64 -> pixels (n, height, width, 3) uint8, on the tokenizer's device."""
    images = vq.decode(codes).float()
    if resize:
        images = F.interpolate(images, (resize, resize), mode="bicubic", antialias=False)
    return images_to_pixels(images)


class DecodeOverlap:
    """A second CUDA stream: what is drawn next is enqueued before the last codes are decoded.

    The decoder waits for memory and the tokenizer for arithmetic, so that side by side they take
    less time. On other devices everything stays in order.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def one_behind(
        self, drawn: Iterable[tuple[torch.Tensor, torch.Tensor]]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(ids, codes) as they come, each after the next one's work is enqueued."""
        if self.stream is None:
            yield from drawn
            return
        waiting = None
        for ids, codes in drawn:
            event = torch.cuda.Event()
            event.record()
            if waiting:
                yield self._ready(*waiting)
            waiting = ids, codes, event
        if waiting:
            yield self._ready(*waiting)

    def _ready(
        self, ids: torch.Tensor, codes: torch.Tensor, event: torch.cuda.Event
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.stream is not None
        self.stream.wait_event(event)
        codes.record_stream(self.stream)
        return ids, codes

    def working(self) -> contextlib.AbstractContextManager[Any]:
        """Within it, work goes to the second stream."""
        return torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext()
