"""Ops for methods that look at many masked images: RISE, Score-CAM, the curves of insertion and deletion.

Masks are never stored at the size of an image: they are sampled bilinearly from small grids while the images are
multiplied, or follow from the order in which a fill takes the place of pixels. :func:`philox` gives the random numbers
that masks are drawn from, the same on every device and in any chunks. None of these functions is differentiable.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import mask_reference as reference
from ._register import define, looped
from .checks import DTYPES, check_float, check_images, check_tensor, two_layouts
from .reference import memory_format
from .window_checks import same_kind
from .window_ops import change
from .window_reference import layout_of

__all__ = ["mask_images", "mask_images_", "philox", "replace_ranked", "replace_ranked_"]

Pair = float | Sequence[float] | None

# ------------------------------------------------------------------------------------------ masked images

_MASKS = "Tensor images, Tensor grids, Tensor image, Tensor offsets"
_SAMPLING = "float scale_h, float scale_w, float shift_h, float shift_w"

mask_images_op = define(
    "mask_images",
    f"({_MASKS}, {_SAMPLING}) -> Tensor",
    reference.mask_images,
    lambda images, grids, *_: torch.empty(
        (grids.shape[0], *images.shape[1:]),
        dtype=images.dtype,
        device=images.device,
        memory_format=layout_of(images),
    ),
    vmap=looped("mask_images"),
    differentiable=False,
)
mask_images_inplace_op = define(
    "mask_images_",
    f"(Tensor(a!) out, {_MASKS}, {_SAMPLING}) -> ()",
    reference.mask_images_,
    lambda *_: None,
    differentiable=False,
)


def mask_images(
    images: Tensor,
    grids: Tensor,
    image: Tensor,
    offsets: Tensor | None = None,
    scale: Pair = None,
    shift: Pair = None,
) -> Tensor:
    """Images times masks that are sampled from grids on the way: ``out[m] = images[image[m]] * mask m``.

    Row y of mask m reads its grid at row ``(y + offsets[m, 0]) * scale + shift``, bilinearly, brought inside where
    that is beyond the grid; columns likewise.

    Args:
        images: ``(B, C, H, W)``, contiguous or channels_last (other strides are copied once).
        grids: ``(M, h, w)``, at least one cell each, of the images' dtype, finite.
        image: ``(M,)`` int64: which image each mask hides. A number beyond the batch counts as the nearest.
        offsets: ``(M, 2)`` int64, rows and columns; None is 0.
        scale: cells a pixel, one number or (vertical, horizontal); None spreads each grid over the image,
            ``h / H`` and ``w / W``.
        shift: where pixel 0 reads the grid, in cells, one number or a pair; None is ``(scale - 1) / 2``.

    The default equals ``F.interpolate(mode="bilinear")``. A crop at the offset out of a grid upsampled to ``s`` pixels
    takes ``scale=h / s``; ``align_corners=True`` is ``scale=(h - 1) / (s - 1), shift=0``.

    Returns:
        ``(M, C, H, W)`` in the layout of ``images``. float64, float32, bfloat16 and float16; positions in float64,
        masks and products in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: the arguments do not fit together.

    Petsiuk, Das & Saenko 2018 (RISE), section 3.2.
    """
    arguments = checked_masks(images, grids, image, offsets, scale, shift)
    return mask_images_op(two_layouts(images), *arguments)


def mask_images_(
    out: Tensor,
    images: Tensor,
    grids: Tensor,
    image: Tensor,
    offsets: Tensor | None = None,
    scale: Pair = None,
    shift: Pair = None,
) -> None:
    """:func:`mask_images` into ``out`` ``(M, C, H, W)``, which must not share memory with the images.

    Fast where ``out`` is contiguous or channels_last; images of the other layout are copied to it once.
    """
    arguments = checked_masks(images, grids, image, offsets, scale, shift)
    _check_out(out, images, grids.shape[0])
    if two_layouts(out) is not out:
        out.copy_(mask_images_op(two_layouts(images), *arguments))
        return
    images = images.contiguous(memory_format=memory_format(out))
    change(mask_images_inplace_op, out, images, *arguments)


def _check_out(out: Tensor, images: Tensor, count: int) -> None:
    check_images("out", out)
    same_kind("out", out, "images", images)
    shape = (count, *images.shape[1:])
    if out.shape != shape:
        raise ValueError(f"out must have the shape {shape}, but it has the shape {tuple(out.shape)}.")
    if 0 in out.stride() and out.numel() > 1:
        raise ValueError(f"out must have memory for each element, but its strides are {out.stride()}.")
    if out.requires_grad and torch.is_grad_enabled():
        raise ValueError("out must not require a gradient where it is changed in place: use torch.no_grad().")


def _fit(images: Tensor, grids: Tensor, image: Tensor, offsets: Tensor) -> bool:
    """All that is asked of the tensors, in one expression: chunks of masks are small and many."""
    try:
        (batch, _, _, _), (count, rows, columns) = images.shape, grids.shape
        return (
            images.dtype in DTYPES
            and images.dtype is grids.dtype
            and image.dtype is offsets.dtype is torch.int64
            and image.shape == (count,)
            and offsets.shape == (count, 2)
            and images.device == grids.device == image.device == offsets.device
            and (count == 0 or (batch > 0 and rows > 0 and columns > 0))
        )
    except (AttributeError, ValueError):  # no tensor, or one of another rank
        return False


def checked_masks(
    images: Tensor, grids: Tensor, image: Tensor, offsets: Tensor | None, scale: Pair, shift: Pair
) -> tuple[Any, ...]:
    """The arguments behind the images as the ops take them: grids, image, offsets, scales and shifts."""
    if not _fit(images, grids, image, offsets):
        offsets = _looked_at(images, grids, image, offsets)
    usual = [cells / max(1, pixels) for cells, pixels in zip(grids.shape[1:], images.shape[2:], strict=True)]
    scales = usual if scale is None else _two_numbers("scale", scale)
    shifts = [(s - 1) / 2 for s in scales] if shift is None else _two_numbers("shift", shift)
    return grids.contiguous(), image.contiguous(), offsets.contiguous(), *scales, *shifts


def _looked_at(images: Tensor, grids: Tensor, image: Tensor, offsets: Tensor | None) -> Tensor:
    """The offsets, if they were the only thing that was left out; else an error that names what is wrong."""
    check_images("images", images)
    check_float("grids", grids)
    same_kind("grids", grids, "images", images)
    if grids.dim() != 3:
        raise ValueError(
            f"grids must have the shape (M, h, w), but they have the shape {tuple(grids.shape)}."
        )
    count = grids.shape[0]
    if offsets is None:
        offsets = torch.zeros((count, 2), dtype=torch.int64, device=images.device)
    for name, table, shape in (("image", image, (count,)), ("offsets", offsets, (count, 2))):
        check_tensor(name, table)
        if table.dtype != torch.int64:
            raise TypeError(f"{name} must be int64, but it is {table.dtype}.")
        if tuple(table.shape) != shape:
            raise ValueError(
                f"{name} must have the shape {shape} for {count} grids, but it has the shape {tuple(table.shape)}."
            )
        if table.device != images.device:
            raise ValueError(
                f"{name} must be on {images.device} as the images are, but it is on {table.device}."
            )
    if count and (not images.shape[0] or 0 in grids.shape):
        raise ValueError(
            f"There must be an image and a cell for each mask, but images has the shape {tuple(images.shape)} and "
            f"grids has the shape {tuple(grids.shape)}."
        )
    return offsets


def _two_numbers(name: str, value: Any) -> list[float]:
    pair = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value] * 2
    if len(pair) != 2 or any(isinstance(v, bool) or not isinstance(v, numbers.Real) for v in pair):
        raise TypeError(f"{name} must be a number or a pair of numbers, but it is {value!r}.")
    pair = [float(v) for v in pair]
    if not all(map(math.isfinite, pair)):
        raise ValueError(f"{name} must be finite, but it is {value!r}.")
    return pair


# ------------------------------------------------------------------------------- pixels by their ranks

_RANKED = "Tensor images, Tensor fills, Tensor ranks, Tensor image, Tensor low, Tensor high"

replace_ranked_op = define(
    "replace_ranked",
    f"({_RANKED}) -> Tensor",
    reference.replace_ranked,
    lambda images, fills, ranks, image, *_: torch.empty(
        (image.shape[0], *images.shape[1:]),
        dtype=images.dtype,
        device=images.device,
        memory_format=layout_of(images),
    ),
    vmap=looped("replace_ranked"),
    differentiable=False,
)
replace_ranked_inplace_op = define(
    "replace_ranked_",
    f"(Tensor(a!) out, {_RANKED}) -> ()",
    reference.replace_ranked_,
    lambda *_: None,
    differentiable=False,
)


def replace_ranked(
    images: Tensor, fills: Tensor, ranks: Tensor, image: Tensor, low: Tensor, high: Tensor
) -> Tensor:
    """Images in which a fill stands where the pixels' ranks are in a range: all variants of a curve in one launch.

    ``out[m]`` is ``fills[image[m]]`` where ``low[m] <= ranks[image[m]] < high[m]`` and ``images[image[m]]`` elsewhere.
    With the ranks of an order of pixels, the most important first, ``[0, k)`` deletes the first k and
    ``[k, H * W)`` shows the first k on the fill. Values are copied, whatever they are.

    Args:
        images: ``(B, C, H, W)``, contiguous or channels_last (other strides are copied once).
        fills: of the images' dtype; each of its four sizes is 1 or the images'. Never copied.
        ranks: ``(B, H, W)`` int32 (int64 are converted once, and must fit): each pixel's position in the order, or that
            of the region it is in.
        image: ``(M,)`` int64: which image each variant is made of. A number beyond the batch counts as the nearest.
        low, high: ``(M,)`` int64: the ranks that show the fill; none where low is not below high.

    Returns:
        ``(M, C, H, W)`` in the layout of ``images``. float64, float32, bfloat16 and float16.

    Raises:
        TypeError, ValueError: the arguments do not fit together.

    Petsiuk, Das & Saenko 2018 (RISE), section 4.2; Samek et al. 2017, section III.
    """
    arguments = _checked_ranks(images, fills, ranks, image, low, high)
    return replace_ranked_op(two_layouts(images), *arguments)


def replace_ranked_(
    out: Tensor, images: Tensor, fills: Tensor, ranks: Tensor, image: Tensor, low: Tensor, high: Tensor
) -> None:
    """:func:`replace_ranked` into ``out`` ``(M, C, H, W)``, which must not share memory with the images and fills.

    Fast where ``out`` is contiguous or channels_last; images of the other layout are copied to it once.
    """
    arguments = _checked_ranks(images, fills, ranks, image, low, high)
    _check_out(out, images, image.shape[0])
    if two_layouts(out) is not out:
        out.copy_(replace_ranked_op(two_layouts(images), *arguments))
        return
    images = images.contiguous(memory_format=memory_format(out))
    change(replace_ranked_inplace_op, out, images, *arguments)


def _checked_ranks(
    images: Tensor, fills: Tensor, ranks: Tensor, image: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, ...]:
    """The arguments behind the images as the ops take them."""
    check_images("images", images)
    check_images("fills", fills)
    same_kind("fills", fills, "images", images)
    if any(size not in (1, whole) for size, whole in zip(fills.shape, images.shape, strict=True)):
        raise ValueError(
            f"fills must broadcast to the images' shape {tuple(images.shape)}, but it has the shape "
            f"{tuple(fills.shape)}."
        )
    for name, table in (("ranks", ranks), ("image", image), ("low", low), ("high", high)):
        check_tensor(name, table)
        kinds = (torch.int32, torch.int64) if name == "ranks" else (torch.int64,)
        if table.dtype not in kinds:
            allowed = "int32 or int64" if name == "ranks" else "int64"
            raise TypeError(f"{name} must be {allowed}, but it is {table.dtype}.")
        if table.device != images.device:
            raise ValueError(
                f"{name} must be on {images.device} as the images are, but it is on {table.device}."
            )
    if ranks.shape != (images.shape[0], *images.shape[2:]):
        raise ValueError(
            f"ranks must have the shape {(images.shape[0], *images.shape[2:])}, one for each pixel, but it has the "
            f"shape {tuple(ranks.shape)}."
        )
    if image.dim() != 1:
        raise ValueError(f"image must have the shape (M,), but it has the shape {tuple(image.shape)}.")
    for name, table in (("low", low), ("high", high)):
        if table.shape != image.shape:
            raise ValueError(
                f"{name} must have the shape {tuple(image.shape)} as image has, but it has the shape "
                f"{tuple(table.shape)}."
            )
    if image.shape[0] and not images.shape[0]:
        raise ValueError(f"There are {image.shape[0]} variants, but no images.")
    ranks = ranks.to(torch.int32).contiguous()
    return fills.expand(images.shape), ranks, image.contiguous(), low.contiguous(), high.contiguous()


# ---------------------------------------------------------------------------------------- random numbers

philox_op = define(
    "philox",
    "(Tensor streams, SymInt words, int seed, int block) -> Tensor",
    reference.philox,
    lambda streams, words, seed, block: streams.new_empty(streams.shape[0], words),
    vmap=looped("philox"),
    differentiable=False,
)


def philox(streams: Tensor, words: int, seed: int = 0, block: int = 0) -> Tensor:
    """Random words by Philox 4x32-10: stream n is the same whatever else is drawn beside it, and on every device.

    Args:
        streams: ``(n,)`` int64: which streams, each a sequence of its own.
        words: how many numbers of each.
        seed: another seed, other streams. From 0 to ``2**64 - 1``.
        block: skips the first ``4 * block`` words. From 0 to ``2**64 - 1``.

    Returns:
        ``(n, words)`` int64, each number from 0 to ``2**32 - 1``, uniform.

    Raises:
        TypeError, ValueError: the arguments are not of these kinds.

    Salmon, Moraes, Dror & Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3". The counter is the block's number
    in its two lower words and the stream's in the upper ones, the key is the seed, lower word first.
    """
    check_tensor("streams", streams)
    if streams.dtype != torch.int64:
        raise TypeError(f"streams must be int64, but they are {streams.dtype}.")
    if streams.dim() != 1:
        raise ValueError(f"streams must have the shape (n,), but they have the shape {tuple(streams.shape)}.")
    bounds = {"words": (words, 2**63), "seed": (seed, 2**64), "block": (block, 2**64)}
    for name, (value, end) in bounds.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Integral | torch.SymInt):
            raise TypeError(f"{name} must be an int, but it is {value!r}.")
        if not 0 <= value < end:
            raise ValueError(f"{name} must be from 0 to 2**{end.bit_length() - 1} - 1, but it is {value}.")
    return philox_op(streams.contiguous(), words, *(_signed(int(value)) for value in (seed, block)))


def _signed(value: int) -> int:
    """The number with the same 64 bits, as schemas have no unsigned ones."""
    return value - 2**64 if value >= 2**63 else value
