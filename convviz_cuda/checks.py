"""What the ops ask of their arguments, and what they ask of a tensor's layout."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .reference import RULES

Pair = int | Sequence[int]

# Of a window's positions, so that a switch holds each of them; and of strides and dilations, so that nothing overflows.
MOST = 2**31 - 1
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def integer(name: str, value: Any, least: int) -> int:
    """An int of at least ``least``; TypeError for what is none, ValueError for a smaller one."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int, but it is {value!r}.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, but it is {value}.")
    return int(value)


def check_int(name: str, value: Any, least: int, most: int | None = None) -> int:
    """An int from ``least`` to ``most``; ValueError for anything else, as of a setting's value."""
    fits = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not fits or value < least or (most is not None and value > most):
        power = most is not None and most > 1 << 32 and most & (most + 1) == 0
        end = (
            "" if most is None else f" and below 2**{most.bit_length()}" if power else f" and at most {most}"
        )
        raise ValueError(f"{name} must be an int of at least {least}{end}, but it is {value!r}.")
    return int(value)


def check_callable(name: str, value: Any) -> None:
    if not callable(value):
        raise TypeError(f"{name} must be callable, but it is {value!r}.")


def check_real(name: str, value: Any) -> None:
    """TypeError for what is no number; whether it is in a range is for the caller to say."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, but it is {value!r}.")


def rule_code(rule: str) -> int:
    """The code of a rule in the ops' schemas; ValueError for an unknown name."""
    try:
        return RULES[rule]
    except (KeyError, TypeError):
        raise ValueError(f"rule must be one of {', '.join(map(repr, RULES))}, but it is {rule!r}.") from None


def pair(name: str, value: Pair, least: int) -> list[int]:
    """An int or two ints as [vertical, horizontal], each at least ``least``."""
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if len(values) == 1:
        values = values * 2
    if len(values) != 2 or any(
        isinstance(v, bool) or not isinstance(v, int | torch.SymInt | numbers.Integral) for v in values
    ):
        raise TypeError(f"{name} must be an int or a pair of ints, but it is {value!r}.")
    # NumPy's integers become Python's; symbolic ones stay what they are.
    values = [v if isinstance(v, int | torch.SymInt) else int(v) for v in values]
    if min(values) < least:
        raise ValueError(f"{name} must be at least {least}, but it is {value!r}.")
    return values


def check_sizes(name: str, value: Sequence[int]) -> list[int]:
    """Sizes or strides as a list of non-negative ints; TypeError or ValueError for anything else."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"{name} must be a sequence of ints, but it is {value!r}.")
    if any(isinstance(v, bool) or not isinstance(v, torch.SymInt | numbers.Integral) for v in value):
        raise TypeError(f"{name} must hold ints, but it is {value!r}.")
    if any(v < 0 for v in value):
        raise ValueError(f"{name} must hold no negative numbers, but it is {value!r}.")
    return list(value)


def check_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, but it is a {type(tensor).__name__}.")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, but its layout is {tensor.layout}.")


def check_float(name: str, tensor: Tensor) -> None:
    check_tensor(name, tensor)
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, but it is {tensor.dtype}.")


def check_images(name: str, tensor: Tensor) -> None:
    check_float(name, tensor)
    if tensor.dim() != 4:
        raise ValueError(
            f"{name} must have the shape (N, C, H, W), but it has the shape {tuple(tensor.shape)}."
        )


def batch_outermost(size: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether the first dim is the outermost in memory, so that K signals of one forward can follow each other."""
    return (
        not size or size[0] == 1 or next(d for d in reference.memory_order(size, stride) if size[d] != 1) == 0
    )


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor's memory has neither gaps nor overlaps and its first dim is the outermost there."""
    if tensor.is_contiguous() or reference.channels_last(tensor):
        return True
    return gapless(tensor.shape, tensor.stride()) and batch_outermost(tensor.shape, tensor.stride())


def gapless(size: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether sizes and strides describe memory without gaps and overlaps, in any order of the dims."""
    expected = 1
    for dim in reversed(reference.memory_order(size, stride)):
        if size[dim] != 1 and stride[dim] != expected:
            return False
        expected *= size[dim]
    return True


def dense(tensor: Tensor) -> Tensor:
    return tensor if is_dense(tensor) else tensor.contiguous()


def two_layouts(tensor: Tensor) -> Tensor:
    """The tensor itself where it is contiguous or channels_last, else a contiguous copy."""
    return tensor if tensor.is_contiguous() or reference.channels_last(tensor) else tensor.contiguous()


def pool_geometry(kernel_size: Pair, stride: Pair | None, padding: Pair, dilation: Pair):
    kernel = pair("kernel_size", kernel_size, 1)
    steps = kernel if stride is None or stride == [] or stride == () else pair("stride", stride, 1)
    pads, gaps = pair("padding", padding, 0), pair("dilation", dilation, 1)
    if any(p > k // 2 for k, p in zip(kernel, pads, strict=True)):
        raise ValueError(
            f"padding must be at most half of the kernel_size {kernel_size!r}, but it is {padding!r}."
        )
    if math.prod(kernel) > MOST or max(*steps, *gaps) > MOST:
        raise ValueError(
            "A window must have fewer than 2**31 positions, and stride and dilation must be below 2**31, but they are "
            f"kernel_size={kernel_size!r}, stride={stride!r} and dilation={dilation!r}."
        )
    return kernel, steps, pads, gaps


def pooled_shape(shape: Sequence[int], kernel, stride, padding, dilation, ceil_mode: bool) -> list[int]:
    pooled = [
        reference.pooled_size(shape[2 + i], kernel[i], stride[i], padding[i], dilation[i], ceil_mode)
        for i in (0, 1)
    ]
    return [*shape[:2], *pooled]


def check_batch(grad_name: str, batch: int, forward: int) -> None:
    if batch != forward and (forward == 0 or batch % forward):
        raise ValueError(
            f"{grad_name} must have a multiple of the forward's {forward} examples in its first dimension, "
            f"but it has {batch}."
        )
