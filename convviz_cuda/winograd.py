"""3x3 convolutions with stride 1 by Winograd's minimal filtering F(2x2, 3x3): 4/9 of the multiplications.

On the CPU in float32 one op does all of it, some tiles at a time in the nearest caches, with weights that were packed
for it (:func:`winograd_packed`). Elsewhere there are two ops around 16 matrix products of a library:
:func:`winograd_input` brings the 4x4 tiles of the input to Winograd's domain, :func:`winograd_output` brings the
products back, with bias and activation. Source: Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks"
(2015), section 4.1. In float32 the rounding error is of the size of a direct convolution's: the transforms only add and
subtract, and halve sums of weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _backend
from ._register import define, looped
from .checks import Pair, check_float, check_images, pair
from .reference import channels_last
from .window_checks import check_bounds, same_kind
from .window_ops import change
from .window_reference import accumulator, clamp

__all__ = [
    "winograd_conv2d",
    "winograd_conv2d_",
    "winograd_input",
    "winograd_output",
    "winograd_packed",
    "winograd_weight",
]

WEIGHT = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
CACHED = 16 << 20  # bytes of tiles and products at once
WASTE = 1.8  # results that the tiles compute for one that is there: up to this many it is the faster way
PACKED_FOR = 128  # tiles from which on packing the weights at each call is worth it
BLOCK = 32  # results that lie together in packed weights: the CPU kernel's kWinogradBlock


# The transforms term by term, as the kernels have them: a product with a matrix would make NaN of its zeros.


def _input_along(values: Tensor, dim: int) -> Tensor:
    a, b, c, d = values.unbind(dim)
    return torch.stack([a - c, b + c, c - b, b - d], dim)


def _output_along(values: Tensor, dim: int) -> Tensor:
    a, b, c, d = values.unbind(dim)
    return torch.stack([a + b + c, b - c - d], dim)


@torch.no_grad()
def _input_reference(x: Tensor, padding: Sequence[int]) -> Tensor:
    height, width = result_size(x, padding)
    edge = (padding[1], padding[1] + width % 2, padding[0], padding[0] + height % 2)
    tiles = (
        F.pad(x.to(accumulator(x.dtype)), edge).unfold(2, 4, 2).unfold(3, 4, 2)
    )  # (N, C, rows, cols, 4, 4)
    values = _input_along(_input_along(tiles, 5), 4).permute(0, 2, 3, 4, 5, 1)
    return values.reshape(_tiles(x, padding), 16, x.shape[1]).to(x.dtype).contiguous()


@torch.no_grad()
def _output_reference(
    products: Tensor, bias: Tensor | None, size: Sequence[int], low: float, high: float
) -> Tensor:
    count, height, width = size
    rows, cols, channels = (height + 1) // 2, (width + 1) // 2, products.shape[2]
    values = products.to(accumulator(products.dtype)).view(count, rows, cols, 4, 4, channels)
    values = _output_along(_output_along(values, 4), 3).permute(0, 1, 3, 2, 4, 5)
    values = values.reshape(count, 2 * rows, 2 * cols, channels)[:, :height, :width]
    values = values if bias is None else values + bias.to(values.dtype)
    return clamp(values, low, high).to(products.dtype).contiguous().permute(0, 3, 1, 2)


def result_size(x: Tensor, padding: Sequence[int]) -> tuple[int, int]:
    """Height and width of the convolution's result."""
    height, width = (n + 2 * p - 2 for n, p in zip(x.shape[2:], padding, strict=True))
    return height, width


def _tiles(x: Tensor, padding: Sequence[int]) -> int:
    height, width = result_size(x, padding)
    return x.shape[0] * ((height + 1) // 2) * ((width + 1) // 2)


@torch.no_grad()
def _conv_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    results: int,
    padding: Sequence[int],
    low: float,
    high: float,
) -> Tensor:
    wide = [None if t is None else t.to(accumulator(x.dtype)) for t in (x, weight, bias)]
    unpacked = wide[1].permute(1, 2, 0, 3).flatten(2)[:, :, :results]
    products = torch.bmm(_input_reference(wide[0], padding).transpose(0, 1), unpacked).transpose(0, 1)
    size = x.shape[0], *result_size(x, padding)
    return _output_reference(products, wide[2], size, low, high).to(x.dtype)


