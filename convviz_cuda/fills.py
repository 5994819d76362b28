"""What stands in the place of occluded pixels."""

from __future__ import annotations

import numbers
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

FILLS = ("mean", "grey", "blur", "rise2018", "noise")
BLUR_KERNEL, BLUR_SIGMA = 11, 5.0  # RISE's

Fill = float | str | Sequence[float] | Tensor


def fill_values(images: Tensor, fill: Fill, seed: int = 0, first: int = 0) -> Tensor:
    """What an occluder shows, broadcasting to the images (B, C, H, W), in their dtype and on their device.

    A number; one number a channel; "mean": each image's mean colour; "grey": the middle of each channel's
    range in its image; "blur": the image under a Gaussian (11 pixels, sigma 5, borders reflected); "rise2018":
    under the kernel of RISE's authors, which is nearly flat (see :func:`rise_blur`); "noise": normal with
    each channel's mean and deviation, drawn for each image from a generator seeded with ``seed`` and its
    number, on the CPU and so the same on every device; or a tensor that broadcasts. ``first`` is the number of the
    first image, where they are a part of a batch.
    """
    count, channels, height, width = images.shape
    if isinstance(fill, Tensor):
        try:
            torch.broadcast_shapes(fill.shape, images.shape)
            fits = fill.expand(images.shape) is not None
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"fill must broadcast to the images' shape {tuple(images.shape)}, "
                f"but it has the shape {tuple(fill.shape)}."
            )
        value = fill.detach().to(images)
        return value.view((1,) * (4 - value.dim()) + tuple(value.shape))
    if isinstance(fill, str):
        if fill not in FILLS:
            raise ValueError(
                f"fill must be a number, a tensor or one of {', '.join(map(repr, FILLS))}, but it is {fill!r}."
            )
        wide = images.detach().float() if images.dtype in (torch.float16, torch.bfloat16) else images.detach()
        if fill == "mean":
            return wide.mean((2, 3), keepdim=True).to(images.dtype)
        if fill == "grey":
            return ((wide.amax((2, 3), keepdim=True) + wide.amin((2, 3), keepdim=True)) / 2).to(images.dtype)
        if fill == "blur":
            return gaussian_blur(wide, BLUR_SIGMA, BLUR_KERNEL).to(images.dtype)
        if fill == "rise2018":
            return rise_blur(wide).to(images.dtype)
        mean, deviation = wide.mean((2, 3), keepdim=True), wide.std((2, 3), keepdim=True, correction=0)
        noise = [
            torch.randn(
                1,
                channels,
                height,
                width,
                dtype=torch.float32,  # the default dtype would draw other numbers
                generator=torch.Generator().manual_seed(seed * 1_000_003 + first + item),
            )
            for item in range(count)
        ]
        return (mean + deviation * torch.cat(noise).to(wide)).to(images.dtype)
    if isinstance(fill, bool) or not isinstance(fill, numbers.Real | Sequence | np.ndarray):
        raise TypeError(
            f"fill must be a number, one number a channel, a name or a tensor, but it is a {type(fill).__name__}."
        )
    try:
        value = torch.as_tensor(fill, dtype=torch.float64)
    except (TypeError, ValueError):
        raise TypeError(f"fill must be one number or one number a channel, but it is {fill!r}.") from None
    if value.dim() > 1 or (value.dim() == 1 and len(value) not in (1, channels)):
        raise ValueError(f"fill must be one number or {channels} (one a channel), but it is {fill!r}.")
    return value.to(images.dtype).to(images.device).view(1, -1, 1, 1)


def gaussian_blur(images: Tensor, sigma: float, kernel: int) -> Tensor:
    """Images (N, C, H, W) under a normalised Gaussian of ``kernel`` pixels a side (odd), mirrored at the border
    without repeating the outermost pixel; where the image is too small for that, its outermost pixel goes on."""
    half = kernel // 2
    place = torch.arange(kernel, dtype=torch.float64) - half
    line = torch.exp(-(place**2) / (2 * sigma**2))
    mode = "reflect" if min(images.shape[2:]) > half else "replicate"
    return _separable(F.pad(images, (half, half, half, half), mode=mode), line / line.sum())


def rise_blur(images: Tensor) -> Tensor:
    """Images (N, C, H, W) under the blur that RISE's authors insert pixels over; beyond the border there are zeros.

    Its kernel is a point in the middle of 11 x 11 pixels under a Gaussian of sigma 5 that is cut off at 20 pixels, and
    what falls outside the 11 x 11 is reflected into them: centre and corner are as 1.14 to 1, not as 2.72 to 1.
    """
    half = BLUR_KERNEL // 2
    place = torch.arange(-int(4 * BLUR_SIGMA), int(4 * BLUR_SIGMA) + 1)
    weight = torch.exp(-(place.double() ** 2) / (2 * BLUR_SIGMA**2))
    # Each edge is a mirror that repeats the outermost pixel, so that places come again after twice the kernel.
    place = (half + place) % (2 * BLUR_KERNEL)
    place = torch.minimum(place, 2 * BLUR_KERNEL - 1 - place)
    line = torch.zeros(BLUR_KERNEL, dtype=torch.float64).index_add_(0, place, weight / weight.sum())
    return _separable(F.pad(images, (half, half, half, half)), line)


def _separable(padded: Tensor, line: Tensor) -> Tensor:
    channels, line = padded.shape[1], line.to(padded)
    across = F.conv2d(padded, line.view(1, 1, 1, -1).repeat(channels, 1, 1, 1), groups=channels)
    return F.conv2d(across, line.view(1, 1, -1, 1).repeat(channels, 1, 1, 1), groups=channels)
