"""PSNR and SSIM of reconstructed pixels."""

import torch
from torch.nn import functional as F

_SIGMA, SSIM_WINDOW = 1.5, 11  # the usual Gaussian window (Wang et al. 2004)
_UNIFORM_WINDOW = 7


def psnr(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of pixels (n, h, w, 3) uint8 -> (n,) float64, in dB.

    Capped at 100 dB, so that means stay finite when images are equal.
    """
    error = (real.double() - fake.double()).square().mean((1, 2, 3))
    return (10 * torch.log10(255**2 / error)).clamp(max=100.0)


def ssim(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Structural similarity of pixels (n, h, w, 3) uint8 -> (n,) float64.

    The usual definition (Wang et al. 2004): Gaussian window of 11 with sigma 1.5, population
    moments, data range 255, mean over channels and all positions where the window fits.
    """
    offsets = torch.arange(SSIM_WINDOW, dtype=torch.float64, device=real.device) - SSIM_WINDOW // 2
    taps = torch.exp(-(offsets**2) / (2 * _SIGMA**2))
    return _ssim(real.double(), fake.double(), taps / taps.sum(), data_range=255.0, bias=1.0)


def ssim_reference_inflated(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """The SSIM of the published code: pixels in [0, 1] with data range 2, which inflates it.

    Uniform window of 7 and sample moments, the defaults of scikit-image. Use it only to compare
    with numbers of that code. Pixels (n, h, w, 3) uint8 -> (n,) float64.
    """
    taps = torch.full((_UNIFORM_WINDOW,), 1 / _UNIFORM_WINDOW, dtype=torch.float64)
    count = _UNIFORM_WINDOW**2
    x, y = real.double() / 255, fake.double() / 255
    return _ssim(x, y, taps.to(real.device), data_range=2.0, bias=count / (count - 1))


def _ssim(
    real: torch.Tensor, fake: torch.Tensor, taps: torch.Tensor, data_range: float, bias: float
) -> torch.Tensor:
    x, y = real.movedim(-1, 1), fake.movedim(-1, 1)
    mean_x, mean_y = _blur(x, taps), _blur(y, taps)
    variance_x = bias * (_blur(x * x, taps) - mean_x**2)
    variance_y = bias * (_blur(y * y, taps) - mean_y**2)
    covariance = bias * (_blur(x * y, taps) - mean_x * mean_y)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    top = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    bottom = (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    return (top / bottom).mean((1, 2, 3))


def _blur(x: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    """Apply a separable window to (n, 3, h, w), without padding."""
    channels = x.shape[1]
    column = taps.view(1, 1, -1, 1).expand(channels, 1, -1, 1)
    row = taps.view(1, 1, 1, -1).expand(channels, 1, 1, -1)
    return F.conv2d(F.conv2d(x, column, groups=channels), row, groups=channels)
