"""RISE against a plain PyTorch loop: the work on masks alone, and all of it with SqueezeNet.

The loop is the definition as it is usually written: each chunk of grids upsampled whole, each mask cropped at its
offset, multiplied with the image, and the scores' weighted sum of the masks added up chunk by chunk: by a product and
a sum, or else by one matrix product. Both are given their masks, and take the chunk that is fastest here. A third side
takes TorchRay's steps: it draws its masks, 32 at a time, and upsamples them within a reflected border.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from interleave import CLOCKS, OURS, relative_error
from models import build
from torch import Tensor

from convviz_cuda.attr import RISE
from convviz_cuda.attr.rise import RandomMasks, random_masks

MASKS, GRID, P = 4000, 7, 0.5
SOME = 400  # with a network, whose time grows with the masks
CHUNKS = (8, 32, 100)  # masks of one forward, of which each loop takes the fastest
LOOP, PRODUCT, TORCHRAY = "torch", "torch, sum as a matrix product", "torch, TorchRay's steps"
TORCHRAY_CHUNK = 32  # the default of its argument batch_size
Function = Callable[[Tensor], Tensor]


def plain_rise(image: Tensor, masks: RandomMasks, function: Function, product: bool, chunk: int) -> Tensor:
    """(1, 1, H, W): the mean of the masks, weighted by one score (n, 1) each."""
    count, height, width = len(masks.grids), *image.shape[2:]
    whole = [(GRID + 1) * cell for cell in masks.cell]
    offsets = masks.offsets.tolist()
    total = torch.zeros(1, 1, height, width)
    with torch.no_grad():
        for start in range(0, count, chunk):
            grids = masks.grids[start : start + chunk, None]
            upsampled = F.interpolate(grids, size=whole, mode="bilinear", align_corners=False)
            cropped = torch.empty(len(grids), 1, height, width)
            for i, (y, x) in enumerate(offsets[start : start + chunk]):
                cropped[i] = upsampled[i, :, y : y + height, x : x + width]
            scores = function(image * cropped)
            if product:
                total += (scores.T @ cropped.flatten(1)).view_as(total)
            else:
                total += (scores[:, :, None, None] * cropped).sum(0, keepdim=True)
    return total / (count * P)


def torchray_rise(image: Tensor, count: int, function: Function) -> Tensor:
    """(1, 1, H, W): another mean of masks, by the steps of TorchRay's attribution/rise.py (Fong et al. 2019).

    Its grids get a reflected border; a cell is as large as a picture of one cell more than the image needs it, and
    what is upsampled is cropped twice, by places that are read from tensors. Its sigmoid is left to the function.
    """
    height, width = image.shape[2:]
    cell = [-(-size // GRID) for size in (height, width)]  # offsets are below it
    crop = [height + cell[0], width + cell[1]]
    large = [-(-size // GRID) for size in crop]
    whole = [(GRID + 2) * c for c in large]
    total = torch.zeros(1, 1, height, width)
    with torch.no_grad():
        for start in range(0, count, TORCHRAY_CHUNK):
            some = min(TORCHRAY_CHUNK, count - start)
            grids = F.pad((torch.rand(some, 1, GRID, GRID) < P).float(), (1, 1, 1, 1), mode="reflect")
            upsampled = F.interpolate(grids, whole, mode="bilinear", align_corners=False)
            upsampled = upsampled[:, :, large[0] : large[0] + crop[0], large[1] : large[1] + crop[1]]
            rows, columns = (torch.randint(0, c, (some,)) for c in cell)
            masks = torch.empty(some, 1, height, width)
            for i in range(some):
                masks[i] = upsampled[i, :, rows[i] : rows[i] + height, columns[i] : columns[i] + width]
            scores = function(image * masks)
            total += (scores.T @ masks.view(some, -1)).view_as(total)
    return total / (count * P)


def inputs(quick: bool) -> tuple[Tensor, int]:
    size = 64 if quick else 224
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1)), 40 if quick else MASKS


def sides(
    image: Tensor, count: int, function: Function, clock: Callable[..., float], quick: bool
) -> dict[str, Callable[[], Tensor]]:
    """The two loops over ``count`` masks, each with the chunk that was fastest on a part of them."""
    masks = random_masks(count, (GRID, GRID), P, 0, tuple(image.shape[2:]), image)
    part = max(100, count // 40)
    some = RandomMasks(masks.grids[:part], masks.offsets[:part], masks.cell)
    found = {}
    for name, product in ((LOOP, False), (PRODUCT, True)):
        seconds = {}
        for chunk in CHUNKS[:1] if quick else CHUNKS:
            call = functools.partial(plain_rise, image, some, function, product, chunk)
            call()
            seconds[chunk] = min(clock(call) for _ in range(3))
        chunk = min(seconds, key=seconds.__getitem__)
        found[name] = functools.partial(plain_rise, image, masks, function, product, chunk)
    return found


def chunks_of(found: dict[str, Any]) -> str:
    return " and ".join(str(found[name].args[-1]) for name in (LOOP, PRODUCT))


def test_masks(quick: bool, compare: Callable[..., Any], pytestconfig: pytest.Config) -> None:
    """Everything but the model, for which a pixel of the image stands."""
    image, count = inputs(quick)

    def pixel(x: Tensor) -> Tensor:
        return x[:, :1, 20, 30]

    found = sides(image, count, pixel, CLOCKS[pytestconfig.option.clock], quick)
    rise = RISE(pixel)

    def ours() -> Tensor:
        return rise.attribute(image, score="output", n_masks=count)

    error = relative_error(ours(), found[LOOP]())
    assert error < 1e-5, f"The sum of masks differs from the loop's by {error} of its largest value."
    shown = float(torchray_rise(image, count, lambda x: x.new_ones(len(x), 1)).mean())
    assert abs(shown - 1) < 0.1, f"TorchRay's masks show {shown} times the part that they should."
    found[TORCHRAY] = functools.partial(torchray_rise, image, count, pixel)
    compare(
        f"rise masks: {count} masked images and the masks' weighted sum, without a model, seconds, float32",
        f"{'x'.join(map(str, image.shape[2:]))}x3, grid {GRID}",
        {OURS: ours, **found},
        rounds=5,
        goals={TORCHRAY: 10.0},
        errors={"to torch": error},
        notes=lambda seconds: {"torch's chunks": chunks_of(found), "us a mask": 1e6 * seconds / count},
    )


def test_rise(quick: bool, compare: Callable[..., Any], pytestconfig: pytest.Config) -> None:
    """All of RISE with some masks: one class, and all classes out of the same forwards."""
    image, count = inputs(quick)
    count = min(count, SOME)
    model = build("squeezenet1_0", quick)

    def probability(x: Tensor) -> Tensor:
        return model(x).softmax(1)[:, 5:6]

    found = sides(image, count, probability, CLOCKS[pytestconfig.option.clock], quick)
    rise = RISE(model)
    few = random_masks(40, (GRID, GRID), P, 0, tuple(image.shape[2:]), image)
    error = relative_error(
        rise.attribute(image, 5, n_masks=40), plain_rise(image, few, probability, False, 8)
    )
    assert error < 1e-3, f"RISE differs from the loop by {error} of its largest value."
    compare(
        f"rise: {count} masks, one image, seconds, float32",
        "squeezenet1_0",
        {
            OURS: lambda: rise.attribute(image, 5, n_masks=count),
            **found,
            "convviz, all classes": lambda: rise.attribute_many(image, n_masks=count),
        },
        rounds=5,
        errors={"to torch, 40 masks": error},
        notes=lambda seconds: {"torch's chunks": chunks_of(found), "ms a mask": 1e3 * seconds / count},
    )