@torch.no_grad()
def _conv_into_reference(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    results: int,
    padding: Sequence[int],
    channel: int,
    low: float,
    high: float,
) -> None:
    out[:, channel : channel + results] = _conv_reference(x, weight, bias, results, padding, low, high)


@torch.no_grad()
def _pack_reference(weight: Tensor, flipped: bool) -> Tensor:
    return _blocks(winograd_weight(weight.transpose(0, 1).flip(2, 3) if flipped else weight))


def _blocks(weight: Tensor) -> Tensor:
    """(16, Ci, Co) as (ceil(Co / 32), 16, Ci, 32)."""
    whole = F.pad(weight, (0, -weight.shape[2] % BLOCK))
    return whole.unflatten(2, (-1, BLOCK)).permute(2, 0, 1, 3).contiguous()


REFERENCES = {
    "winograd_conv2d": _conv_reference,
    "winograd_conv2d_": _conv_into_reference,
    "winograd_input": _input_reference,
    "winograd_output": _output_reference,
    "winograd_packed": _pack_reference,
}

winograd_input_op = define(
    "winograd_input",
    "(Tensor x, SymInt[] padding) -> Tensor",
    _input_reference,
    lambda x, padding: x.new_empty(_tiles(x, padding), 16, x.shape[1]),
    vmap=looped("winograd_input"),
    differentiable=False,
)
winograd_output_op = define(
    "winograd_output",
    "(Tensor products, Tensor? bias, SymInt[] size, float low, float high) -> Tensor",
    _output_reference,
    lambda products, bias, size, low, high: products.new_empty(
        size[0], size[1], size[2], products.shape[2]
    ).permute(0, 3, 1, 2),
    vmap=looped("winograd_output"),
    differentiable=False,
)
winograd_conv2d_op = define(
    "winograd_conv2d",
    "(Tensor x, Tensor weight, Tensor? bias, SymInt results, SymInt[] padding, float low, float high) -> Tensor",
    _conv_reference,
    lambda x, weight, bias, results, padding, *_: x.new_empty(
        x.shape[0], *result_size(x, padding), results
    ).permute(0, 3, 1, 2),
    vmap=looped("winograd_conv2d"),
    differentiable=False,
)
winograd_conv2d_inplace_op = define(
    "winograd_conv2d_",
    "(Tensor(a!) out, Tensor x, Tensor weight, Tensor? bias, SymInt results, SymInt[] padding, SymInt channel,"
    " float low, float high) -> ()",
    _conv_into_reference,
    lambda *_: None,
    differentiable=False,
)
winograd_packed_op = define(
    "winograd_packed",
    "(Tensor weight, bool flipped) -> Tensor",
    _pack_reference,
    lambda weight, flipped: weight.new_empty(
        -(-weight.shape[1 if flipped else 0] // BLOCK), 16, weight.shape[0 if flipped else 1], BLOCK
    ),
    vmap=looped("winograd_packed"),
    differentiable=False,
)


def _check_filters(weight: Tensor) -> None:
    check_images("weight", weight)
    if tuple(weight.shape[2:]) != (3, 3):
        raise ValueError(f"weight must be (Co, Ci, 3, 3), but its shape is {tuple(weight.shape)}.")


def winograd_weight(weight: Tensor) -> Tensor:
    """Weights (Co, Ci, 3, 3) of a convolution in Winograd's domain, (16, Ci, Co), computed in float64."""
    _check_filters(weight)
    matrix = WEIGHT.to(weight.device)
    wide = torch.einsum("ij,ocjk,lk->ilco", matrix, weight.detach().double(), matrix)
    return wide.reshape(16, weight.shape[1], weight.shape[0]).to(weight.dtype).contiguous()


def winograd_packed(weight: Tensor, flipped: bool = False) -> Tensor:
    """Weights (Co, Ci, 3, 3) in Winograd's domain as the CPU's kernel reads them: (ceil(Co / 32), 16, Ci, 32).

    Float32 on the CPU. Computed in float64 and rounded once; what is beyond Co is 0.

    flipped: the weights of the convolution's data gradient, (ceil(Ci / 32), 16, Co, 32): with the padding ``2 - p`` it
    takes the gradient of the result of a convolution with padding p to that of its input.
    """
    _check_filters(weight)
    if weight.dtype != torch.float32 or weight.device.type not in ("cpu", "meta"):
        raise TypeError(f"weight must be float32 on the CPU, but it is {weight.dtype} on {weight.device}.")
    return winograd_packed_op(weight, bool(flipped))


def serves(*tensors: Tensor) -> bool:
    """Whether the CPU's kernel takes tensors of these kinds, and nothing asks for another result than float32's."""
    return (
        _backend.build_info() != {}
        and all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)
        and not torch.is_autocast_enabled("cpu")
    )


