"""Device, precision and compilation: from ComputeConfig to an engine that is ready to sample."""

import os
import shutil
from typing import Literal

import torch

from autoregressive.inference.engine import InferenceEngine
from autoregressive.inference.generate import generation_request
from autoregressive.inference.precision_check import compare
from autoregressive.inference.sampling_config import DecodePrecision, SamplingConfig
from autoregressive.models.gpt import GPT

# Generation steps from which compilation (10 to 40 seconds) pays off. Measured on CPUs, where it
# saves a sixth (bf16) to a quarter (int8) of a step; not measured on GPUs.
COMPILE_FROM = 5000
# The precision that a quantised engine is compared with, by device type.
EXACT: dict[str, DecodePrecision] = {"cpu": "fp32", "cuda": "bf16", "mps": "fp32"}
COMPARED = 8  # images in that comparison


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
