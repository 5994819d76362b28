"""Ops on the windows of an occlusion sweep: masked images, and the rectangles that an occluder changes.

A *variant* is one occluded image. ``variants`` ``(N, 3)`` holds its clean image, its row and its column of the
window grid; what a grid row or column means for a layer stands in the tables ``rows`` and ``cols``, because
windows are rectangles and each axis goes alone. All three are int64 on the device of the tensors.

A layer's activation is given as ``base``, the clean images' ``(B, C, H, W)``, and ``patch``, each variant's changed
rectangle ``(N, C, ph, pw)``; the ops read the two as one map. Outside of the map there is padding, also where a
patch reaches there. Nothing is read out of bounds, whatever the tables say: an index beyond a table or the batch
counts as the nearest.

``low`` and ``high`` clamp (``low=0`` is a ReLU), and NaN stays NaN. Any strides will do; results lie as the patch
does, and as the base where the patch has one pixel or channel and so both layouts. float64, float32, bfloat16 and
float16, with sums in float32 (float64 for float64). None of these functions is differentiable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import window_reference as reference
from ._register import define, looped
from .checks import Pair, check_float, check_images, pool_geometry
from .window_checks import (
    check_bounds,
    check_out,
    check_sources,
    check_tables,
    checked_bias,
    contiguous,
    fit,
    same_kind,
    two_ints,
)
from .window_reference import accumulator, layout_of


def _define(name: str, signature: str, fake: Callable[..., Any]) -> Any:
    vmap = None if name.endswith("_") else looped(name)
    return define(name, signature, getattr(reference, name), fake, vmap=vmap, differentiable=False)


# ---------------------------------------------------------------------------------------- occluded images


def _empty(like: Tensor, shape: Sequence[int], layout: torch.memory_format) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


occlude_op = _define(
    "occlude",
    "(Tensor images, Tensor fill, Tensor variants, Tensor rows, Tensor cols, SymInt[] size) -> Tensor",
    lambda images, fill, variants, rows, cols, size: _empty(
        images, (variants.shape[0], images.shape[1], *size), layout_of(images)
    ),
)


def occlude(
    images: Tensor, fill: Tensor, variants: Tensor, rows: Tensor, cols: Tensor, size: Sequence[int]
) -> Tensor:
    """Occluded images, or a region of each with its zero padding, straight from the clean ones.

    Args:
        images: ``(B, C, H, W)``.
        fill: what stands in the occluder's place; broadcasts to the shape of ``images``, and is never expanded in
            memory. Read at the image's own position, as Captum's baselines are.
        variants: ``(N, 3)``: image, grid row, grid column.
        rows: ``(R, 3)``: the image row of the result's first row (which may lie outside), the first image row that
            is occluded, and the one behind the last. ``cols`` ``(Q, 3)`` likewise.
        size: ``(h, w)`` of the result; with the origin 0 and ``(H, W)`` whole images.

    Returns:
        ``(N, C, h, w)`` in the layout of ``images``: ``fill`` in the occluder, 0 outside the image.

    Zeiler & Fergus 2013, section 4.2.
    """
    if not fit((images, fill, variants, rows, cols), 3):
        check_images("images", images)
        check_float("fill", fill)
        same_kind("fill", fill, "images", images)
        check_tables("images", images, variants, rows, cols, 3)
    if fill.shape != images.shape:
        try:
            fill = fill.expand(images.shape)
        except RuntimeError:
            raise ValueError(
                f"fill must broadcast to the images' shape {tuple(images.shape)}, "
                f"but it has the shape {tuple(fill.shape)}."
            ) from None
    return occlude_op(images, fill, *contiguous(variants, rows, cols), two_ints("size", size, 0))


# --------------------------------------------------------------------------------- rectangles of base and patch

_SOURCES = "Tensor base, Tensor patch, Tensor variants, Tensor rows, Tensor cols"
_ACTIVATION = "Tensor? bias, float low, float high"
_INTO = "Tensor(a!) out, "


def _gathered_fake(base, patch, variants, rows, cols, size, *rest):
    return _empty(patch, (*patch.shape[:2], *size), layout_of(patch, base))


gather_windows_op = _define(
    "gather_windows",
    f"({_SOURCES}, SymInt[] size, float pad, {_ACTIVATION}) -> Tensor",
    _gathered_fake,
)
gather_windows_inplace_op = _define(
    "gather_windows_",
    f"({_INTO}{_SOURCES}, SymInt channel, float pad, {_ACTIVATION}) -> ()",
    lambda *_: None,
)
add_windows_inplace_op = _define(
    "add_windows_", f"({_INTO}{_SOURCES}, float low, float high) -> ()", lambda *_: None
)


def gather_windows(
    base: Tensor,
    patch: Tensor,
    variants: Tensor,
    rows: Tensor,
    cols: Tensor,
    size: Sequence[int],
    pad: float = 0.0,
    bias: Tensor | None = None,
    low: float = -math.inf,
    high: float = math.inf,
) -> Tensor:
    """A rectangle of each variant's map, with what a convolution needs around it.

    Args:
        base, patch, variants: see the module.
        rows: ``(R, 2)``: rows of the map where the result and where the patch begin. ``cols`` ``(Q, 2)`` likewise.
        size: ``(h, w)`` of the result.
        pad: the value outside the map.
        bias: ``(C,)``, added to the patch before it is clamped to ``low`` and ``high``. The base stays as it is.

    Returns:
        ``(N, C, h, w)``.
    """
    check_sources(base, patch, variants, rows, cols, 2)
    bias = checked_bias(bias, patch)
    check_bounds(low, high)
    tables = contiguous(variants, rows, cols)
    return gather_windows_op(base, patch, *tables, two_ints("size", size, 0), pad, bias, low, high)


def change(op: Callable[..., None], out: Tensor, *arguments: Any) -> None:
    """Runs an op that changes ``out``, so that autograd notices: a kernel writes to memory and tells nobody."""
    if torch.compiler.is_compiling() or out.is_inference():
        op(out, *arguments)
        return
    version = out._version
    op(out, *arguments)
    if out._version == version:
        torch.autograd.graph.increment_version(out)


def gather_windows_(
    out: Tensor,
    base: Tensor,
    patch: Tensor,
    variants: Tensor,
    rows: Tensor,
    cols: Tensor,
    channel: int = 0,
    pad: float = 0.0,
    bias: Tensor | None = None,
    low: float = -math.inf,
    high: float = math.inf,
) -> None:
    """:func:`gather_windows` into ``out[:, channel : channel + C]``, ``out`` being ``(N, channels, h, w)``.

    How concatenated branches are read without a copy of each. ``out`` must not share memory with the sources.
    """
    check_sources(base, patch, variants, rows, cols, 2)
    check_out(out, patch, channel, out.shape[1] if isinstance(out, Tensor) and out.dim() == 4 else 0)
    bias = checked_bias(bias, patch)
    check_bounds(low, high)
    tables = contiguous(variants, rows, cols)
    change(gather_windows_inplace_op, out, base, patch, *tables, channel, pad, bias, low, high)


def add_windows_(
    out: Tensor,
    base: Tensor,
    patch: Tensor,
    variants: Tensor,
    rows: Tensor,
    cols: Tensor,
    low: float = -math.inf,
    high: float = math.inf,
) -> None:
    """Adds a rectangle of another map to ``out`` ``(N, C, h, w)``, then clamps the sum: a residual's addition.

    What is added is what :func:`gather_windows` gives for these tables, with 0 outside the map. ``out`` must not
    share memory with the sources.
    """
    check_sources(base, patch, variants, rows, cols, 2)
    check_out(out, patch, 0, patch.shape[1])
    check_bounds(low, high)
    change(add_windows_inplace_op, out, base, patch, *contiguous(variants, rows, cols), low, high)


# ------------------------------------------------------------------------------------------------ pooling

pool_windows_op = _define(
    "pool_windows",
    f"({_SOURCES}, SymInt[] size, int[] kernel, int[] stride, int[] padding, int[] dilation, bool average,"
    f" bool count_include_pad, int? divisor_override, {_ACTIVATION}) -> Tensor",
    _gathered_fake,
)
sum_windows_op = _define(
    "sum_windows",
    f"({_SOURCES}, {_ACTIVATION}) -> Tensor",
    lambda base, patch, *_: patch.new_empty(patch.shape[:2], dtype=accumulator(patch.dtype)),
)


def pool_windows(
    base: Tensor,
    patch: Tensor,
    variants: Tensor,
    rows: Tensor,
    cols: Tensor,
    size: Sequence[int],
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    dilation: Pair = 1,
    average: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    bias: Tensor | None = None,
    low: float = -math.inf,
    high: float = math.inf,
) -> Tensor:
    """A rectangle of each variant's pooled map, straight from the map in front of the pooling.

    Args:
        base, patch, variants: see the module; they are the pooling's input.
        rows: ``(R, 2)``: the row of the *pooled* map where the result begins, and the row of the *input* where the
            patch begins. ``cols`` ``(Q, 2)`` likewise.
        size: ``(h, w)`` of the result. With ``ceil_mode`` the pooled map is larger and nothing else changes.
        kernel_size, stride, padding, dilation: as in :func:`torch.nn.functional.max_pool2d`.
        average: the mean instead of the maximum (``dilation`` is 1 then), with ``count_include_pad`` and
            ``divisor_override`` as in :func:`torch.nn.functional.avg_pool2d`.
        bias, low, high: applied to the patch first, see :func:`gather_windows`; the bias is finite.

    Returns:
        ``(N, C, h, w)``. NaN wins a maximum. A window without an element of the map gives -inf, or the mean 0.
    """
    check_sources(base, patch, variants, rows, cols, 2)
    bias = checked_bias(bias, patch)
    check_bounds(low, high)
    geometry = pool_geometry(kernel_size, stride, padding, dilation)
    if average and geometry[3] != [1, 1]:
        raise ValueError(f"dilation must be 1 for an average, but it is {dilation!r}.")
    if divisor_override is not None and (not average or divisor_override == 0):
        raise ValueError(
            f"divisor_override must be None, or for an average not 0, but it is {divisor_override!r}."
        )
    return pool_windows_op(
        base,
        patch,
        *contiguous(variants, rows, cols),
        two_ints("size", size, 0),
        *geometry,
        average,
        count_include_pad,
        divisor_override,
        bias,
        low,
        high,
    )


def sum_windows(
    base: Tensor,
    patch: Tensor,
    variants: Tensor,
    rows: Tensor,
    cols: Tensor,
    bias: Tensor | None = None,
    low: float = -math.inf,
    high: float = math.inf,
) -> Tensor:
    """How the sum over a map changes where the patch replaces the base: the exact change of a global average.

    Args:
        base, patch, variants: see the module.
        rows: ``(R, 1)``: the row of the map where the patch begins. ``cols`` ``(Q, 1)`` likewise.
        bias, low, high: applied to the patch first, see :func:`gather_windows`.

    Returns:
        ``(N, C)``: the sum over the patch's rectangle, as far as it lies in the map, of patch minus base; float32,
        or float64 for float64, because a sum over a map soon is more than float16 can hold.
    """
    check_sources(base, patch, variants, rows, cols, 1)
    bias = checked_bias(bias, patch)
    check_bounds(low, high)
    return sum_windows_op(base, patch, *contiguous(variants, rows, cols), bias, low, high)


# --------------------------------------------------------------------------------------------------- maps

window_mean_op = _define(
    "window_mean",
    "(Tensor scores, SymInt[] size, SymInt[] window, SymInt[] stride) -> Tensor",
    lambda scores, size, window, stride: scores.new_empty((scores.shape[0], *size)),
)


def window_mean(scores: Tensor, size: Sequence[int], window: Pair, stride: Pair) -> Tensor:
    """Scores of windows to a map: each pixel's mean over the windows that cover it, as Captum averages.

    Args:
        scores: ``(M, R, Q)``: M maps of a grid of windows.
        size: ``(H, W)`` of the maps.
        window, stride: of the grid; window r covers the rows ``r * stride`` to ``r * stride + window``, as far as
            they are in the map.

    Returns:
        ``(M, H, W)`` contiguous; 0 where no window is. Sums run in float64.
    """
    check_float("scores", scores)
    if scores.dim() != 3:
        raise ValueError(
            f"scores must have the shape (M, R, Q), but they have the shape {tuple(scores.shape)}."
        )
    arguments = two_ints("size", size, 0), two_ints("window", window, 1), two_ints("stride", stride, 1)
    return window_mean_op(scores if scores.is_contiguous() else scores.contiguous(), *arguments)


__all__ = [
    "add_windows_",
    "gather_windows",
    "gather_windows_",
    "occlude",
    "pool_windows",
    "sum_windows",
    "window_mean",
]
