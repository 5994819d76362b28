"""The truth about the window ops: position by position, from what each variant's whole map looks like."""

from __future__ import annotations

import numpy as np
import torch
from op_truth import F32, F64, Band, two
from torch import Tensor

INF = float("inf")


def kept(x: Tensor):
    """The type that sums are kept in."""
    return np.float64 if x.dtype == F64 else np.float32


def activated(x: np.ndarray, bias, low: float, high: float) -> np.ndarray:
    """[C] numbers behind their bias and bounds."""
    with np.errstate(all="ignore"):
        x = x if bias is None else x + bias
    low, high = x.dtype.type(low), x.dtype.type(high)
    return np.where(x <= low, low, np.where(x >= high, high, x))


class Maps:
    """The maps that base and patch describe, read at one position of one variant at a time."""

    def __init__(self, base, patch, variants, rows, cols, bias=None, low=-INF, high=INF):
        acc = kept(patch)
        self.base, self.patch = (x.double().numpy().astype(acc) for x in (base, patch))
        self.bias = None if bias is None else bias.double().numpy().astype(acc)
        self.bounds, self.variants, self.tables = (
            (low, high),
            variants.tolist(),
            (rows.tolist(), cols.tolist()),
        )

    def entry(self, n: int):
        """The image, and the table entries of both axes; of what is beyond a table, the nearest."""

        def nearest(index, count):
            return min(max(index, 0), count - 1)

        image, *places = self.variants[n]
        entries = [t[nearest(place, len(t))] for place, t in zip(places, self.tables, strict=True)]
        return nearest(image, len(self.base)), *entries

    def inside(self, y: int, x: int) -> bool:
        return 0 <= y < self.base.shape[2] and 0 <= x < self.base.shape[3]

    def old(self, n: int, y: int, x: int) -> np.ndarray:
        return self.base[self.entry(n)[0], :, y, x]

    def at(self, n: int, y: int, x: int) -> np.ndarray | None:
        """[C] numbers, or None outside of the map. A table's last column is the patch's start."""
        if not self.inside(y, x):
            return None
        _, row, col = self.entry(n)
        i, j = y - row[-1], x - col[-1]
        if 0 <= i < self.patch.shape[2] and 0 <= j < self.patch.shape[3]:
            return activated(self.patch[n, :, i, j], self.bias, *self.bounds)
        return self.old(n, y, x)


def gather_truth(
    base, patch, variants, rows, cols, bias=None, *, size, pad=0.0, low=-INF, high=INF
) -> Tensor:
    maps = Maps(base, patch, variants, rows, cols, bias, low, high)
    out = np.full((*patch.shape[:2], *size), pad, dtype=kept(patch))
    for n, y, x in np.ndindex(len(out), *size):
        _, row, col = maps.entry(n)
        value = maps.at(n, row[0] + y, col[0] + x)
        if value is not None:
            out[n, :, y, x] = value
    return torch.from_numpy(out).to(patch.dtype).double()


def gather_into_truth(out, base, patch, variants, rows, cols, bias=None, *, channel=0, **options) -> Tensor:
    expected = out.double().clone()
    values = gather_truth(base, patch, variants, rows, cols, bias, size=out.shape[2:], **options)
    expected[:, channel : channel + patch.shape[1]] = values
    return expected


def add_truth(out, base, patch, variants, rows, cols, *, low=-INF, high=INF) -> Tensor:
    added = gather_truth(base, patch, variants, rows, cols, size=out.shape[2:])
    acc = kept(out)
    with np.errstate(all="ignore"):
        total = out.double().numpy().astype(acc) + added.numpy().astype(acc)
    return torch.from_numpy(activated(total, None, low, high)).to(out.dtype).double()


def occlude_truth(images, fill, variants, rows, cols, *, size) -> Tensor:
    maps = Maps(images, images[:0], variants, rows, cols)
    fill = fill.double().numpy()
    out = np.zeros((len(variants), images.shape[1], *size))
    for n, c, y, x in np.ndindex(*out.shape):
        image, (top_row, top, bottom), (first_col, left, right) = maps.entry(n)
        place = top_row + y, first_col + x
        if not maps.inside(*place):
            continue
        if top <= place[0] < bottom and left <= place[1] < right:
            index = (image, c, *place)[4 - fill.ndim :]
            out[n, c, y, x] = fill[
                tuple(i if count > 1 else 0 for i, count in zip(index, fill.shape, strict=True))
            ]
        else:
            out[n, c, y, x] = images[(image, c, *place)].double()
    return torch.from_numpy(out)


