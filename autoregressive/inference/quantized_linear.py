"""The linear layers of the inference engine: a few rows times a weight matrix.

At small batches their time is the time to read the weights from memory, so what matters is the
size of a weight and its memory layout.
"""

import itertools
import weakref
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from autoregressive.inference.sampling_config import DecodePrecision
from core.config import InputError

QUANTIZED: dict[DecodePrecision, torch.dtype] = {
    "int8": torch.int8,
    "w8a8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}


def pack(weight: torch.Tensor, dtype: torch.dtype, precision: str | None) -> nn.Module:
    """The linear layer without bias of a weight (outputs, inputs), on the weight's device.

    dtype: dtype of the activations, and of the weight if `precision` does not quantise it.
    Raises InputError for a precision that the device does not support.
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
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    return linear


class Packed(nn.Module):
    """Base class for weights in an opaque memory layout of oneDNN.

    torch.compile cannot trace such a tensor. Compiled code instead calls a custom operator with
    the layer's number as a tensor, so that all layers share one compiled graph.
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
        """The matrix product of `multiply`, eagerly."""
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
    """Weights in oneDNN's blocked layout: about twice as fast on CPUs for a few rows."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__(len(weight), weight.dtype)
        # The layout made for two rows is as fast as the best one for any number of rows, within
        # the noise.
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., inputs) -> (..., outputs)."""
        return self.multiply(x)

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """See Packed."""
        return torch.ops.mkldnn._linear_pointwise(rows, self.packed, None, "none", [], "")


def quantize(numbers: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric quantisation along the last axis: numbers (..., n) ~ codes * scales[..., None].

    Returns codes (..., n) in `dtype` (int8 or an 8-bit float) and scales (...,) float32.
    """
    limits = torch.iinfo(dtype) if dtype == torch.int8 else torch.finfo(dtype)
    numbers = numbers.float()
    scales = (numbers.abs().amax(dim=-1) / limits.max).clamp_(min=1e-12)
    codes = numbers / scales[..., None]
    return (codes.round() if dtype == torch.int8 else codes).to(dtype), scales


class WeightOnly(nn.Module):
    """8-bit weights with a scale per output channel, converted to the activations' dtype.

    A compiler fuses the conversion into the product.
    """

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
    """Int8 weights times activations of one or two bytes, with oneDNN's 8-bit matrix product.

    Each row of activations has its own scale s, so rows do not depend on each other. With two
    bytes, a row is s * (high + low / 256), high and low in [-128, 127]: the product has two rows
    instead of one, but reads the weight, which takes the time at small batches, only once; only
    the weights lose precision. With one byte, a row is s * high.
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
        # 128 is the zero point of each byte; the added half step makes truncation round.
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
