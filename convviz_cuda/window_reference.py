"""The window ops in plain PyTorch: the specification that the kernels are tested against, and their fallback.

Indices of ``variants`` beyond a table count as its nearest row; what lies outside a map reads as padding, whatever
a patch has there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

INF = math.inf


def layout_of(*tensors: Tensor) -> torch.memory_format:
    """The layout of the first tensor that has only one: of a single pixel or channel, and of nothing, both hold."""
    for tensor in tensors:
        if tensor.numel():
            last = tensor.is_contiguous(memory_format=torch.channels_last)
            if last != tensor.is_contiguous():
                return torch.channels_last if last else torch.contiguous_format
            if not last:
                break
    return torch.contiguous_format


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def clamp(values: Tensor, low: float, high: float) -> Tensor:
    """Between the bounds, NaN stays NaN. A zero at a bound of zero takes the bound's sign."""
    bounds = [torch.full((), v, dtype=values.dtype, device=values.device) for v in (low, high)]
    return torch.where(values <= bounds[0], bounds[0], torch.where(values >= bounds[1], bounds[1], values))


def _activated(patch: Tensor, bias: Tensor | None, low: float, high: float) -> Tensor:
    """The patch behind its bias and activation, in the type that sums are kept in."""
    values = patch.to(accumulator(patch.dtype))
    if bias is not None:
        values = values + bias.to(values.dtype).view(1, -1, 1, 1)
    return clamp(values, low, high)


def _images(variants: Tensor, count: int) -> Tensor:
    return variants[:, 0].clamp(0, max(count - 1, 0))


def _entries(variants: Tensor, which: int, table: Tensor) -> tuple[Tensor, ...]:
    """Each variant's row of a table, column by column, [N, 1] each."""
    return table[variants[:, which].clamp(0, table.shape[0] - 1)].split(1, 1)


def _positions(origin: Tensor, count: int, size: int) -> Tensor:
    """[N, count] coordinates in a map; far outside is as good as just outside, and does not overflow."""
    return origin.clamp(-count, size) + torch.arange(count, device=origin.device)


def _inside(positions: Tensor, size: int) -> Tensor:
    return (positions >= 0) & (positions < size)


