"""The rows of Winograd's two transforms, and the truth about them and about the convolution they make up.

The truth adds up the definition's terms in float64: B' d B of each 4x4 tile d, A' m A of its 16 products m.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
import torch.nn.functional as F
from direct_conv_cases import into_truth
from op_case import Case
from op_truth import F64, Band, two
from torch import Tensor
from window_truth import activated, banded

INF = float("inf")
# Lavin & Gray 2015, section 4.1: the transposed matrices of F(2x2, 3x3), row by row.
INPUT = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
OUTPUT = ((1, 1, 1, 0), (0, 1, -1, -1))
WEIGHT = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))


def terms(matrix, tile: np.ndarray, i: int, j: int) -> list[np.ndarray]:
    """What is added up for the element (i, j) of M tile M'. A factor of zero is no term."""
    places = itertools.product(range(len(matrix[0])), repeat=2)
    factors = [(matrix[i][k] * matrix[j][m], tile[k, m]) for k, m in places]
    return [factor * value for factor, value in factors if factor]


def added(values: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The sum, and that of the magnitudes where it is finite."""
    with np.errstate(all="ignore"):
        total = np.sum(values, 0)
        return total, np.where(np.isfinite(total), np.sum(np.abs(values), 0), 0)


def winograd_input_truth(x: Tensor, *, padding=0) -> Band:
    vertical, horizontal = two(padding)
    count, channels, height, width = x.shape
    rows, cols = (-(-(n + 2 * p - 2) // 2) for n, p in ((height, vertical), (width, horizontal)))
    padded = np.zeros((count, 2 * rows + 2, 2 * cols + 2, channels))
    inside = np.s_[:, vertical : vertical + height, horizontal : horizontal + width]
    padded[inside] = x.double().permute(0, 2, 3, 1).numpy()
    out = np.zeros((count * rows * cols, 16, channels))
    magnitude = np.zeros_like(out)
    for tile, (n, row, col) in enumerate(np.ndindex(count, rows, cols)):
        values = padded[n, 2 * row : 2 * row + 4, 2 * col : 2 * col + 4]
        for i, j in np.ndindex(4, 4):
            out[tile, 4 * i + j], magnitude[tile, 4 * i + j] = added(terms(INPUT, values, i, j))
    return banded(out, magnitude, 4, x.dtype)


def winograd_output_truth(products: Tensor, bias: Tensor | None = None, *, size, low=-INF, high=INF) -> Band:
    count, height, width = size
    rows, cols, channels = -(-height // 2), -(-width // 2), products.shape[2]
    tiles = products.double().view(count, rows, cols, 4, 4, channels).numpy()
    offset = [] if bias is None else [bias.double().numpy()]
    out = np.zeros((count, channels, height, width))
    magnitude = np.zeros_like(out)
    for n, y, x in np.ndindex(count, height, width):
        total, magnitude[n, :, y, x] = added(
            terms(OUTPUT, tiles[n, y // 2, x // 2], y % 2, x % 2) + offset,
        )
        out[n, :, y, x] = activated(total, None, low, high)
    return banded(out, magnitude, 10, products.dtype)


def winograd_conv2d_truth(x: Tensor, weight: Tensor, bias=None, *, padding=0, low=-INF, high=INF) -> Band:
    """The direct convolution; how far off Winograd's way may be follows from the magnitudes of its own terms."""
    wide = [None if t is None else t.double() for t in (x, weight, bias)]
    vertical, horizontal = two(padding)
    if x.numel():
        value = F.conv2d(*wide, padding=padding)
    else:  # of nothing at all PyTorch convolves only some shapes
        size = [n + 2 * p - 2 for n, p in zip(x.shape[2:], (vertical, horizontal), strict=True)]
        value = torch.zeros(x.shape[0], weight.shape[0], *size, dtype=F64)
        value = value if bias is None else value + wide[2].view(-1, 1, 1)
    bottom, right = (n % 2 for n in value.shape[2:])
    edge = (horizontal, horizontal + right, vertical, vertical + bottom)
    tiles = F.pad(wide[0].abs().nan_to_num(0, 0, 0), edge).unfold(2, 4, 2).unfold(3, 4, 2)
    b, g, a = (torch.tensor(m, dtype=F64).abs() for m in (INPUT, WEIGHT, OUTPUT))
    tiles = torch.einsum("ij,nchwjk,lk->nchwil", b, tiles, b)
    kernels = torch.einsum("ij,ocjk,lk->ocil", g, wide[1].abs(), g)
    products = torch.einsum("nchwil,ocil->nohwil", tiles, kernels)
    magnitude = torch.einsum("ij,nohwjk,lk->nohiwl", a, products, a).flatten(4, 5).flatten(2, 3)
    magnitude = magnitude[:, :, : value.shape[2], : value.shape[3]]
    if bias is not None:
        magnitude = magnitude + wide[2].abs().view(-1, 1, 1)
    # Tiles, weights and products are stored, and a library may add up half precision in that type.
    unit = torch.finfo(x.dtype).eps * (x.shape[1] + 20)
    value = torch.where(value <= low, low, torch.where(value >= high, high, value))
    return Band(value, unit * magnitude + torch.finfo(x.dtype).smallest_normal * (x.shape[1] + 20))


def winograd_tiles_truth(x: Tensor, weight: Tensor, bias=None, *, padding=0, low=-INF, high=INF) -> Band:
    """The convolution by weights in Winograd's domain, (16, Ci, Co): the definition's sums in float64."""
    vertical, horizontal = two(padding)
    height, width = x.shape[2] + 2 * vertical - 2, x.shape[3] + 2 * horizontal - 2
    edge = (horizontal, horizontal + width % 2, vertical, vertical + height % 2)
    b, a = (torch.tensor(m, dtype=F64) for m in (INPUT, OUTPUT))

    def through(x, weight, b, a, bias):
        tiles = F.pad(x, edge).unfold(2, 4, 2).unfold(3, 4, 2)
        tiles = torch.einsum("ij,nchwjk,lk->nchwil", b, tiles, b)
        products = torch.einsum("nchwil,ilco->nohwil", tiles, weight.unflatten(0, (4, 4)))
        maps = torch.einsum("ij,nohwjk,lk->nohiwl", a, products, a).flatten(4, 5).flatten(2, 3)
        maps = maps[:, :, :height, :width]
        return maps if bias is None else maps + bias.view(-1, 1, 1)

    wide = [None if t is None else t.double() for t in (x, weight, bias)]
    value = through(wide[0], wide[1], b, a, wide[2]).clamp(low, high)
    sizes = [None if t is None else t.abs() for t in wide]
    magnitude = through(sizes[0], sizes[1], b.abs(), a.abs(), sizes[2])
    unit = torch.finfo(x.dtype).eps * (x.shape[1] + 20)
    return Band(value, unit * magnitude + torch.finfo(x.dtype).smallest_normal)


def winograd_packed_truth(weight: Tensor, *, flipped=False) -> Band:
    turned = weight.double().transpose(0, 1).flip(2, 3) if flipped else weight.double()
    g = torch.tensor(WEIGHT, dtype=F64)
    value = torch.einsum("ij,ocjk,lk->ilco", g, turned, g).flatten(0, 1)
    value = F.pad(value, (0, -value.shape[2] % 32)).unflatten(2, (-1, 32)).permute(2, 0, 1, 3)
    return Band(value.contiguous(), torch.finfo(weight.dtype).eps * value.abs() + 1e-12)


# Input's shape and padding: odd and even results, vectors' tails, tiles that lie in the padding alone.
INPUTS = {
    "typical": ((2, 17, 5, 8), 1),
    "16-channels": ((2, 16, 6, 5), (0, 1)),
    "unpadded": ((1, 5, 7, 4), 0),
    "wide-padding": ((1, 3, 2, 3), (4, 3)),
    "1-channel": ((2, 1, 5, 4), 1),
    "1-tile": ((2, 6, 3, 4), 0),
    "1-result": ((3, 8, 3, 3), 0),
    "1-pixel": ((3, 4, 1, 1), 1),
    "row": ((2, 3, 1, 9), (1, 0)),
    "67-channels": ((1, 67, 4, 3), 1),
    "no-rows": ((2, 3, 0, 5), 2),
    "no-images": ((0, 4, 5, 5), 1),
    "no-channels": ((2, 0, 5, 5), 1),
}
# Channels, and the result's images, height and width.
OUTPUTS = {
    "typical": (17, (2, 5, 8)),
    "16-channels": (16, (2, 6, 3)),
    "5-channels": (5, (1, 1, 7)),
    "3-channels": (3, (2, 2, 2)),
    "1-channel": (1, (2, 3, 5)),
    "1-result": (8, (3, 1, 1)),
    "67-channels": (67, (1, 3, 2)),
    "no-rows": (4, (2, 0, 3)),
    "no-images": (4, (0, 5, 5)),
    "no-channels": (0, (2, 4, 5)),
}


def _output_case(label: str, options, bias: bool) -> Case:
    channels, (count, height, width) = OUTPUTS[label]
    tiles = count * ((height + 1) // 2) * ((width + 1) // 2)

    def inputs(draw):
        products = draw(tiles, 16, channels)
        return (products, draw(channels)) if bias else (products,)

    name = "-".join([label, *(f"{k}={v}" for k, v in options.items()), *["bias"] * bias])
    given = {"size": (count, height, width), **options}
    return Case(
        "winograd_output", name, inputs, winograd_output_truth, given, 0, last="bias" if bias else None
    )


def _conv_case(label: str, results: int, bias: bool, options, channel: int | None = None) -> Case:
    shape, padding = INPUTS[label]
    size = [n + 2 * p - 2 for n, p in zip(shape[2:], two(padding), strict=True)]
    given = {"padding": padding, **options, **({} if channel is None else {"channel": channel})}

    def inputs(draw):
        tensors = draw(*shape), draw(16, shape[1], results)
        if channel is not None:
            tensors = draw(shape[0], results + channel + 2, *size), *tensors
        return (*tensors, draw(results)) if bias else tensors

    return Case(
        "winograd_conv2d" if channel is None else "winograd_conv2d_", f"{label}-{results}", inputs,
        winograd_tiles_truth if channel is None else into_truth(winograd_tiles_truth), given,
        special=False, signed=False, last="bias" if bias else None,
    )  # fmt: skip


WINOGRAD_CASES = [
    _conv_case("typical", 40, True, {"low": 0.0}),
    _conv_case("67-channels", 17, False, {}),
    _conv_case("typical", 40, True, {"low": 0.0}, 3),
    _conv_case("67-channels", 17, False, {"high": 0.5}, 0),
    _conv_case("1-pixel", 32, True, {"low": -1.0, "high": 1.0}),
    *(
        Case(
            "winograd_packed",
            f"{results}x{channels}-{flipped}",
            lambda draw, shape=(results, channels, 3, 3): (draw(*shape),),
            winograd_packed_truth,
            {"flipped": flipped},
            special=False,
            signed=False,
            dtypes=(torch.float32,),
        )
        for results, channels in ((40, 17), (32, 8), (5, 1))
        for flipped in (False, True)
    ),  # fmt: skip
    *(
        Case(
            "winograd_input",
            label,
            lambda draw, shape=shape: (draw(*shape),),
            winograd_input_truth,
            {"padding": padding},
        )
        for label, (shape, padding) in INPUTS.items()
    ),
    *(
        _output_case(label, options, bias)
        for label in OUTPUTS
        for options, bias in (({"low": 0.0}, True), ({}, False), ({"low": -1.0, "high": 1.0}, True))
        if options == {"low": 0.0} or label in ("typical", "16-channels")
    ),
]
