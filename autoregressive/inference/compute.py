"""Device, precision and compilation: from ComputeConfig to an engine that is ready to sample."""

import os
import shutil
from dataclasses import dataclass
from typing import Any, Literal

import torch

from autoregressive.inference.engine import InferenceEngine
from autoregressive.inference.generate import generation_request
from autoregressive.inference.precision_check import compare
from autoregressive.inference.quantized_linear import DecodePrecision
from autoregressive.inference.sampling_config import SamplingConfig
from autoregressive.models.gpt import GPT
from core.distributed.world import DeviceName, Precision

# Generation steps from which compilation (10 to 40 seconds) pays off. Measured on CPUs, where it
# saves a sixth (bf16) to a quarter (int8) of a step; not measured on GPUs.
COMPILE_FROM = 5000
# The precision that a quantised engine is compared with, by device type.
EXACT: dict[str, DecodePrecision] = {"cpu": "fp32", "cuda": "bf16", "mps": "fp32"}
COMPARED = 8  # images in that comparison


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """Device and precision of sampling.

    Args:
        precision: fp32 or bf16 for the transformer. Quantised weights: int8 (all devices) or fp8
            (GPUs). w8a8 (CPUs) quantises activations too, which is faster for larger batches. The
            effect of quantisation on the distribution is measured and printed first.
        cache_precision: int8 or fp8 for the key-value cache, half the memory of bf16; null for
            the transformer's dtype. Measured and printed in the same way.
        tokenizer_precision: fp32 or bf16 for the VQ decoder; bf16 is faster and changes pixels by
            one or two levels of 255.
        compile: torch.compile the transformer, and on CUDA the VQ decoder. null: compile for 5,000
            generation steps or more (one step is one token of a batch) if there is a compiler.
        device: auto, cpu, cuda or mps.
    """

    precision: DecodePrecision = "bf16"
    cache_precision: Literal["int8", "fp8"] | None = None
    tokenizer_precision: Precision = "fp32"
    compile: bool | None = None
    device: DeviceName = "auto"

    def arguments(self) -> dict[str, Any]:
        """The arguments of ImagePipeline.prepare, except the device: each rank has its own."""
        return {
            "precision": self.precision,
            "cache_precision": self.cache_precision,
            "tokenizer_precision": self.tokenizer_precision,
            "compile": self.compile,
        }

    @property
    def settings(self) -> dict[str, Any]:
        """What the images depend on; keys and values of settings.json stay those of older runs."""
        cache = self.cache_precision or "model"
        return {"precision": [self.precision, cache, self.tokenizer_precision]}


def build_engine(
    gpt: GPT,
    precision: DecodePrecision,
    cache_precision: Literal["int8", "fp8"] | None,
    device: torch.device,
    compile: bool | None,
    num_steps: int | None,
    verbose: bool,
) -> InferenceEngine:
    """An engine on the device; prints how it computes and what quantisation changes.

    num_steps: generation steps to come, which decides if `compile` is None.
    Raises InputError for a precision that the device does not support.
    """
    compile, why = _compile_or_not(compile, device, num_steps)
    engine = InferenceEngine(gpt, precision, cache_precision, compile, device)
    if verbose:
        print(f"{engine.described}; {why}", flush=True)
    if engine.quantized and verbose:
        exact = InferenceEngine(gpt, EXACT[device.type], device=device)
        examples = exact.cls_embedding.examples(COMPARED)
        request = generation_request(exact, examples, SamplingConfig())
        change = compare(exact, engine, request)
        print(
            f"precision check: compared with {exact.embedding.dtype}, the distribution of a code "
            f"changes by {change['kl']:.5f} nats (KL); the most likely code is the same for "
            f"{change['same_likeliest']:.1%}",
            flush=True,
        )
    return engine


def _compile_or_not(
    compile: bool | None, device: torch.device, num_steps: int | None
) -> tuple[bool, str]:
    """Whether to compile, and why."""
    if compile is not None:
        return compile, f"compile is {compile}, as requested"
    if num_steps is None:
        return False, "not compiled: compile=True pays off for many images"
    if num_steps < COMPILE_FROM:
        return False, f"not compiled: {num_steps} steps take less time than compilation"
    compilers = (os.environ.get("CXX", "c++"), "g++", "clang++")
    if device.type == "cpu" and not any(shutil.which(name) for name in compilers):
        return False, "not compiled: no C++ compiler found"
    if device.type == "mps":
        return False, "not compiled: not tested on MPS"
    return True, f"compiled for {num_steps} steps"
