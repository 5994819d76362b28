"""Convolutions as they are defined, without padding, for the CPU in float32: what Winograd's way does not serve.

Kernels of one pixel, strides, and few channels, for which a library's convolution changes layouts or leaves vectors
half empty. In channels_last the taps of a row of the kernel follow each other, so all of these are one loop: sums of a
few pixels and results stay in registers while the taps pass (csrc/kernels/direct_conv_cpu.cpp). Weights are packed for
it once (:func:`direct_packed`). Other devices and dtypes have their library's convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._register import define, looped
from .checks import Pair, check_float, check_images, pair
from .window_checks import same_kind
from .window_ops import change
from .window_reference import clamp
from .winograd import BLOCK, as_channels_last, check_place, checked_results

__all__ = ["direct_conv2d", "direct_conv2d_", "direct_packed"]


def result_size(x: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> tuple[int, int]:
    """Height and width of the convolution's result."""
    height, width = ((n - k) // s + 1 for n, k, s in zip(x.shape[2:], kernel, stride, strict=True))
    return height, width


@torch.no_grad()
def _conv_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    results: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    low: float,
    high: float,
) -> Tensor:
    if not x.numel():  # PyTorch convolves nothing of some shapes only
        size = x.shape[0], results, *result_size(x, kernel, stride)
        out = x.new_zeros(size) if bias is None else bias.view(-1, 1, 1).expand(size)
    else:
        filters = weight.transpose(1, 2).flatten(0, 1)[:results].view(results, *kernel, x.shape[1])
        out = F.conv2d(x, filters.permute(0, 3, 1, 2), bias, stride)
    return clamp(out, low, high).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def _conv_into_reference(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    results: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    channel: int,
    low: float,
    high: float,
) -> None:
    found = _conv_reference(x, weight, bias, results, kernel, stride, low, high)
    out[:, channel : channel + results] = found


REFERENCES = {"direct_conv2d": _conv_reference, "direct_conv2d_": _conv_into_reference}
_ARGUMENTS = "Tensor x, Tensor weight, Tensor? bias, SymInt results, SymInt[] kernel, SymInt[] stride"

direct_conv2d_op = define(
    "direct_conv2d",
    f"({_ARGUMENTS}, float low, float high) -> Tensor",
    _conv_reference,
    lambda x, weight, bias, results, kernel, stride, *_: x.new_empty(
        x.shape[0], *result_size(x, kernel, stride), results
    ).permute(0, 3, 1, 2),
    vmap=looped("direct_conv2d"),
    differentiable=False,
)
direct_conv2d_inplace_op = define(
    "direct_conv2d_",
    f"(Tensor(a!) out, {_ARGUMENTS}, SymInt channel, float low, float high) -> ()",
    _conv_into_reference,
    lambda *_: None,
    differentiable=False,
)


@torch.no_grad()
def direct_packed(weight: Tensor) -> Tensor:
    """Weights (Co, Ci, kh, kw), float32 on the CPU, as the kernel reads them: (ceil(Co / 32), kh * kw * Ci, 32).

    What is beyond Co is 0.
    """
    check_images("weight", weight)
    if weight.dtype != torch.float32 or weight.device.type not in ("cpu", "meta"):
        raise TypeError(f"weight must be float32 on the CPU, but it is {weight.dtype} on {weight.device}.")
    taps = weight.detach().permute(0, 2, 3, 1).flatten(1)
    whole = F.pad(taps, (0, 0, 0, -len(taps) % BLOCK))
    return whole.unflatten(0, (-1, BLOCK)).transpose(1, 2).contiguous()


def _checked(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernel_size: Pair,
    stride: Pair,
    low: float,
    high: float,
    results: int | None,
) -> tuple[Tensor, Tensor, Tensor | None, int, list[int], list[int]]:
    """What the ops take, but for the bounds."""
    check_images("x", x)
    check_float("weight", weight)
    same_kind("weight", weight, "x", x)
    if x.dtype != torch.float32 or x.device.type not in ("cpu", "meta"):
        raise TypeError(f"x must be float32 on the CPU, but it is {x.dtype} on {x.device}.")
    kernel, steps = pair("kernel_size", kernel_size, 1), pair("stride", stride, 1)
    if any(n < k for n, k in zip(x.shape[2:], kernel, strict=True)):
        raise ValueError(
            f"x must be as large as the kernel, but its shape is {tuple(x.shape)} and kernel_size {kernel_size!r}."
        )
    taps = math.prod(kernel) * x.shape[1]
    if weight.dim() != 3 or tuple(weight.shape[1:]) != (taps, BLOCK):
        raise ValueError(
            f"weight must be (blocks, {taps}, {BLOCK}), as direct_packed makes it for {x.shape[1]} channels and the "
            f"kernel_size {kernel_size!r}, but its shape is {tuple(weight.shape)}."
        )
    count, bias = checked_results(x, weight, weight.shape[0] * BLOCK, True, results, bias, low, high)
    return as_channels_last(x), weight.contiguous(), bias, count, kernel, steps


@torch.no_grad()
def direct_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    kernel_size: Pair = 1,
    stride: Pair = 1,
    low: float = -math.inf,
    high: float = math.inf,
    results: int | None = None,
) -> Tensor:
    """A convolution without padding, then a clamp: (N, Ci, H, W) -> (N, Co, h, w), channels_last.

    Float32 on the CPU. The sums are a direct convolution's, in the order of the kernel's rows, columns and channels.

    Args:
        x: (N, Ci, H, W), at least as large as the kernel.
        weight: :func:`direct_packed`'s.
        bias: (Co,), added before the result is clamped to low and high (NaN stays NaN).
        kernel_size, stride: ints or (vertical, horizontal), at least 1.
        results: Co; None: all of the weight's blocks.

    Raises:
        TypeError, ValueError: the arguments do not fit together.
    """
    given = _checked(x, weight, bias, kernel_size, stride, low, high, results)
    return direct_conv2d_op(*given, low, high)


def direct_conv2d_(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    kernel_size: Pair = 1,
    stride: Pair = 1,
    channel: int = 0,
    low: float = -math.inf,
    high: float = math.inf,
    results: int | None = None,
) -> None:
    """:func:`direct_conv2d` into ``out[:, channel : channel + Co]``, ``out`` being (N, channels, h, w).

    How branches that are concatenated are computed in their place: directly where ``out`` is channels_last. It must not
    share memory with the rest.
    """
    given = _checked(x, weight, bias, kernel_size, stride, low, high, results)
    check_place(out, x, channel, given[3], result_size(x, *given[4:]))
    with torch.no_grad():
        if as_channels_last(out) is out:
            change(direct_conv2d_inplace_op, out, *given, channel, low, high)
        else:
            out[:, channel : channel + given[3]] = direct_conv2d_op(*given, low, high)