def as_channels_last(x: Tensor) -> Tensor:
    # Spelled so that it holds under vmap too.
    return x if channels_last(x) else x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def _checked_padding(x: Tensor, padding: Pair) -> list[int]:
    pads = pair("padding", padding, 0)
    if min(n + 2 * p for n, p in zip(x.shape[2:], pads, strict=True)) < 3:
        raise ValueError(
            f"x must be at least 3x3 with its padding, but its shape is {tuple(x.shape)} "
            f"and the padding is {padding!r}."
        )
    return pads


def winograd_input(x: Tensor, padding: Pair = 0) -> Tensor:
    """The input's tiles in Winograd's domain.

    Args:
        x: (N, C, H, W), floating point, channels_last (brought to it if not).
        padding: zeros around the input, an int or (vertical, horizontal).

    Returns:
        (tiles, 16, C), tiles = N * ceil(h / 2) * ceil(w / 2) for an output of h x w.

    Raises:
        TypeError, ValueError: x is no batch of floating-point images, or smaller than 3x3 with its padding.
    """
    check_images("x", x)
    padding = _checked_padding(x, padding)
    return winograd_input_op(as_channels_last(x), padding)


def winograd_output(
    products: Tensor,
    size: Sequence[int],
    bias: Tensor | None = None,
    low: float = -math.inf,
    high: float = math.inf,
) -> Tensor:
    """Products in Winograd's domain as maps.

    Args:
        products: (tiles, 16, C).
        size: (N, h, w) of the result, with N * ceil(h / 2) * ceil(w / 2) tiles.
        bias: (C,), added before the result is clamped to low and high (NaN stays NaN).

    Returns:
        (N, C, h, w), channels_last.

    Raises:
        TypeError, ValueError: products, size, bias or bounds do not fit together.
    """
    check_float("products", products)
    if products.dim() != 3 or products.shape[1] != 16:
        raise ValueError(f"products must be (tiles, 16, C), but the shape is {tuple(products.shape)}.")
    size = list(size)
    if len(size) != 3 or any(not isinstance(n, int | torch.SymInt) or isinstance(n, bool) for n in size):
        raise TypeError(f"size must be three ints, (N, h, w), but it is {tuple(size)}.")
    if min(size) < 0 or products.shape[0] != size[0] * ((size[1] + 1) // 2) * ((size[2] + 1) // 2):
        raise ValueError(f"size must be (N, h, w) with {products.shape[0]} tiles, but it is {tuple(size)}.")
    bias = bias_of_results(bias, "products", products, products.shape[2])
    check_bounds(low, high)
    return winograd_output_op(products.contiguous(), bias, size, low, high)


def bias_of_results(bias: Tensor | None, name: str, like: Tensor, channels: int) -> Tensor | None:
    if bias is None:
        return None
    check_float("bias", bias)
    same_kind("bias", bias, name, like)
    if bias.dim() != 1 or bias.shape[0] != channels:
        raise ValueError(f"bias must have the shape ({channels},), but it has the shape {tuple(bias.shape)}.")
    return bias.contiguous()


@torch.no_grad()
def winograd_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    padding: Pair = 0,
    low: float = -math.inf,
    high: float = math.inf,
    results: int | None = None,
) -> Tensor:
    """A 3x3 convolution with stride 1, then a clamp: (N, Ci, H, W) -> (N, Co, h, w), channels_last.

    What is not finite in the input makes exactly those results not finite that a direct convolution does, but may make
    NaN of what were infinities.

    Args:
        x: (N, Ci, H, W), floating point; at least 3x3 with its padding.
        weight: :func:`winograd_weight`'s (16, Ci, Co), of x's dtype; or, for float32 on the CPU,
            :func:`winograd_packed`'s, which saves packing it at each call.
        bias: (Co,), added before the result is clamped to low and high (NaN stays NaN).
        padding: zeros around the input, an int or (vertical, horizontal).
        results: Co, for a packed weight; None: all of its blocks.

    Raises:
        TypeError, ValueError: the arguments do not fit together.
    """
    weight, bias, count, padding = _checked(x, weight, bias, padding, low, high, results)
    if weight.dim() == 4:
        return winograd_conv2d_op(as_channels_last(x), weight, bias, count, padding, low, high)
    return _around_products(x, weight, bias, padding, low, high)