def _pick(source: Tensor, n: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """[N, h, w, C]: source[n, :, y, x], indices brought inside."""
    y, x = y.clamp(0, source.shape[2] - 1), x.clamp(0, source.shape[3] - 1)
    return source[n[:, None, None], :, y[:, :, None], x[:, None, :]]


def _read(
    base: Tensor, patch: Tensor, variants: Tensor, y: Tensor, x: Tensor, top: Tensor, left: Tensor, pad: float
) -> Tensor:
    """[N, h, w, C]: patch over base over padding, at rows y [N, h] and columns x [N, w] of the map."""
    (count, _, height, width), (ph, pw) = base.shape, patch.shape[2:]
    values = patch.new_full((y.shape[0], y.shape[1], x.shape[1], patch.shape[1]), pad)
    if 0 in (*values.shape, *base.shape):
        return values
    inside = (_inside(y, height)[:, :, None] & _inside(x, width)[:, None, :])[..., None]
    old = _pick(base, _images(variants, count), y, x)
    if ph and pw:
        rows, columns = y - top.clamp(-ph, height), x - left.clamp(-pw, width)
        over = (_inside(rows, ph)[:, :, None] & _inside(columns, pw)[:, None, :])[..., None]
        each = torch.arange(patch.shape[0], device=patch.device)
        old = torch.where(over, _pick(patch, each, rows, columns), old.to(patch.dtype))
    return torch.where(inside, old.to(values.dtype), values)


def _images_first(values: Tensor, dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    return values.to(dtype).permute(0, 3, 1, 2).contiguous(memory_format=layout)


@torch.no_grad()
def occlude(
    images: Tensor, fill: Tensor, variants: Tensor, rows: Tensor, cols: Tensor, size: Sequence[int]
) -> Tensor:
    h, w = size
    height, width = images.shape[2:]
    out = images.new_zeros((variants.shape[0], images.shape[1], h, w))
    if 0 in (*out.shape, *images.shape):
        return out.contiguous(memory_format=layout_of(images))
    top, bottom, left, right = (
        v for i, table in ((1, rows), (2, cols)) for v in _entries(variants, i, table)[1:]
    )
    y = _positions(_entries(variants, 1, rows)[0], h, height)
    x = _positions(_entries(variants, 2, cols)[0], w, width)
    each = _images(variants, images.shape[0])
    covered = ((y >= top) & (y < bottom))[:, :, None] & ((x >= left) & (x < right))[:, None, :]
    values = torch.where(
        covered[..., None], _pick(fill.expand(images.shape), each, y, x), _pick(images, each, y, x)
    )
    inside = _inside(y, height)[:, :, None] & _inside(x, width)[:, None, :]
    values = torch.where(inside[..., None], values, torch.zeros((), dtype=values.dtype, device=values.device))
    return _images_first(values, images.dtype, layout_of(images))


@torch.no_grad()
def gather_windows(
    base: Tensor,
    patch: Tensor,
    variants: Tensor,
    rows: Tensor,
    cols: Tensor,
    size: Sequence[int],
    pad: float = 0.0,
    bias: Tensor | None = None,
    low: float = -INF,
    high: float = INF,
) -> Tensor:
    layout = layout_of(patch, base)
    if variants.shape[0] == 0:
        return patch.new_empty((0, patch.shape[1], *size)).contiguous(memory_format=layout)
    (y, top), (x, left) = _entries(variants, 1, rows), _entries(variants, 2, cols)
    y, x = _positions(y, size[0], base.shape[2]), _positions(x, size[1], base.shape[3])
    values = _read(base, _activated(patch, bias, low, high), variants, y, x, top, left, pad)
    return _images_first(values, patch.dtype, layout)


@torch.no_grad()
def gather_windows_(
    out: Tensor,
    base: Tensor,
    patch: Tensor,
    variants: Tensor,
    rows: Tensor,
    cols: Tensor,
    channel: int,
    pad: float = 0.0,
    bias: Tensor | None = None,
    low: float = -INF,
    high: float = INF,
) -> None:
    values = gather_windows(base, patch, variants, rows, cols, out.shape[2:], pad, bias, low, high)
    out[:, channel : channel + patch.shape[1]] = values


@torch.no_grad()
def add_windows_(
    out: Tensor,
    base: Tensor,
    patch: Tensor,
    variants: Tensor,
    rows: Tensor,
    cols: Tensor,
    low: float = -INF,
    high: float = INF,
) -> None:
    values = gather_windows(base, patch, variants, rows, cols, out.shape[2:])
    kept = accumulator(out.dtype)
    out.copy_(clamp(out.to(kept) + values.to(kept), low, high))


def _taps(origin: Tensor, count: int, size: int, kernel: int, stride: int, padding: int, dilation: int):
    """[N, count * kernel]: the position in the map of each tap of each window; [N, count]: of its first."""
    span = (kernel - 1) * dilation
    windows = origin.clamp(-(count + span // stride + 1), size + padding)
    first = (windows + torch.arange(count, device=origin.device)) * stride - padding
    taps = first[:, :, None] + torch.arange(kernel, device=origin.device) * dilation
    return taps.flatten(1), first


@torch.no_grad()
def pool_windows(
    base: Tensor,
    patch: Tensor,
    variants: Tensor,
    rows: Tensor,
    cols: Tensor,
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    average: bool,
    count_include_pad: bool,
    divisor_override: int | None,
    bias: Tensor | None = None,
    low: float = -INF,
    high: float = INF,
) -> Tensor:
    layout = layout_of(patch, base)
    shape = (variants.shape[0], patch.shape[1], *size)
    if 0 in (*shape, *base.shape):
        return patch.new_full(shape, 0.0 if average else -INF).contiguous(memory_format=layout)
    (y, top), (x, left) = _entries(variants, 1, rows), _entries(variants, 2, cols)
    y, first_y = _taps(y, size[0], base.shape[2], kernel[0], stride[0], padding[0], dilation[0])
    x, first_x = _taps(x, size[1], base.shape[3], kernel[1], stride[1], padding[1], dilation[1])
    values = _read(
        base, _activated(patch, bias, low, high), variants, y, x, top, left, 0.0 if average else -INF
    )
    values = values.view(shape[0], size[0], kernel[0], size[1], kernel[1], shape[1])
    if not average:
        return _images_first(values.amax((2, 4)), patch.dtype, layout)
    divisors = []
    for i, first in enumerate((first_y, first_x)):
        end = (first + kernel[i]).clamp(max=base.shape[2 + i] + padding[i])
        inside = end.clamp(max=base.shape[2 + i]) - first.clamp(min=0)
        # A window without an element of the map is 0 whatever its divisor.
        divisors.append(torch.where(inside > 0, end - first if count_include_pad else inside, 1))
    divisor = (divisors[0][:, :, None] * divisors[1][:, None, :])[..., None]
    if divisor_override is not None:
        divisor = torch.full_like(divisor, divisor_override)
    return _images_first(values.sum((2, 4)) / divisor.to(values.dtype), patch.dtype, layout)


@torch.no_grad()
def sum_windows(
    base: Tensor,
    patch: Tensor,
    variants: Tensor,
    rows: Tensor,
    cols: Tensor,
    bias: Tensor | None = None,
    low: float = -INF,
    high: float = INF,
) -> Tensor:
    if 0 in (*patch.shape, *base.shape):
        return patch.new_zeros(patch.shape[:2], dtype=accumulator(patch.dtype))
    (_, _, height, width), (ph, pw) = base.shape, patch.shape[2:]
    y = _positions(_entries(variants, 1, rows)[0], ph, height)
    x = _positions(_entries(variants, 2, cols)[0], pw, width)
    new = _activated(patch, bias, low, high).permute(0, 2, 3, 1)
    change = new - _pick(base, _images(variants, base.shape[0]), y, x).to(new.dtype)
    inside = (_inside(y, height)[:, :, None] & _inside(x, width)[:, None, :])[..., None]
    change = torch.where(inside, change, torch.zeros((), dtype=change.dtype, device=change.device))
    return change.sum((1, 2))


def _covering(size: int, windows: int, window: int, stride: int, device: torch.device) -> Tensor:
    """[size, windows] float64: 1 where the window covers the position."""
    start = torch.arange(windows, device=device) * stride
    position = torch.arange(size, device=device)[:, None]
    return ((position >= start) & (position < start + window)).double()


@torch.no_grad()
def window_mean(scores: Tensor, size: Sequence[int], window: Sequence[int], stride: Sequence[int]) -> Tensor:
    out = scores.new_zeros((scores.shape[0], *size))
    by_row, by_column = (
        _covering(size[i], scores.shape[1 + i], window[i], stride[i], scores.device) for i in (0, 1)
    )
    # Row by row, because in a product with all windows one NaN would reach every pixel.
    rows, columns = by_row.bool(), by_column.bool()
    for y in range(size[0]):
        if scores.shape[0] and rows[y].any():
            summed = scores[:, rows[y]].double().sum(1)
            spread = torch.where(columns, summed[:, None], 0.0).sum(2)
            count = (by_row[y].sum() * by_column.sum(1)).clamp(min=1)
            out[:, y] = (spread / count).to(out.dtype)
    return out
