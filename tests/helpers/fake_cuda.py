"""A CUDA device that does not exist: shapes, dtypes and devices are computed, values are not.

Under PyTorch's FakeTensorMode, a read of a value by the host (`.item()`, `bool(tensor)`) and an
operation on tensors of two devices raise. No driver is needed, as long as nothing asks for a
stream, a CUDA graph or a backward pass (the autograd engine opens the device).
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

CUDA = torch.device("cuda", 0)


# Part of the message of an operation on two devices, in newer and in older releases of torch.
MIXED_DEVICES = "on the same device|two different devices"
HOST_READ = "_local_scalar_dense"  # the operation behind .item(), int(), bool()


@contextlib.contextmanager
def fake_tensors(capability: tuple[int, int] = (9, 0)) -> Iterator[None]:
    """Every tensor made within is fake; a real one that takes part becomes a fake one.

    capability: What the card says that it is; (9, 0) is an H100.
    """
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch("torch.cuda.get_device_capability", lambda device=None: capability),
        mock.patch("torch.cuda.is_bf16_supported", lambda: True),
        # Without a driver, autocast would switch itself off.
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
    ):
        yield


def to_fake(module: nn.Module, device: torch.device = CUDA) -> nn.Module:
    """Give a module (real or meta) fake parameters and buffers on `device`, in place."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                fake = torch.empty(value.shape, dtype=value.dtype, device=device)
                part._parameters[name] = nn.Parameter(fake, value.requires_grad)
        for name, value in part._buffers.items():
            if value is not None:
                part._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device=device)
    return module
