"""What the window ops ask of their arguments.

They are called thousands of times in a sweep. So all that is asked is asked in one expression first, and only where
that fails the sentence is looked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import DTYPES, check_float, check_images, check_tensor, pair


def index_table(name: str, table: Tensor, width: int | str, device: torch.device) -> None:
    check_tensor(name, table)
    if table.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, but it is {table.dtype}.")
    if table.dim() != 2 or table.shape[1] != width:
        raise ValueError(
            f"{name} must have the shape (count, {width}), but it has the shape {tuple(table.shape)}."
        )
    if table.device != device:
        raise ValueError(f"{name} must be on {device} as the other tensors are, but it is on {table.device}.")


def same_kind(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.dtype != other.dtype or tensor.device != other.device:
        raise TypeError(
            f"{name} must be {other.dtype} on {other.device} as {other_name} is, "
            f"but it is {tensor.dtype} on {tensor.device}."
        )


def check_tables(base_name: str, base: Tensor, variants: Tensor, rows: Tensor, cols: Tensor, width: int):
    for name, table, columns in (("variants", variants, 3), ("rows", rows, width), ("cols", cols, width)):
        index_table(name, table, columns, base.device)
        if variants.shape[0] and not table.shape[0]:
            raise ValueError(f"{name} must not be empty where there are variants.")
    if variants.shape[0] and not base.shape[0]:
        raise ValueError(f"{base_name} must have an image where there are variants.")


def fit(tensors: tuple[Any, ...], width: int) -> bool:
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


def check_sources(
    base: Tensor, patch: Tensor, variants: Tensor, rows: Tensor, cols: Tensor, width: int
) -> None:
    if not fit((base, patch, variants, rows, cols), width):
        check_images("base", base)
        check_images("patch", patch)
        same_kind("patch", patch, "base", base)
        check_tables("base", base, variants, rows, cols, width)
    if patch.dim() != 4 or patch.shape[:2] != (variants.shape[0], base.shape[1]):
        check_images("patch", patch)
        raise ValueError(
            f"patch must have {variants.shape[0]} variants of {base.shape[1]} channels, "
            f"but it has the shape {tuple(patch.shape)}."
        )


def checked_bias(bias: Tensor | None, patch: Tensor) -> Tensor | None:
    if bias is None or (
        isinstance(bias, Tensor)
        and bias.dtype is patch.dtype
        and bias.device == patch.device
        and bias.dim() == 1
        and bias.shape[0] == patch.shape[1]
    ):
        return bias if bias is None or bias.is_contiguous() else bias.contiguous()
    check_float("bias", bias)
    same_kind("bias", bias, "patch", patch)
    raise ValueError(
        f"bias must have the shape ({patch.shape[1]},), but it has the shape {tuple(bias.shape)}."
    )


def check_bounds(low: float, high: float) -> None:
    if not low <= high:
        raise ValueError(f"high must be at least low, but low is {low} and high is {high}.")


def two_ints(name: str, value: Sequence[int], least: int) -> Sequence[int]:
    kind = type(value)
    if (kind is tuple or kind is list or kind is torch.Size) and len(value) == 2:
        first, second = value
        if type(first) is int and type(second) is int and first >= least and second >= least:
            return value
    return pair(name, value, least)


def contiguous(variants: Tensor, rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if variants.is_contiguous() and rows.is_contiguous() and cols.is_contiguous():
        return variants, rows, cols
    return variants.contiguous(), rows.contiguous(), cols.contiguous()


def check_out(out: Tensor, patch: Tensor, channel: int, channels: int) -> None:
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
        same_kind("out", out, "patch", patch)
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
