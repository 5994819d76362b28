"""Rows of the ops' case table for the CPU's direct convolution, and what is true of them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from op_case import Case
from op_truth import F64, Band, two
from torch import Tensor

INF = math.inf


def direct_conv2d_truth(
    x: Tensor, weight: Tensor, bias=None, *, kernel_size=1, stride=1, low=-INF, high=INF, results=None
) -> Band:
    """The convolution in float64, with filters that are read out of the packed weight number by number."""
    kernel, channels = two(kernel_size), x.shape[1]
    count = weight.shape[0] * 32 if results is None else results
    filters = torch.zeros(count, channels, *kernel, dtype=F64)
    for k in range(count):
        for y in range(kernel[0]):
            for i in range(kernel[1]):
                first = (y * kernel[1] + i) * channels
                filters[k, :, y, i] = weight[k // 32, first : first + channels, k % 32].double()
    wide = x.double()

    def convolved(x, filters, bias):
        out = torch.zeros(len(x), count, *(
            (n - k) // s + 1 for n, k, s in zip(x.shape[2:], kernel, two(stride), strict=True)
        ), dtype=F64)  # fmt: skip
        if out.numel() and channels:
            out = F.conv2d(x, filters, None, stride)
        return out if bias is None else out + bias.view(-1, 1, 1)

    value = convolved(wide, filters, None if bias is None else bias.double())
    magnitude = convolved(wide.abs(), filters.abs(), None if bias is None else bias.double().abs())
    value = torch.where(value <= low, low, torch.where(value >= high, high, value))
    unit = torch.finfo(torch.float32).eps * (math.prod(kernel) * channels + 2)
    return Band(value, unit * magnitude + torch.finfo(torch.float32).smallest_normal)


def into_truth(truth):
    """The truth of the same op into a part of another tensor, which keeps its other channels."""

    def placed(out: Tensor, *tensors: Tensor, channel=0, **options) -> Band:
        band = truth(*tensors, **options)
        value, bound = out.double(), torch.zeros(out.shape, dtype=F64)
        where = slice(channel, channel + band.value.shape[1])
        value[:, where], bound[:, where] = band.value, band.bound
        return Band(value, bound)

    return placed


# Images, results, kernel and stride: pixels in one line and in rows, tails of both and of vectors of results.
GEOMETRIES = {
    "typical": ((2, 5, 9, 11), 40, (3, 2), (2, 1)),
    "1x1": ((3, 20, 7, 9), 70, 1, 1),
    "1x1-stride-2": ((2, 17, 8, 5), 16, 1, 2),
    "first-layer": ((1, 3, 23, 31), 33, 7, 2),
    "1-pixel": ((1, 4, 3, 3), 1, 3, 1),
    "1-channel": ((2, 1, 6, 5), 32, 2, 1),
    "53-wide": ((1, 2, 2, 53), 31, (2, 1), 1),
    "no-images": ((0, 4, 5, 5), 8, 3, 1),
    "no-channels": ((2, 0, 5, 5), 8, 3, 1),
}


def packed_shape(results: int, channels: int, kernel) -> tuple[int, int, int]:
    return -(-results // 32), math.prod(two(kernel)) * channels, 32


def _case(label: str, bias: bool, options, channel: int | None = None) -> Case:
    shape, results, kernel, stride = GEOMETRIES[label]
    height, width = ((n - k) // s + 1 for n, k, s in zip(shape[2:], two(kernel), two(stride), strict=True))

    def inputs(draw):
        given = draw(*shape), draw(*packed_shape(results, shape[1], kernel))
        if channel is not None:
            given = (draw(shape[0], results + channel + 2, height, width), *given)
        return (*given, draw(results)) if bias else given

    given = {"kernel_size": kernel, "stride": stride, "results": results, **options}
    if channel is not None:
        given["channel"] = channel
    return Case(
        "direct_conv2d" if channel is None else "direct_conv2d_", label, inputs,
        direct_conv2d_truth if channel is None else into_truth(direct_conv2d_truth), given,
        special=False, signed=False, dtypes=(torch.float32,), last="bias" if bias else None,
    )  # fmt: skip


DIRECT_CASES = [
    _case("typical", True, {"low": 0.0}),
    *(_case(label, i % 2 == 0, {}) for i, label in enumerate(list(GEOMETRIES)[1:])),
    _case("1x1", True, {"low": -1.0, "high": 1.0}),
    _case("typical", True, {"low": 0.0}, 3),
    _case("1x1", False, {"high": 0.5}, 0),
    _case("no-images", False, {}, 1),
]
