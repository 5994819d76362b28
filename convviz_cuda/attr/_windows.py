"""The occlusion windows of one input: where they lie, what they hide, and the mean over those that cover a value."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Slices = tuple[slice, ...]


@dataclass(frozen=True)
class WindowGrid:
    """Windows over all dimensions of an input but the batch.

    The first one starts at 0; the last one of each dimension is cut off where the input ends. ``size``, ``window`` and
    ``stride`` have one int for each dimension.
    """

    size: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def steps(self) -> tuple[int, ...]:
        """The number of windows along each dimension."""
        axes = zip(self.size, self.window, self.stride, strict=True)
        return tuple(-((size - window) // -stride) + 1 for size, window, stride in axes)

    def __len__(self) -> int:
        return math.prod(self.steps)

    def starts(self, axis: int) -> range:
        """Where the windows begin along a dimension."""
        return range(0, self.steps[axis] * self.stride[axis], self.stride[axis])

    def slices(self, start: int, stop: int) -> Iterator[Slices]:
        """The regions of the windows ``start`` to ``stop``; the first dimension runs fastest, as in Captum."""
        for number in range(start, stop):
            region = []
            for steps, window, stride in zip(self.steps, self.window, self.stride, strict=True):
                number, step = divmod(number, steps)
                region.append(slice(step * stride, step * stride + window))
            yield tuple(region)

    def mean(self, scores: Tensor) -> Tensor:
        """For each value of the input the mean score of the windows that cover it.

        scores: (windows, outputs), in the order of :meth:`slices`. Result: (outputs, *size), of the same dtype.
        """
        # To (outputs, *steps). A window is a product of ranges, so that the mean is one along each dimension in turn.
        means = scores.reshape(*self.steps[::-1], scores.shape[1])
        means = means.permute(*range(means.dim() - 1, -1, -1))
        for axis, steps in enumerate(self.steps):
            if steps > 1:
                means = self._mean_along(means, axis)
        return means.expand(means.shape[0], *self.size)

    def _mean_along(self, scores: Tensor, axis: int) -> Tensor:
        window, stride, last = self.window[axis], self.stride[axis], self.steps[axis] - 1
        place = torch.arange(self.size[axis], device=scores.device)
        # The windows that cover a place follow each other: from the first to the final one. Selected rather than
        # multiplied by zeros and ones, so that a NaN or an infinity stays in its own window.
        first = (place - window).div(stride, rounding_mode="floor").add(1).clamp(min=0)
        final = place.div(stride, rounding_mode="floor").clamp(max=last)
        shape = [-1 if dim == axis + 1 else 1 for dim in range(scores.dim())]
        total = scores.index_select(axis + 1, first)
        for further in range(1, min(last, (window - 1) // stride) + 1):
            index = first + further
            part = scores.index_select(axis + 1, index.clamp(max=last))
            total += part.where((index <= final).view(shape), part.new_zeros(()))
        return total / (final - first + 1).view(shape)


def window_grids(inputs: tuple[Tensor, ...], shapes: Any, strides: Any) -> list[WindowGrid]:
    """The grids that ``sliding_window_shapes`` and ``strides`` describe, one for each input.

    Raises TypeError for a bare int as window, AssertionError (Captum's) for what does not fit the inputs.
    """
    if not isinstance(shapes, tuple | list):
        raise TypeError(
            "sliding_window_shapes must be a tuple with an int for every dimension but the batch, "
            f"but it is {shapes!r}."
        )
    if len(inputs) == 1 and not (len(shapes) == 1 and isinstance(shapes[0], tuple | list)):
        shapes = (shapes,)
    assert len(shapes) == len(inputs), (
        f"Must provide sliding window dimensions for each input tensor: there are {len(inputs)} inputs, and "
        f"sliding_window_shapes is {shapes!r}."
    )
    if strides is None:
        strides = (1,) * len(inputs)
    elif len(inputs) == 1 and not (isinstance(strides, tuple) and len(strides) == 1):
        strides = (strides,)
    assert isinstance(strides, tuple) and len(strides) == len(inputs), (
        f"Strides must be provided for each input tensor: there are {len(inputs)} inputs, and strides is {strides!r}."
    )
    return [_grid(i, *given) for i, given in enumerate(zip(inputs, shapes, strides, strict=True))]


def _grid(index: int, tensor: Tensor, shape: Any, stride: Any) -> WindowGrid:
    assert tensor.dim() > 0, f"Input tensor {index} must have a batch dimension, but it is a scalar."
    size = tuple(tensor.shape[1:])
    assert isinstance(shape, tuple) and len(shape) == len(size) and all(map(_is_count, shape)), (
        f"Occlusion shape for input index {index} should be a tuple with {len(size)} dimensions, each an int, but it "
        f"is {shape!r}."
    )
    steps = (stride,) * len(size) if _is_count(stride) else stride
    assert isinstance(steps, tuple) and len(steps) == len(size) and all(map(_is_count, steps)), (
        f"Stride for input index {index} must be an int or a tuple of {len(size)} ints for an input of the shape "
        f"{tuple(tensor.shape)}, but it is {stride!r}."
    )
    assert all(step >= 1 for step in steps), f"Strides must be at least 1, but input {index} has {stride!r}."
    assert all(window <= extent for window, extent in zip(shape, size, strict=True)), (
        f"Sliding window dimensions {shape!r} cannot exceed input dimensions {size}."
    )
    assert all(window >= min(1, extent) for window, extent in zip(shape, size, strict=True)), (
        f"Sliding window dimensions must be at least 1, but input {index} has {shape!r}."
    )
    for window, extent, step in zip(shape, size, steps, strict=True):
        assert window == extent or step <= window, (
            f"Stride dimension {stride!r} cannot be larger than sliding window shape dimension {shape!r}, unless the "
            "window fills the dimension: values between the windows would have no attribution."
        )
    return WindowGrid(size, tuple(map(int, shape)), tuple(map(int, steps)))


def _is_count(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def window_fills(inputs: tuple[Tensor, ...], baselines: Any) -> list[Tensor]:
    """What stands in the windows of each input: ``baselines`` broadcast to the inputs' shapes without being copied.

    A floating input decides the dtype; an integer input with a floating baseline becomes floating, as in a sum of both.

    Raises AssertionError for a baseline that is neither a number nor a tensor, RuntimeError for one that does not
    broadcast.
    """
    if baselines is None:
        baselines = (0,) * len(inputs)
    elif not isinstance(baselines, tuple):
        baselines = (baselines,)
    for baseline in baselines:
        assert isinstance(baseline, Tensor | numbers.Real), (
            f"A baseline must be a torch.Tensor or a number, but it is {baseline!r}."
        )
    assert len(baselines) == len(inputs), (
        f"There must be a baseline for each input: there are {len(inputs)} inputs and {len(baselines)} baselines."
    )
    return [_fill(i, x, b) for i, (x, b) in enumerate(zip(inputs, baselines, strict=True))]


def _fill(index: int, tensor: Tensor, baseline: Tensor | numbers.Real) -> Tensor:
    shape = tuple(baseline.shape) if isinstance(baseline, Tensor) else ()
    try:
        fits = torch.broadcast_shapes(shape, tensor.shape) == tensor.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise RuntimeError(
            f"The baseline of input {index} has the shape {shape}, which does not broadcast to the input's "
            f"{tuple(tensor.shape)}."
        )
    if not isinstance(baseline, Tensor):
        whole = isinstance(baseline, numbers.Integral)
        number = baseline if isinstance(baseline, bool) else int(baseline) if whole else float(baseline)
        dtype = tensor.dtype if tensor.is_floating_point() else torch.result_type(tensor, number)
        baseline = torch.tensor(number, dtype=torch.int64 if whole else torch.float64)
    else:
        dtype = (
            tensor.dtype if tensor.is_floating_point() else torch.promote_types(tensor.dtype, baseline.dtype)
        )
    return baseline.detach().to(dtype=dtype).to(tensor.device).expand(tensor.shape)
