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

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import window_reference as reference
from ._register import define, looped
from .checks import DTYPES, Pair, check_float, check_images, check_tensor, pair, pool_geometry
from .window_reference import layout_of

# These functions are called thousands of times in a sweep. So each asks all that it asks of its arguments in one
# expression, and only where that fails the sentence is looked for.


def _define(name: str, signature: str, fake: Callable[..., Any]) -> Any:
    vmap = None if name.endswith("_") else looped(name)
    return define(name, signature, getattr(reference, name), fake, vmap=vmap, differentiable=False)


def _index_table(name: str, table: Tensor, width: int | str, device: torch.device) -> None:
    check_tensor(name, table)
    if table.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, but it is {table.dtype}.")
    if table.dim() != 2 or table.shape[1] != width:
        raise ValueError(
            f"{name} must have the shape (count, {width}), but it has the shape {tuple(table.shape)}."
        )
    if table.device != device:
        raise ValueError(f"{name} must be on {device} as the other tensors are, but it is on {table.device}.")


def _same_kind(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.dtype != other.dtype or tensor.device != other.device:
        raise TypeError(
            f"{name} must be {other.dtype} on {other.device} as {other_name} is, "
            f"but it is {tensor.dtype} on {tensor.device}."
        )


def _check_tables(base_name: str, base: Tensor, variants: Tensor, rows: Tensor, cols: Tensor, width: int):
    for name, table, columns in (("variants", variants, 3), ("rows", rows, width), ("cols", cols, width)):
        _index_table(name, table, columns, base.device)
        if variants.shape[0] and not table.shape[0]:
            raise ValueError(f"{name} must not be empty where there are variants.")
    if variants.shape[0] and not base.shape[0]:
        raise ValueError(f"{base_name} must have an image where there are variants.")


def _fit(tensors: tuple[Any, ...], width: int) -> bool:
    """Whether base, patch (or images, fill), variants, rows and cols belong together, but for the patch's shape."""
    base, patch, variants, rows, cols = tensors
    try:
        (images, _, _, _), (count, three) = base.shape, variants.shape
        (row_count, row_width), (col_count, col_width) = rows.shape, cols.shape
        return (
            isinstance(base, Tensor)
            and base.dtype in DTYPES
            and base.dtype is patch.dtype
            and variants.dtype is rows.dtype is cols.dtype is torch.int64
            and three == 3
            and row_width == col_width == width
            and (count == 0 or (images > 0 and row_count > 0 and col_count > 0))
            and (
                (base.is_cpu and patch.is_cpu and variants.is_cpu and rows.is_cpu and cols.is_cpu)
                or base.device == patch.device == variants.device == rows.device == cols.device
            )
        )
    except (AttributeError, ValueError):  # no tensor, or one of another rank
        return False


def _check(base: Tensor, patch: Tensor, variants: Tensor, rows: Tensor, cols: Tensor, width: int) -> None:
    if not _fit((base, patch, variants, rows, cols), width):
        check_images("base", base)
        check_images("patch", patch)
        _same_kind("patch", patch, "base", base)
        _check_tables("base", base, variants, rows, cols, width)
    if patch.dim() != 4 or patch.shape[:2] != (variants.shape[0], base.shape[1]):
        check_images("patch", patch)
        raise ValueError(
            f"patch must have {variants.shape[0]} variants of {base.shape[1]} channels, "
            f"but it has the shape {tuple(patch.shape)}."
        )


def _bias(bias: Tensor | None, patch: Tensor) -> Tensor | None:
    if bias is None or (
        isinstance(bias, Tensor)
        and bias.dtype is patch.dtype
        and bias.device == patch.device
        and bias.dim() == 1
        and bias.shape[0] == patch.shape[1]
    ):
        return bias if bias is None or bias.is_contiguous() else bias.contiguous()
    check_float("bias", bias)
    _same_kind("bias", bias, "patch", patch)
    raise ValueError(
        f"bias must have the shape ({patch.shape[1]},), but it has the shape {tuple(bias.shape)}."
    )


def _check_bounds(low: float, high: float) -> None:
    if not low <= high:
        raise ValueError(f"high must be at least low, but low is {low} and high is {high}.")


def _two(name: str, value: Sequence[int], least: int) -> Sequence[int]:
    kind = type(value)
    if (kind is tuple or kind is list or kind is torch.Size) and len(value) == 2:
        first, second = value
        if type(first) is int and type(second) is int and first >= least and second >= least:
            return value
    return pair(name, value, least)


def _tables(variants: Tensor, rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if variants.is_contiguous() and rows.is_contiguous() and cols.is_contiguous():
        return variants, rows, cols
    return variants.contiguous(), rows.contiguous(), cols.contiguous()


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
    if not _fit((images, fill, variants, rows, cols), 3):
        check_images("images", images)
        check_float("fill", fill)
        _same_kind("fill", fill, "images", images)
        _check_tables("images", images, variants, rows, cols, 3)
    if fill.shape != images.shape:
        try:
            fill = fill.expand(images.shape)
        except RuntimeError:
            raise ValueError(
                f"fill must broadcast to the images' shape {tuple(images.shape)}, "
                f"but it has the shape {tuple(fill.shape)}."
            ) from None
    return occlude_op(images, fill, *_tables(variants, rows, cols), _two("size", size, 0))


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
    _check(base, patch, variants, rows, cols, 2)
    bias = _bias(bias, patch)
    _check_bounds(low, high)
    tables = _tables(variants, rows, cols)
    return gather_windows_op(base, patch, *tables, _two("size", size, 0), pad, bias, low, high)


def _check_out(out: Tensor, patch: Tensor, channel: int, channels: int) -> None:
    if not (
        isinstance(out, Tensor)
        and out.dtype is patch.dtype
        and out.device == patch.device
        and out.dim() == 4
        and out.shape[0] == patch.shape[0]
        and 0 <= channel <= out.shape[1] - patch.shape[1]
        and out.shape[1] == channels
        and 0 not in out.stride()
    ):
        check_images("out", out)
        _same_kind("out", out, "patch", patch)
        if 0 in out.stride() and out.numel() > 1:
            raise ValueError(f"out must have memory for each element, but its strides are {out.stride()}.")
        if out.shape[0] != patch.shape[0]:
            raise ValueError(f"out must have {patch.shape[0]} variants, but it has {out.shape[0]}.")
        if not 0 <= channel <= out.shape[1] - patch.shape[1]:
            raise ValueError(
                f"channel must leave room for {patch.shape[1]} channels in out's {out.shape[1]}, "
                f"but it is {channel}."
            )
        if out.shape[1] != channels:
            raise ValueError(f"out must have {channels} channels, but it has {out.shape[1]}.")
    if out.requires_grad and torch.is_grad_enabled():
        raise ValueError("out must not require a gradient where it is changed in place: use torch.no_grad().")


def _change(op: Callable[..., None], out: Tensor, *arguments: Any) -> None:
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
    _check(base, patch, variants, rows, cols, 2)
    _check_out(out, patch, channel, out.shape[1] if isinstance(out, Tensor) and out.dim() == 4 else 0)
    bias = _bias(bias, patch)
    _check_bounds(low, high)
    tables = _tables(variants, rows, cols)
    _change(gather_windows_inplace_op, out, base, patch, *tables, channel, pad, bias, low, high)


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
    _check(base, patch, variants, rows, cols, 2)
    _check_out(out, patch, 0, patch.shape[1])
    _check_bounds(low, high)
    _change(add_windows_inplace_op, out, base, patch, *_tables(variants, rows, cols), low, high)


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
    lambda base, patch, *_: patch.new_empty(patch.shape[:2]),
)


# A sweep asks for the same few poolings again and again.
_geometry = functools.lru_cache(maxsize=256)(pool_geometry)


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
        bias, low, high: applied to the patch first, see :func:`gather_windows`.

    Returns:
        ``(N, C, h, w)``. NaN wins a maximum. A window without an element of the map gives -inf, or the mean 0.
    """
    _check(base, patch, variants, rows, cols, 2)
    bias = _bias(bias, patch)
    _check_bounds(low, high)
    try:
        geometry = _geometry(kernel_size, stride, padding, dilation)
    except TypeError:  # lists have no hash
        geometry = pool_geometry(kernel_size, stride, padding, dilation)
    if average and list(geometry[3]) != [1, 1]:
        raise ValueError(f"dilation must be 1 for an average, but it is {dilation!r}.")
    if divisor_override is not None and (not average or divisor_override == 0):
        raise ValueError(
            f"divisor_override must be None, or for an average not 0, but it is {divisor_override!r}."
        )
    return pool_windows_op(
        base,
        patch,
        *_tables(variants, rows, cols),
        _two("size", size, 0),
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
        ``(N, C)``: the sum over the patch's rectangle, as far as it lies in the map, of patch minus base.
    """
    _check(base, patch, variants, rows, cols, 1)
    bias = _bias(bias, patch)
    _check_bounds(low, high)
    return sum_windows_op(base, patch, *_tables(variants, rows, cols), bias, low, high)


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
    arguments = _two("size", size, 0), _two("window", window, 1), _two("stride", stride, 1)
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
