"""The linear layers of decoding: a few rows times a weight that is read once per code.

Their speed is that of reading the weight, so what matters is its size and its layout in memory.
"""

import itertools
import weakref
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from core.config import InputError

DecodePrecision = Literal["fp32", "bf16", "int8", "w8a8", "fp8"]
QUANTIZED = {"int8": torch.int8, "w8a8": torch.int8, "fp8": torch.float8_e4m3fn}


def pack(weight: torch.Tensor, dtype: torch.dtype, precision: str | None) -> nn.Module:
    """A weight (outputs, inputs) -> the module (..., inputs) -> (..., outputs) for its device.

    dtype: that of the activations, and of the weight where `precision` does not quantise it.
    """
    weight = weight.detach()
    if precision in QUANTIZED:
        on_cpu = weight.device.type == "cpu"
        if on_cpu and precision != "fp8" and torch.backends.mkldnn.is_available():
            return Int8Prepacked(weight, activation_bytes=1 if precision == "w8a8" else 2)
        if not on_cpu and precision != "w8a8":
            return WeightOnly(weight, dtype, QUANTIZED[precision])
        needs = {"int8": "a GPU, or a CPU with oneDNN", "w8a8": "a CPU with oneDNN", "fp8": "a GPU"}
        raise InputError(f"precision: {precision} needs {needs[precision]}")
    if weight.device.type == "cpu" and torch.backends.mkldnn.is_available():
        return Prepacked(weight.to(dtype))
    return Dense(weight.to(dtype))


class Dense(nn.Module):
    """As it is."""

    weight: torch.Tensor

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., inputs) -> (..., outputs)."""
        return F.linear(x, self.weight)


class Packed(nn.Module):
    """A weight in a layout of oneDNN, which no compiler may look into.

    Compiled code multiplies by it through an operator that takes its number, so that one graph
    serves all layers.
    """

    number: torch.Tensor
    packed: torch.Tensor

    def __init__(self, outputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.outputs, self.dtype = outputs, dtype
        number = next(_numbers)
        _packed[number] = self
        self.register_buffer("number", torch.tensor(number))

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """(..., inputs) -> (..., outputs) in self.dtype."""
        if torch.compiler.is_compiling():
            return _multiply(rows, self.number, self.outputs, self.dtype)
        return self.product(rows)

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """What `multiply` computes."""
        raise NotImplementedError


_numbers = itertools.count()
_packed: weakref.WeakValueDictionary[int, Packed] = weakref.WeakValueDictionary()


@torch.library.custom_op("llamagen::multiply", mutates_args=())
def _multiply(
    rows: torch.Tensor, number: torch.Tensor, outputs: int, dtype: torch.dtype
) -> torch.Tensor:
    return _packed[int(number)].product(rows)


@_multiply.register_fake
def _(rows: torch.Tensor, number: torch.Tensor, outputs: int, dtype: torch.dtype) -> torch.Tensor:
    return rows.new_empty((*rows.shape[:-1], outputs), dtype=dtype)


class Prepacked(Packed):
    """In blocks: at a few rows about twice as fast on CPUs."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__(len(weight), weight.dtype)
        # The layout for two rows is within the noise of the best one for any number of them.
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., inputs) -> (..., outputs)."""
        return self.multiply(x)

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """See Packed."""
        return torch.ops.mkldnn._linear_pointwise(rows, self.packed, None, "none", [], "")


def quantize(numbers: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers (..., n) -> codes in `dtype`, scales (...,) float32: numbers ~ codes scales."""
    limits = torch.iinfo(dtype) if dtype == torch.int8 else torch.finfo(dtype)
    numbers = numbers.float()
    scales = (numbers.abs().amax(dim=-1) / limits.max).clamp_(min=1e-12)
    codes = numbers / scales[..., None]
    return (codes.round() if dtype == torch.int8 else codes).to(dtype), scales


class WeightOnly(nn.Module):
    """Quantised per output channel, widened on the way into the product (fused when compiled)."""

    codes: torch.Tensor
    scales: torch.Tensor

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype, storage: torch.dtype) -> None:
        super().__init__()
        codes, scales = quantize(weight, storage)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales.to(dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., inputs) -> (..., outputs)."""
        return F.linear(x, self.codes.to(x.dtype)) * self.scales


class Int8Prepacked(Packed):
    """Int8 weights times activations of one or two bytes, in oneDNN's 8-bit product.

    With two, a row is s (high + low / 256), high and low in [-128, 127], s its own scale: two rows
    instead of one, while the weight, which takes the time at small batches, is read once; only the
    weight loses precision. With one, s high is all of it. Rows do not depend on one another.
    """

    def __init__(self, weight: torch.Tensor, activation_bytes: Literal[1, 2]) -> None:
        super().__init__(len(weight), torch.float32)
        self.activation_bytes = activation_bytes
        codes, self.scales = quantize(weight, torch.int8)
        self.zeros = torch.zeros(len(codes), dtype=torch.int64)
        self.packed = torch.ops.onednn.qlinear_prepack(codes.contiguous(), [4, codes.shape[1]])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., inputs) -> (..., outputs)."""
        rows = x.flatten(0, -2)
        scale = rows.abs().amax(dim=1, keepdim=True).float().clamp_min(1e-12) / 127
        # Each byte has its zero at 128; the rest makes truncation round.
        if self.activation_bytes == 1:
            product = self.multiply((rows * (1 / scale) + 128.5).to(torch.uint8))
        else:
            shifted = rows * (1 / scale) + (128.5 + 1 / 512)
            high = shifted.to(torch.uint8)
            low = ((shifted - high) * 256).to(torch.uint8)
            high, low = self.multiply(torch.cat([high, low])).chunk(2)
            product = torch.add(high, low, alpha=1 / 256)
        return (product * scale).to(x.dtype).view(*x.shape[:-1], -1)

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """See Packed."""
        return torch.ops.onednn.qlinear_pointwise(
            rows, 1.0, 128, self.packed, self.scales, self.zeros,
            None, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
