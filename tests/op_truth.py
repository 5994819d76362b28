"""The truth about each op, by loops that share no code with the package, and how results compare with it."""

from __future__ import annotations

import functools
from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

F64, F32 = torch.float64, torch.float32


class Band(NamedTuple):
    """A value and how far from it a result may lie, element by element."""

    value: Tensor
    bound: Tensor


def assert_same(actual, expected, *, signed=True):
    """Number for number, NaN for NaN, and -0.0 for -0.0; or within a band. Integers have the same dtype."""
    actual = actual.detach().cpu()
    if isinstance(expected, Band):
        assert actual.shape == expected.value.shape
        finite = expected.value.isfinite()
        assert_same(actual[~finite], expected.value[~finite])
        error = torch.where(finite, (actual.double() - expected.value).abs(), 0.0)
        assert ((error <= expected.bound) | ~finite).all(), (
            f"off by up to {(error / expected.bound).nan_to_num(0).max():.3g} bounds"
        )
        return
    assert actual.shape == expected.shape
    assert actual.is_floating_point() or actual.dtype == expected.dtype
    assert torch.equal(actual.isnan(), expected.isnan())
    wrong = ((actual != expected) & ~expected.isnan()) | (
        (actual.signbit() != expected.signbit()) & signed & (expected == 0)
    )
    assert not wrong.any(), f"{int(wrong.sum())} differ, first {actual[wrong][0]} for {expected[wrong][0]}"


def assert_all_same(actual, expected, **options):
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert_same(one, other, **options)


def is_dense(x: Tensor) -> bool:
    """Every element has an address of its own, and there are no gaps between them."""
    offsets = np.zeros((), int)
    for size, stride in zip(x.shape, x.stride(), strict=True):
        offsets = offsets[..., None] + np.arange(size) * stride
    return np.array_equal(np.sort(offsets, axis=None), np.arange(x.numel()))


def keeps_strides(x: Tensor) -> bool:
    """Whether an op that works in memory order takes x as it is: K signals must fit behind each other."""
    inner = [stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True) if size > 1]
    return is_dense(x) and (x.dim() == 0 or x.shape[0] == 1 or all(x.stride(0) >= stride for stride in inner))


def relu_truth(x: Tensor, lower: float = 0.0, upper: float | None = None, *, in_place: bool = False):
    x = x if in_place or keeps_strides(x) else x.contiguous()
    bounds = [lower, float("nan") if upper is None else upper]
    # What is compared with, and what the output takes.
    low, high = torch.tensor(bounds, dtype=F64 if x.dtype == F64 else F32).double().numpy()
    lowest, highest = torch.tensor(bounds, dtype=x.dtype).double().numpy()
    memory = x.as_strided((x.numel(),), (1,)).double().numpy()
    open_ = ~(memory <= low) & ~(memory >= high)
    values = x.double().numpy()
    out = np.where(values <= low, lowest, np.where(values >= high, highest, values))
    return torch.from_numpy(out), torch.from_numpy(np.packbits(np.asarray(open_, bool), bitorder="little"))


in_place_truth = functools.partial(relu_truth, in_place=True)


def passes(rule: str, alive: bool, signal: float) -> bool:
    return (alive or rule not in ("gradient", "guided")) and (
        rule not in ("deconvnet", "guided") or not signal <= 0
    )


def relu_backward_truth(grad: Tensor, mask: Tensor, size, stride, rule: str = "gradient") -> Tensor:
    bits = np.unpackbits(mask.numpy(), bitorder="little")
    place = torch.arange(int(np.prod(size))).as_strided(size, stride).numpy()
    signal = grad.double().numpy()
    out = np.zeros(grad.shape)
    for index in np.ndindex(*grad.shape):
        forward = (index[0] % size[0], *index[1:]) if index else ()
        if passes(rule, bits[place[forward]] == 1, signal[index]):
            out[index] = signal[index]
    return torch.from_numpy(out)