def banded(value: np.ndarray, magnitude: np.ndarray, terms: int, dtype: torch.dtype) -> Band:
    """In any order, a sum of n numbers is off by at most n * eps of their magnitudes; then it is stored."""
    unit = torch.finfo(F64 if dtype == F64 else F32).eps
    value, magnitude = torch.from_numpy(value), torch.from_numpy(magnitude)
    stored = torch.finfo(dtype).eps * value.abs() + torch.finfo(dtype).smallest_normal
    return Band(value, (terms + 2) * unit * magnitude + stored)


def window_pool_truth(
    base,
    patch,
    variants,
    rows,
    cols,
    bias=None,
    *,
    size,
    kernel_size,
    stride=None,
    padding=0,
    dilation=1,
    average=False,
    count_include_pad=True,
    divisor_override=None,
    low=-INF,
    high=INF,
):
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = map(two, (kernel_size, stride or kernel_size, padding, dilation))
    maps = Maps(base, patch, variants, rows, cols, bias, low, high)
    out = np.full((*patch.shape[:2], *size), 0.0 if average else -INF)
    magnitude = np.zeros_like(out)
    height, width = base.shape[2:]
    for n, oy, ox in np.ndindex(len(out), *size):
        _, row, col = maps.entry(n)
        top, left = (row[0] + oy) * sh - ph, (col[0] + ox) * sw - pw
        places = [(top + i * dh, left + j * dw) for i in range(kh) for j in range(kw)]
        values = [maps.at(n, *place).astype(float) for place in places if maps.inside(*place)]
        if not values:
            continue
        if not average:
            out[n, :, oy, ox] = np.max(values, 0)  # which lets NaN win
            continue
        padded = [(y, x) for y, x in places if y < height + ph and x < width + pw]
        divisor = divisor_override or len(padded if count_include_pad else values)
        with np.errstate(all="ignore"):
            out[n, :, oy, ox] = np.sum(values, 0) / divisor
            magnitude[n, :, oy, ox] = np.sum(np.abs(values), 0) / abs(divisor)
    if average:
        return banded(out, magnitude, kh * kw, patch.dtype)
    return torch.from_numpy(out).to(patch.dtype).double()


def window_sum_truth(base, patch, variants, rows, cols, bias=None, *, low=-INF, high=INF) -> Band:
    maps = Maps(base, patch, variants, rows, cols, bias, low, high)
    out = np.zeros(patch.shape[:2])
    magnitude = np.zeros_like(out)
    for n, i, j in np.ndindex(len(out), *patch.shape[2:]):
        _, (top,), (left,) = maps.entry(n)
        place = top + i, left + j
        if maps.inside(*place):
            new, old = maps.at(n, *place).astype(float), maps.old(n, *place).astype(float)
            with np.errstate(all="ignore"):
                out[n] += new - old
                magnitude[n] += np.abs(new) + np.abs(old)
    return banded(out, magnitude, patch[0].numel() if len(patch) else 0, F64 if patch.dtype == F64 else F32)


def window_mean_truth(scores, *, size, window, stride) -> Band:
    (wh, ww), (sh, sw) = two(window), two(stride)
    values = scores.double().numpy()
    out = np.zeros((len(scores), *size))
    # Of what is summed, by running sums too: where it cancels, its rounding is left.
    finite = np.where(np.isfinite(values), np.abs(values), 0.0)
    mass = np.broadcast_to(finite.sum((1, 2))[:, None, None], out.shape)
    for y, x in np.ndindex(*size):
        covering = [
            values[:, r, q]
            for r in range(scores.shape[1])
            for q in range(scores.shape[2])
            if r * sh <= y < r * sh + wh and q * sw <= x < q * sw + ww
        ]
        if covering:
            with np.errstate(all="ignore"):
                out[:, y, x] = np.mean(covering, 0)
    # Summed in float64: of the other dtypes little but the storing is left.
    share = 1.0 if scores.dtype == F64 else np.finfo(float).eps / np.finfo(np.float32).eps
    return banded(out, mass * share, 10, scores.dtype)