def winograd_conv2d_(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    padding: Pair = 0,
    channel: int = 0,
    low: float = -math.inf,
    high: float = math.inf,
    results: int | None = None,
) -> None:
    """:func:`winograd_conv2d` into ``out[:, channel : channel + Co]``, ``out`` being (N, channels, h, w).

    How branches that are concatenated are computed in their place: directly where ``out`` is channels_last. It must not
    share memory with the rest.
    """
    weight, bias, count, padding = _checked(x, weight, bias, padding, low, high, results)
    check_place(out, x, channel, count, result_size(x, padding))
    with torch.no_grad():
        x = as_channels_last(x)
        if weight.dim() == 4 and as_channels_last(out) is out:
            change(winograd_conv2d_inplace_op, out, x, weight, bias, count, padding, channel, low, high)
        elif weight.dim() == 4:
            found = winograd_conv2d_op(x, weight, bias, count, padding, low, high)
            out[:, channel : channel + count] = found
        else:
            out[:, channel : channel + count] = _around_products(x, weight, bias, padding, low, high)


def _checked(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: Pair,
    low: float,
    high: float,
    results: int | None,
) -> tuple[Tensor, Tensor | None, int, list[int]]:
    """The weight, packed where the CPU's kernel serves, the bias, how many results, and the padding."""
    check_images("x", x)
    check_float("weight", weight)
    same_kind("weight", weight, "x", x)
    packed = weight.dim() == 4
    shape = (weight.shape[0], 16, x.shape[1], BLOCK) if packed else (16, x.shape[1], *weight.shape[2:])
    if weight.dim() not in (3, 4) or tuple(weight.shape) != shape:
        raise ValueError(
            f"weight must be (16, {x.shape[1]}, Co), as winograd_weight makes it of (Co, {x.shape[1]}, 3, 3), "
            f"or that packed, but its shape is {tuple(weight.shape)}."
        )
    whole = weight.shape[0] * BLOCK if packed else weight.shape[2]
    count, bias = checked_results(x, weight, whole, packed, results, bias, low, high)
    padding = _checked_padding(x, padding)
    if x.device.type == "cpu" and x.dtype == torch.float32:
        weight = weight.contiguous() if packed else _blocks(weight)
    elif packed:
        raise ValueError(
            f"Packed weights are for float32 on the CPU, but x is {x.dtype} on {x.device}: give (16, Ci, Co)."
        )
    return weight, bias, count, padding