def two(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def switch_dtype(kernel_size: Any) -> torch.dtype:
    positions = two(kernel_size)[0] * two(kernel_size)[1]
    return torch.int8 if positions < 128 else torch.int16 if positions < 32768 else torch.int32


def pool_truth(x, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, *, relu=True):
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = map(two, (kernel_size, stride or kernel_size, padding, dilation))
    shape = F.max_pool2d(
        torch.zeros(1, 1, *x.shape[2:]), kernel_size, stride, padding, dilation, ceil_mode
    ).shape[2:]
    values = x.double().numpy()
    if relu:
        values = np.where(values <= 0, 0.0, values)
    none = torch.iinfo(switch_dtype(kernel_size)).min
    out = np.full((*x.shape[:2], *shape), -np.inf)
    switches = np.full(out.shape, none)
    for oh, ow in np.ndindex(*shape):
        best, switch = out[:, :, oh, ow], switches[:, :, oh, ow]  # views
        for p in range(kh * kw):
            h, w = oh * sh - ph + p // kw * dh, ow * sw - pw + p % kw * dw
            if 0 <= h < x.shape[2] and 0 <= w < x.shape[3]:
                value = values[:, :, h, w]
                wins = (switch == none) | (value > best) | np.isnan(value)
                best[wins], switch[wins] = value[wins], p
    if relu:
        switches = np.where((out <= 0) & (switches != none), ~switches, switches)
    return torch.from_numpy(out), torch.from_numpy(switches).to(switch_dtype(kernel_size))


def unpool_truth(
    grad, switches, size, kernel_size, stride=None, padding=0, dilation=1, *, rule="gradient", overlap="sum"
):
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = map(two, (kernel_size, stride or kernel_size, padding, dilation))
    acc = np.float64 if grad.dtype == F64 else np.float32
    signal, chosen = grad.double().numpy().astype(acc), switches.numpy()
    received = defaultdict(list)  # ndindex goes through the windows in ascending order
    for n, c, oh, ow in np.ndindex(*grad.shape):
        switch = int(chosen[n % len(chosen), c, oh, ow])
        p = switch if switch >= 0 else ~switch
        h, w = oh * sh - ph + p // kw * dh, ow * sw - pw + p % kw * dw
        if p < kh * kw and 0 <= h < size[0] and 0 <= w < size[1]:
            received[n, c, h, w].append((signal[n, c, oh, ow], switch >= 0))
    out = np.zeros((*grad.shape[:2], *size))
    with np.errstate(all="ignore"):
        for index, windows in received.items():
            total = windows[0][0]
            for value, _ in windows[1:]:
                total = total + value if overlap == "sum" else np.maximum(total, value)
            if passes(rule, any(alive for _, alive in windows), total):
                out[index] = total
    return torch.from_numpy(out).to(grad.dtype).double()


def conv_truth(grad: Tensor, weight: Tensor, size, stride=1, padding=0, dilation=1) -> Band:
    def pull(signal: Tensor, kernel: Tensor) -> Tensor:
        x = torch.zeros(grad.shape[0], weight.shape[1], *size, dtype=F64, requires_grad=True)
        return torch.autograd.grad(F.conv2d(x, kernel, None, stride, padding, dilation), x, signal)[0]

    value = pull(grad.double(), weight.double())
    # In any order, a sum of n products is off by at most n * eps of the sum of magnitudes; then it is stored.
    terms = weight.shape[0] * weight.shape[2] * weight.shape[3]
    unit = torch.finfo(F64 if grad.dtype == F64 else F32).eps
    bound = terms * unit * pull(grad.double().abs(), weight.double().abs())
    return Band(value, bound + torch.finfo(grad.dtype).eps * value.abs())


def max_abs_truth(x: Tensor) -> Tensor:
    best = np.zeros((x.shape[0], *x.shape[2:]))
    for channel in range(x.shape[1]):
        value = np.abs(x[:, channel].double().numpy())
        best = np.where(np.isnan(value) | (value > best), value, best)  # once NaN, no value is above it
    return torch.from_numpy(best)
