"""3x3 convolutions with stride 1 by Winograd's minimal filtering F(2x2, 3x3): 4/9 of the multiplications.

Two ops around 16 matrix products: :func:`winograd_input` brings the 4x4 tiles of the input to Winograd's domain,
:func:`winograd_output` brings the products back, with bias and activation. Source: Lavin & Gray, "Fast Algorithms for
Convolutional Neural Networks" (2015), section 4.1. In float32 the rounding error is of the size of a direct
convolution's: the transforms only add and subtract, and halve sums of weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._register import define
from .checks import Pair, check_images, check_tensor, pair

INPUT = torch.tensor([[1.0, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]], dtype=torch.float64)
WEIGHT = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
CACHED = 16 << 20  # bytes of tiles and products at once
OUTPUT = torch.tensor([[1.0, 1, 1, 0], [0, 1, -1, -1]], dtype=torch.float64)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _input_reference(x: Tensor, padding: Sequence[int]) -> Tensor:
    height, width = (n + 2 * p - 2 for n, p in zip(x.shape[2:], padding, strict=True))
    edge = (padding[1], padding[1] + width % 2, padding[0], padding[0] + height % 2)
    tiles = F.pad(_wide(x), edge).unfold(2, 4, 2).unfold(3, 4, 2)  # (N, C, rows, cols, 4, 4)
    matrix = INPUT.to(tiles)
    return torch.einsum("ij,nchwjk,lk->nhwilc", matrix, tiles, matrix).reshape(-1, 16, x.shape[1]).to(x.dtype)


def _output_reference(products: Tensor, bias: Tensor | None, size: Sequence[int], low: float, high: float) -> Tensor:
    count, height, width = size
    channels = products.shape[2]
    tiles = _wide(products).view(count, -(-height // 2), -(-width // 2), 4, 4, channels)
    matrix = OUTPUT.to(tiles)
    out = torch.einsum("ij,nhwjkc,lk->nhiwlc", matrix, tiles, matrix)
    out = out.reshape(count, out.shape[1] * 2, out.shape[3] * 2, channels)[:, :height, :width]
    out = out if bias is None else out + _wide(bias)
    return out.clamp(low, high).to(products.dtype).contiguous().permute(0, 3, 1, 2)


def _tiles(x: Tensor, padding: Sequence[int]) -> int:
    height, width = (n + 2 * p - 2 for n, p in zip(x.shape[2:], padding, strict=True))
    return x.shape[0] * ((height + 1) // 2) * ((width + 1) // 2)


winograd_input_op = define(
    "winograd_input",
    "(Tensor x, SymInt[] padding) -> Tensor",
    torch.no_grad()(_input_reference),
    lambda x, padding: x.new_empty(_tiles(x, padding), 16, x.shape[1]),
)
winograd_output_op = define(
    "winograd_output",
    "(Tensor products, Tensor? bias, SymInt[] size, float low, float high) -> Tensor",
    torch.no_grad()(_output_reference),
    lambda products, bias, size, low, high: products.new_empty(
        size[0], size[1], size[2], products.shape[2]
    ).permute(0, 3, 1, 2),
)


def winograd_weight(weight: Tensor) -> Tensor:
    """Weights (Co, Ci, 3, 3) of a convolution in Winograd's domain, (16, Ci, Co), computed in float64."""
    check_images("weight", weight)
    if tuple(weight.shape[2:]) != (3, 3):
        raise ValueError(f"weight must be (Co, Ci, 3, 3), but its shape is {tuple(weight.shape)}.")
    matrix = WEIGHT.to(weight.device)
    wide = torch.einsum("ij,ocjk,lk->ilco", matrix, weight.detach().double(), matrix)
    return wide.reshape(16, weight.shape[1], weight.shape[0]).to(weight.dtype).contiguous()


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
    padding = pair("padding", padding, 0)
    if min(n + 2 * p for n, p in zip(x.shape[2:], padding, strict=True)) < 3:
        raise ValueError(f"x must be at least 3x3 with its padding, but its shape is {tuple(x.shape)}.")
    return winograd_input_op(x.contiguous(memory_format=torch.channels_last), padding)


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
    """
    check_tensor("products", products)
    if products.dim() != 3 or products.shape[1] != 16:
        raise ValueError(f"products must be (tiles, 16, C), but the shape is {tuple(products.shape)}.")
    if len(size) != 3 or products.shape[0] != size[0] * -(-size[1] // 2) * -(-size[2] // 2):
        raise ValueError(f"size must be (N, h, w) with {products.shape[0]} tiles, but it is {tuple(size)}.")
    if bias is not None and (bias.dtype != products.dtype or tuple(bias.shape) != (products.shape[2],)):
        raise ValueError(
            f"bias must be ({products.shape[2]},) in {products.dtype}, but it is {tuple(bias.shape)} in {bias.dtype}."
        )
    return winograd_output_op(products.contiguous(), bias, list(size), low, high)


def winograd_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    padding: Pair = 0,
    low: float = -math.inf,
    high: float = math.inf,
) -> Tensor:
    """A 3x3 convolution with stride 1, then a clamp: (N, Ci, H, W) -> (N, Co, h, w), channels_last.

    ``weight`` is :func:`winograd_weight`'s (16, Ci, Co). A few images at a time, so that the tiles stay in the cache.
    """
    vertical, horizontal = padding = pair("padding", padding, 0)
    height, width = x.shape[2] + 2 * vertical - 2, x.shape[3] + 2 * horizontal - 2
    tiles = -(-height // 2) * -(-width // 2)
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
    """Whether Winograd's way is the faster one on a CPU (measured: 1.3 to 1.9 times from 128 channels on, slower below)."""
    return min(channels, results) >= 128
