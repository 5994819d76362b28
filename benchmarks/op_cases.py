"""Each op and the PyTorch operations that it replaces, on the shapes of real networks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from interleave import OURS
from torch import Tensor

from convviz_cuda import ops

aten = torch.ops.aten
Result = Tensor | tuple[Tensor, ...]
Make = Callable[..., Tensor]  # shape -> random tensor of the case's dtype, layout and device


@dataclass(frozen=True)
class Sides:
    """The same work by us and by PyTorch, on the same tensors."""

    ours: Callable[[], Result]
    torch: Callable[[], Result]
    bytes_moved: float  # what ours has to read and write: each tensor once


@dataclass(frozen=True)
class Case:
    """An op on one shape. ``prepare`` makes new inputs at each call."""

    op: str
    name: str
    shape: tuple[int, ...]
    prepare: Callable[[Make, tuple[int, ...]], Sides]


def _size(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def relu(make: Make, shape: tuple[int, ...]) -> Sides:
    x = make(shape)
    return Sides(lambda: ops.relu(x)[0], lambda: F.relu(x), 2 * _size(x) + x.numel() / 8)


def relu_backward(make: Make, shape: tuple[int, ...]) -> Sides:
    grad, (out, mask) = make(shape), ops.relu(make(shape))
    size, stride = out.shape, out.stride()

    def replaced() -> Tensor:
        return aten.threshold_backward(grad, out, 0).clamp(min=0)

    return Sides(
        lambda: ops.relu_backward(grad, mask, size, stride, "guided"), replaced, 2 * _size(grad) + _size(mask)
    )


def relu_pool(kernel: int, stride: int, ceil_mode: bool = False) -> Callable[[Make, tuple[int, ...]], Sides]:
    geometry = ([kernel] * 2, [stride] * 2, [0, 0], [1, 1], ceil_mode)

    def prepare(make: Make, shape: tuple[int, ...]) -> Sides:
        x = make(shape)
        moved = _size(x, *ops.relu_max_pool2d(x, *geometry))
        return Sides(
            lambda: ops.relu_max_pool2d(x, *geometry)[0],
            lambda: aten.max_pool2d_with_indices(F.relu(x), *geometry)[0],
            moved,
        )

    return prepare


def unpool(kernel: int, stride: int, ceil_mode: bool = False) -> Callable[[Make, tuple[int, ...]], Sides]:
    geometry = ([kernel] * 2, [stride] * 2, [0, 0], [1, 1])

    def prepare(make: Make, shape: tuple[int, ...]) -> Sides:
        x = make(shape)
        rectified = F.relu(x)
        pooled, indices = aten.max_pool2d_with_indices(rectified, *geometry, ceil_mode)
        switches = ops.relu_max_pool2d(x, *geometry, ceil_mode)[1]
        grad = make(pooled.shape)

        def replaced() -> Tensor:
            spread = aten.max_pool2d_with_indices_backward(grad, rectified, *geometry, ceil_mode, indices)
            return aten.threshold_backward(spread, rectified, 0).clamp(min=0)

        return Sides(
            lambda: ops.switch_unpool2d(grad, switches, shape[2:], *geometry, rule="guided"),
            replaced,
            _size(grad, switches, x),
        )

    return prepare


def input_grad(
    channels: int, kernel: int, stride: int, padding: int
) -> Callable[[Make, tuple[int, ...]], Sides]:
    geometry = ([stride] * 2, [padding] * 2, [1, 1])

    def prepare(make: Make, shape: tuple[int, ...]) -> Sides:
        x, weight = make(shape), make((channels, shape[1], kernel, kernel))
        grad = make(F.conv2d(x[:1], weight, None, stride, padding).shape, batch=shape[0])

        def replaced() -> Tensor:
            return aten.convolution_backward(
                grad, x, weight, None, *geometry, False, [0, 0], 1, [True, False, False]
            )[0]

        return Sides(
            lambda: ops.conv2d_input_grad(grad, weight, shape[2:], *geometry),
            replaced,
            _size(grad, weight, x),
        )

    return prepare


def max_abs(make: Make, shape: tuple[int, ...]) -> Sides:
    x = make(shape)
    return Sides(lambda: ops.max_abs_channels(x), lambda: x.abs().amax(1), _size(x) * (1 + 1 / shape[1]))


IMAGES = (8, 3, 224, 224)
SQUEEZE, VGG, VGG3 = (8, 96, 109, 109), (2, 64, 224, 224), (8, 256, 56, 56)
CASES = (
    Case("relu", "SqueezeNet conv1", SQUEEZE, relu),
    Case("relu", "VGG16 conv3", VGG3, relu),
    Case("relu_backward guided", "SqueezeNet conv1", SQUEEZE, relu_backward),
    Case("relu_backward guided", "VGG16 conv3", VGG3, relu_backward),
    Case("relu_max_pool2d", "SqueezeNet pool1 3x3/2", SQUEEZE, relu_pool(3, 2, True)),
    Case("relu_max_pool2d", "VGG16 pool1 2x2/2", VGG, relu_pool(2, 2)),
    Case("relu_max_pool2d", "VGG16 pool3 2x2/2", VGG3, relu_pool(2, 2)),
    Case("switch_unpool2d guided", "SqueezeNet pool1 3x3/2", SQUEEZE, unpool(3, 2, True)),
    Case("switch_unpool2d guided", "VGG16 pool1 2x2/2", VGG, unpool(2, 2)),
    Case("switch_unpool2d guided", "VGG16 pool3 2x2/2", VGG3, unpool(2, 2)),
    Case("conv2d_input_grad", "SqueezeNet conv1 7x7/2", IMAGES, input_grad(96, 7, 2, 0)),
    Case("conv2d_input_grad", "VGG16 conv1_1 3x3", IMAGES, input_grad(64, 3, 1, 1)),
    Case("conv2d_input_grad", "ResNet conv1 7x7/2", IMAGES, input_grad(64, 7, 2, 3)),
    Case("conv2d_input_grad", "AlexNet conv1 11x11/4", IMAGES, input_grad(64, 11, 4, 2)),
    Case("conv2d_input_grad", "ZFNet conv1 7x7/2", IMAGES, input_grad(96, 7, 2, 1)),
    Case("max_abs_channels", "images", IMAGES, max_abs),
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
# Of the largest value: float32 sums differ in their order, bf16 results may be rounded more than once.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def maker(dtype: str, layout: str, device: str, seed: int = 0) -> Make:
    generator = torch.Generator(device).manual_seed(seed)

    def make(shape: tuple[int, ...], batch: int | None = None) -> Tensor:
        full = (batch or shape[0], *shape[1:])
        x = torch.randn(full, generator=generator, device=device).to(DTYPES[dtype])
        return x.contiguous(memory_format=LAYOUTS[layout])

    return make


def rotated(sides: list[Sides]) -> dict[str, Callable[[], Any]]:
    """The two sides as callables that take the next set of inputs at each call."""
    ours, replaced = itertools.cycle(s.ours for s in sides), itertools.cycle(s.torch for s in sides)
    return {OURS: lambda: next(ours)(), "torch": lambda: next(replaced)()}
