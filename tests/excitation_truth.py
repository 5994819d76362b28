"""Excitation backprop by the paper's formula, unit by unit: every operation is a matrix, written out in loops."""

from __future__ import annotations

import itertools
import math

import numpy as np


def share(matrix: np.ndarray, values: np.ndarray, above: np.ndarray, signed: bool = False) -> np.ndarray:
    """P(a_j) = sum_i Z_i a_j w_ij^+ P(a_i), Z_i = 1 / sum_k a_k w_ik^+ (0 where the sum is 0), of one example."""
    a = values.reshape(-1).astype(np.float64)
    if not signed:
        a = np.where(a > 0, a, 0.0)
    p = np.zeros_like(a)
    for i, probability in enumerate(above.reshape(-1)):
        excitation = [a[j] * max(matrix[i, j], 0.0) for j in range(len(a))]
        total = sum(excitation)
        if total != 0:
            for j in range(len(a)):
                p[j] += excitation[j] / total * probability
    return p.reshape(values.shape)


def _places(shape):
    return itertools.product(*map(range, shape))


def _reach(place, tap, stride, padding, dilation):
    return tuple(
        o * s - p + k * d for o, k, s, p, d in zip(place, tap, stride, padding, dilation, strict=True)
    )


def _inside(place, shape):
    return all(0 <= i < n for i, n in zip(place, shape, strict=True))


def conv_matrix(weight, size, stride, padding, dilation, groups):
    """(outputs, inputs) of a convolution of any number of dims; ``size``: of one channel of the input."""
    outs, ins_of_group, *kernel = weight.shape
    ins = ins_of_group * groups
    out_size = tuple(
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(size, padding, dilation, kernel, stride, strict=True)
    )
    matrix = np.zeros((outs, *out_size, ins, *size))
    for o in range(outs):
        first = o // (outs // groups) * ins_of_group
        for place in _places(out_size):
            for c in range(ins_of_group):
                for tap in _places(kernel):
                    read = _reach(place, tap, stride, padding, dilation)
                    if _inside(read, size):
                        matrix[(o, *place, first + c, *read)] += weight[(o, c, *tap)]
    return matrix.reshape(outs * math.prod(out_size), ins * math.prod(size)), (outs, *out_size)


def transposed_conv_matrix(weight, size, stride, padding, dilation, groups):
    """The same of a transposed convolution, whose inputs write where a convolution's outputs would read."""
    ins, outs_of_group, *kernel = weight.shape
    outs = outs_of_group * groups
    out_size = tuple(
        (n - 1) * s - 2 * p + d * (k - 1) + 1
        for n, p, d, k, s in zip(size, padding, dilation, kernel, stride, strict=True)
    )
    matrix = np.zeros((outs, *out_size, ins, *size))
    for c in range(ins):
        first = c // (ins // groups) * outs_of_group
        for place in _places(size):
            for o in range(outs_of_group):
                for tap in _places(kernel):
                    written = _reach(place, tap, stride, padding, dilation)
                    if _inside(written, out_size):
                        matrix[(first + o, *written, c, *place)] += weight[(c, o, *tap)]
    return matrix.reshape(outs * math.prod(out_size), ins * math.prod(size)), (outs, *out_size)


def windows_matrix(channels, size, windows):
    """Averages over windows: ``windows[axis][o]`` are the positions that output ``o`` averages along an axis."""
    out_size = tuple(len(axis) for axis in windows)
    matrix = np.zeros((channels, *out_size, channels, *size))
    for c in range(channels):
        for place in _places(out_size):
            reads = list(itertools.product(*(windows[axis][o] for axis, o in enumerate(place))))
            for read in reads:
                matrix[(c, *place, c, *read)] = 1 / len(reads)
    return matrix.reshape(channels * math.prod(out_size), channels * math.prod(size)), (channels, *out_size)


def sliding(size, kernel, stride):
    return [[range(o, o + kernel) for o in range(0, n - kernel + 1, stride)] for n in size]


def adaptive(size, wanted):
    return [
        [range(o * n // w, -(-(o + 1) * n // w)) for o in range(w)] for n, w in zip(size, wanted, strict=True)
    ]


def max_pool_down(values, above, kernel, stride):
    """P to the first maximum of each window (no padding), of (C, H, W)."""
    p = np.zeros_like(values)
    for c, oy, ox in _places(above.shape):
        window = values[c, oy * stride : oy * stride + kernel, ox * stride : ox * stride + kernel]
        y, x = np.unravel_index(window.argmax(), window.shape)
        p[c, oy * stride + y, ox * stride + x] += above[c, oy, ox]
    return p


def add_down(one, other, above):
    """P shared between two summands by their non-negative parts."""
    p, q = np.zeros_like(one), np.zeros_like(other)
    for place in _places(above.shape):
        a, b = max(one[place], 0.0), max(other[place], 0.0)
        if a + b > 0:
            p[place], q[place] = above[place] * a / (a + b), above[place] * b / (a + b)
    return p, q