def checked_results(
    x: Tensor,
    weight: Tensor,
    whole: int,
    packed: bool,
    results: int | None,
    bias: Tensor | None,
    low: float,
    high: float,
) -> tuple[int, Tensor | None]:
    """How many results a weight gives, of which a packed one has ``whole`` with those that fill up its last block, and
    their bias; what is done to them is checked too."""
    count = whole if results is None else results
    if count != whole and not (packed and whole - BLOCK < count < whole):
        raise ValueError(
            f"results must be the weight's, but it is {results!r} for a shape {tuple(weight.shape)}."
        )
    check_bounds(low, high)
    return count, bias_of_results(bias, "x", x, count)


def check_place(out: Tensor, x: Tensor, channel: int, results: int, size: Sequence[int]) -> None:
    """Whether the results of a convolution of x have a place in ``out`` from a channel on."""
    check_images("out", out)
    same_kind("out", out, "x", x)
    if (out.shape[0], *out.shape[2:]) != (x.shape[0], *size):
        raise ValueError(
            f"out must have {x.shape[0]} images of {size[0]} x {size[1]}, but its shape is {tuple(out.shape)}."
        )
    if isinstance(channel, bool) or not isinstance(channel, int | torch.SymInt):
        raise TypeError(f"channel must be an int, but it is {channel!r}.")
    if not 0 <= channel <= out.shape[1] - results:
        raise ValueError(
            f"channel must leave room for {results} channels in out's {out.shape[1]}, but it is {channel}."
        )
    if 0 in out.stride() and out.numel() > 1:
        raise ValueError(f"out must have memory for each element, but its strides are {out.stride()}.")
    if out.requires_grad and torch.is_grad_enabled():
        raise ValueError("out must not require a gradient where it is changed in place: use torch.no_grad().")


def _around_products(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int], low: float, high: float
) -> Tensor:
    """A few images at a time, so that the tiles stay in the cache."""
    height, width = result_size(x, padding)
    tiles = _tiles(x[:1], padding)
    channels, results = weight.shape[1:]
    each = tiles * 16 * (channels + results) * x.element_size()
    at_once = max(1, CACHED // max(1, each))
    products = x.new_empty(min(at_once, max(1, x.shape[0])) * tiles, 16, results)
    parts = []
    for part in x.split(at_once):
        there = winograd_input(part, padding)
        now = products[: there.shape[0]]
        torch.bmm(there.transpose(0, 1), weight, out=now.transpose(0, 1))
        parts.append(winograd_output(now, (part.shape[0], height, width), bias, low, high))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def pays(channels: int, results: int) -> bool:
    """Whether Winograd's way is the faster one in float32 on a CPU, with packed weights.

    Measured on maps of 7 to 224 pixels: 1.5 to 1.9 times as fast as oneDNN (benchmarks/test_ops.py, winograd_conv2d).
    """
    return channels >= 16 and results >= 32


def fits(height: int, width: int) -> bool:
    """Whether 2x2 tiles do not waste at the edges of a result of this size what they save."""
    return (height + height % 2) * (width + width % 2) <= WASTE * height * width


def convolves(
    x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int, flipped: bool = False
) -> bool:
    """Whether the CPU's kernel does a convolution faster than the library, packing the weights included.

    flipped: x is the gradient of the convolution's result, and that of its input is wanted.
    """
    geometry = (*weight.shape[2:], *stride, *dilation, groups)
    if geometry != (3, 3, 1, 1, 1, 1, 1) or not serves(x, weight) or not channels_last(x) or max(padding) > 2:
        return False
    channels, results = weight.shape[:2] if flipped else weight.shape[1::-1]
    pads = [2 - p for p in padding] if flipped else padding
    size = result_size(x, pads)
    if x.shape[1] != channels or not x.numel() or min(size) < 1:
        return False
    return _tiles(x, pads) >= PACKED_FOR and pays(channels, results) and fits(*size)
