"""Extremal perturbations of several areas against the loop that the paper describes, in plain PyTorch, on SqueezeNet.

The loop takes one area after the other. Its mask, its masked image and its penalty are written as the formulas stand,
and autograd goes through all of it: through the sort of the mask too.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from interleave import OURS, relative_error
from models import build
from torch import Tensor, nn

from convviz_cuda.attr import ExtremalPerturbation
from convviz_cuda.attr.extremal_perturbation import TIES

AREAS, STEPS, TARGET = (0.05, 0.1, 0.2, 0.4), 10, 5
# Steps after which the masks are compared, in float64: any difference in rounding may turn a rank.
COMPARED = 5
SIGMA, STEP, BLUR, LEVELS, TEMPERATURE = 21.0, 7, 20.0, 8, 0.05  # the defaults for 224 x 224 pixels
LR, MOMENTUM, WEIGHT, GROWTH = 0.02, 0.9, 300.0, 10.0
LOOP = "torch, area by area"


class PlainMask:
    """(1, 1, H, W): the smooth maximum of a kernel's products with the parameters around, read bilinearly."""

    def __init__(self, image: Tensor) -> None:
        height, width = image.shape[2:]
        self.reach = int(2 * SIGMA / STEP)
        self.grid = tuple(math.ceil((extent - 1) / STEP) + 1 for extent in (height, width))
        along = torch.arange(-self.reach, self.reach + 1).to(image) * STEP
        distance = torch.hypot(*torch.meshgrid(along, along, indexing="ij"))
        kernel = torch.exp(-((distance - SIGMA / 2).clamp(min=0) ** 2) / (2 * (SIGMA / 2) ** 2))
        self.inside = (distance <= 2 * SIGMA).flatten()
        self.kernel = kernel.flatten()[self.inside, None]
        # grid_sample's places: -1 and 1 are the outermost nodes
        y, x = (
            2 * (torch.arange(extent).to(image) - (extent - 1) / 2) / ((count - 1) * STEP)
            for extent, count in zip((height, width), self.grid, strict=True)
        )
        self.places = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1)[None]

    def __call__(self, parameters: Tensor) -> Tensor:
        wide = F.pad(parameters[None, None], [self.reach] * 4, mode="replicate")
        products = F.unfold(wide, 2 * self.reach + 1)[:, self.inside] * self.kernel
        coarse = ((products / TEMPERATURE).softmax(1) * products).sum(1).view(1, 1, *self.grid)
        return F.grid_sample(coarse, self.places, mode="bilinear", align_corners=True)


def blurred(image: Tensor, sigma: float) -> Tensor:
    """Of a Gaussian over what lies in the image: two convolutions, divided by the kernel's part inside."""
    reach = max(image.shape[2:])
    weights = torch.exp(-(torch.arange(-reach, reach + 1).to(image) ** 2) / (2 * sigma**2))
    for kernel in (weights[:, None], weights[None]):
        padding = tuple((size - 1) // 2 for size in kernel.shape)
        given = torch.cat([image, torch.ones_like(image[:, :1])], 1)
        summed = F.conv2d(
            given, kernel.expand(given.shape[1], 1, -1, -1), None, 1, padding, 1, given.shape[1]
        )
        image = summed[:, :-1] / summed[:, -1:]
    return image


class Pyramid:
    """Images from blurred to clear, (levels, C, H, W), of which a mask's value reads two."""

    def __init__(self, image: Tensor) -> None:
        deviations = [BLUR * (1 - level / (LEVELS - 1)) for level in range(LEVELS - 1)]
        self.levels = torch.cat([*(blurred(image, sigma) for sigma in deviations), image])

    def __call__(self, mask: Tensor) -> Tensor:
        place = mask[0] * (LEVELS - 1)  # (1, H, W)
        below = place.detach().floor().clamp(0, LEVELS - 2)
        index = below.long()[None].expand(1, *self.levels.shape[1:])
        low, high = self.levels.gather(0, index), self.levels.gather(0, index + 1)
        return torch.lerp(low, high, (place - below)[None].expand_as(low))


def shared(values: Tensor, wanted: Tensor) -> Tensor:
    """What sorted values ought to be, where equal ones share it."""
    _, group, counts = (
        (values.detach() * TIES).round().unique_consecutive(return_inverse=True, return_counts=True)
    )
    return (wanted.new_zeros(len(counts)).index_add(0, group, wanted) / counts)[group]


def plain_masks(
    model: nn.Module, image: Tensor, areas: Sequence[float], steps: int, equal: bool = False
) -> Tensor:
    """(areas, 1, 1, H, W). equal: equal values of a mask share what their ranks ask for, as ours do; a sort orders
    them as it likes, which costs less."""
    smooth, pyramid, found = PlainMask(image), Pyramid(image), []
    even = image.new_ones(smooth.grid, requires_grad=True)
    (reach,) = torch.autograd.grad(smooth(even).sum(), even)
    for area in areas:
        parameters = image.new_ones(smooth.grid, requires_grad=True)
        optimiser = torch.optim.SGD([parameters], lr=LR, momentum=MOMENTUM)
        pixels = image[0, 0].numel()
        wanted = image.new_zeros(pixels)
        wanted[pixels - round(area * pixels) :] = 1
        for step in range(steps):
            mask = smooth(parameters)
            score = model(pyramid(mask))[0, TARGET]
            values = mask.flatten().sort().values
            penalty = (values - (shared(values, wanted) if equal else wanted)).square().mean()
            weight = WEIGHT * GROWTH ** (step / max(1, steps - 1))
            (parameters.grad,) = torch.autograd.grad(weight * penalty - score, parameters)
            parameters.grad *= reach.mean() / reach
            optimiser.step()
            with torch.no_grad():
                parameters.clamp_(0, 1)
        with torch.no_grad():
            found.append(smooth(parameters))
    return torch.stack(found)


def test_extremal(quick: bool, compare: Callable[..., Any]) -> None:
    """One image, some areas, a few of the steps, of which each takes the same time."""
    size, areas, steps = (64, AREAS[:2], 2) if quick else (224, AREAS, STEPS)
    model = build("squeezenet1_0", quick)
    image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    settings = {"sigma": SIGMA, "step": STEP, "blur_sigma": BLUR, "areas": areas}
    method = ExtremalPerturbation(model)
    sides = {
        OURS: functools.partial(method.attribute, image, TARGET, steps=steps, **settings),
        LOOP: functools.partial(plain_masks, model, image, areas, steps),
    }
    for call in sides.values():
        call()
    exact, few = copy.deepcopy(model).double(), min(COMPARED, steps)
    expected = plain_masks(exact, image.double(), areas, few, equal=True)
    found = ExtremalPerturbation(exact).masks(image.double(), TARGET, steps=few, **settings).masks
    error = relative_error(found, expected)
    assert error < 1e-6, f"The masks differ from the loop's by {error} of their largest value."
    compare(
        f"extremal perturbation: {len(areas)} areas, {steps} steps, one image, seconds, float32",
        "squeezenet1_0",
        sides,
        rounds=5,
        goals={LOOP: 1.0},
        errors={f"to torch, masks after {few} steps in float64": error},
        notes=lambda seconds: {"ms a mask and step": 1e3 * seconds / (len(areas) * steps)},
    )
