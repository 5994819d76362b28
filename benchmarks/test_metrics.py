"""Curves over masked images beside the model's own time: insertion and deletion, pixel flipping.

The model is one that costs next to nothing, so that what is timed is the metric. torch-cam's and Quantus' sides are
there where they import (see README.md).
"""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from interleave import OURS, relative_error
from models import build
from torch import Tensor, nn

from convviz_cuda.attr._masked import PeakBytes
from convviz_cuda.metrics import insertion_deletion, perturbation_curve

LOOP, STEP_BY_STEP = "plain loop, whole masks", "plain loop, changing one batch step by step"
TORCHCAM, QUANTUS = "torch-cam", "Quantus"
IMAGES, SIZE = 16, 224
LOGITS = 4


class Trivial(nn.Module):
    """Scores of a few pixels: far cheaper than making the image was."""

    def forward(self, x: Tensor) -> Tensor:
        few = x[:, :, ::16, ::16].float().mean((1, 2))
        return few[:, :LOGITS] if few.shape[1] >= LOGITS else few.repeat(1, LOGITS)[:, :LOGITS]


class GivenMaps:
    """What torch-cam asks of a method, for maps that are there already."""

    def __init__(self, model: nn.Module, maps: Tensor) -> None:
        self.model, self.maps = model, maps

    def __call__(self, *_: Any, **__: Any) -> list[Tensor]:
        return [self.maps]

    def fuse_cams(self, cams: list[Tensor]) -> Tensor:
        return cams[0]

    def _hooks_off(self) -> Any:
        return contextlib.nullcontext()


def peer(name: str) -> Any | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError:
        return None


def drawn(quick: bool, channels: int = 3, count: int = IMAGES) -> tuple[Tensor, Tensor]:
    size, count = (32, 2) if quick else (SIZE, count)
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, channels, size, size, generator=generator), torch.randn(
        count, size, size, generator=generator
    )


@torch.no_grad()
def whole_masks(
    model: nn.Module, x: Tensor, maps: Tensor, per_step: int, at_once: int = 32
) -> tuple[Tensor, Tensor]:
    """Areas under insertion and deletion over 0, from the definition: a mask for each step, some steps at a time."""
    pixels = maps[0].numel()
    counts = torch.tensor([*range(0, pixels, per_step), pixels])
    areas = []
    for insertion in (True, False):
        curves = []
        for image, each in zip(x, maps, strict=True):
            rank = each.flatten().argsort(descending=True, stable=True).argsort().view(each.shape)
            scores = []
            for part in counts.split(at_once):
                first = rank[None, None] < part.view(-1, 1, 1, 1)
                scores.append(model(image * (first if insertion else ~first)).softmax(1)[:, 0])
            curves.append(torch.cat(scores))
        areas.append(torch.trapezoid(torch.stack(curves).double(), counts.double() / pixels))
    return areas[0], areas[1]


@torch.no_grad()
def step_by_step(model: nn.Module, x: Tensor, maps: Tensor, per_step: int) -> tuple[Tensor, Tensor]:
    """The same with one batch of all images, of which a step changes its pixels only. The model must leave it alone."""
    pixels = maps[0].numel()
    order = maps.flatten(1).argsort(dim=1, descending=True, stable=True)[:, None].expand(-1, x.shape[1], -1)
    counts = [*range(0, pixels, per_step), pixels]
    areas = []
    for insertion in (True, False):
        now = torch.zeros_like(x) if insertion else x.clone()
        source = x if insertion else torch.zeros_like(x)
        scores = [model(now).softmax(1)[:, 0]]
        for start, stop in zip(counts, counts[1:], strict=False):
            places = order[:, :, start:stop]
            now.flatten(2).scatter_(2, places, source.flatten(2).gather(2, places))
            scores.append(model(now).softmax(1)[:, 0])
        areas.append(torch.trapezoid(torch.stack(scores, 1).double(), torch.tensor(counts).double() / pixels))
    return areas[0], areas[1]


def peak(call: Callable[[], Any]) -> int:
    with PeakBytes(True) as counted:
        call()
    return counted.bytes


@pytest.mark.parametrize("network", ["trivial", "squeezenet1_0"])
def test_insertion_and_deletion(network: str, quick: bool, compare: Callable[..., Any]) -> None:
    """16 images of 224 x 224, 224 steps each way (a single image of a real network), softmax, fills of 0."""
    trivial = network == "trivial"
    model = Trivial().eval() if trivial else build(network, quick)
    x, maps = drawn(quick, count=IMAGES if trivial else 1)
    per_step = x.shape[2]

    def ours() -> Tensor:
        found = insertion_deletion(
            model, x, maps, 0, pixels_per_step=per_step, insertion_fill=0.0, deletion_fill=0.0
        )
        return torch.stack([found.insertion.values, found.deletion.values])

    sides: dict[str, Callable[[], Tensor]] = {
        OURS: ours,
        LOOP: lambda: torch.stack(whole_masks(model, x, maps, per_step)),
        STEP_BY_STEP: lambda: torch.stack(step_by_step(model, x, maps, per_step)),
    }
    theirs = peer("torchcam.metrics")
    if theirs is not None:

        def torchcam() -> Tensor:
            metric = theirs.DeletionInsertionMetric(
                GivenMaps(model, maps), lambda out: out.softmax(-1), steps=x.shape[2] * x.shape[3] // per_step
            )
            metric.update(x, 0)
            return torch.tensor(list(metric.summary().values())[::-1], dtype=torch.float64)[:, None]

        sides[TORCHCAM] = torchcam
    results = {side: call() for side, call in sides.items()}
    if theirs is not None:
        results[TORCHCAM] = results[TORCHCAM].expand(results[OURS].shape)
    errors = {
        f"to {side}": relative_error(
            results[OURS].mean(1) if side == TORCHCAM else results[OURS],
            result[:, 0] if side == TORCHCAM else result,
        )
        for side, result in results.items()
        if side != OURS
    }
    assert max(errors.values()) < 1e-4, errors
    held = {f"bytes held by {side}": peak(call) for side, call in sides.items()}
    compare(
        "insertion and deletion, seconds for all, float32",
        f"{network}, {len(x)} images x {per_step} steps",
        sides,
        rounds=3,
        goals={TORCHCAM: 2.0} if trivial and TORCHCAM in sides else {},
        errors=errors,
        notes=lambda _: held,
    )


def test_pixel_flipping(quick: bool, compare: Callable[..., Any]) -> None:
    """Images of one channel, as Quantus takes each channel's number for a pixel of its own; deletion to 0."""
    model = Trivial().eval()
    x, maps = drawn(quick, channels=1)
    per_step = x.shape[2]

    def ours() -> Tensor:
        return insertion_deletion(
            model, x, maps, 0, mode="deletion", pixels_per_step=per_step, deletion_fill=0.0
        ).curves[:, 1:]

    def loop() -> Tensor:
        """As Quantus does it, in NumPy: one batch that each step changes."""
        now = x.numpy().copy().reshape(len(x), -1)
        order = np.argsort(-maps.numpy().reshape(len(x), -1), axis=1, kind="stable")
        scores = []
        with torch.no_grad():
            for start in range(0, now.shape[1], per_step):
                now = now.copy()
                np.put_along_axis(now, order[:, start : start + per_step], 0.0, axis=1)
                scores.append(model(torch.from_numpy(now).view(x.shape)).softmax(1)[:, 0])
        return torch.stack(scores, 1)

    sides: dict[str, Callable[[], Tensor]] = {OURS: ours, STEP_BY_STEP: loop}
    theirs = peer("quantus")
    if theirs is not None:
        options = {
            "features_in_step": per_step, "perturb_baseline": 0.0, "softmax": True, "abs": False,
            "normalise": False, "disable_warnings": True, "display_progressbar": False,
            "return_auc_per_sample": False,
        }  # fmt: skip
        call_softmax = options.pop("softmax")

        def flipping() -> Tensor:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                metric = theirs.PixelFlipping(**options)
                scores = metric(
                    model=model, x_batch=x.numpy(), y_batch=np.zeros(len(x), int), a_batch=maps[:, None].numpy(),
                    softmax=call_softmax, device="cpu", batch_size=len(x), channel_first=True,
                )  # fmt: skip
            return torch.tensor(np.array(scores))

        sides[QUANTUS] = flipping
    results = {side: call() for side, call in sides.items()}
    errors = {
        f"to {side}": relative_error(results[OURS], result)
        for side, result in results.items()
        if side != OURS
    }
    assert max(errors.values()) < 1e-4, errors
    compare(
        "pixel flipping, seconds for all, float32",
        f"{len(x)} images of one channel x {results[OURS].shape[1]} steps",
        sides,
        rounds=3,
        goals={QUANTUS: 2.0} if QUANTUS in sides else {},
        errors=errors,
        notes=lambda _: {"bytes held by convviz": peak(ours)},
    )


def test_region_perturbation(quick: bool, compare: Callable[..., Any]) -> None:
    """The settings of Samek et al. 2017 for one order, on a few images: noise is drawn anew in each repetition."""
    model = Trivial().eval()
    x, maps = drawn(quick, count=4)
    steps, repetitions, region = (9, 2, 9) if quick else (100, 10, 9)

    def ours() -> Tensor:
        return perturbation_curve(
            model,
            x,
            maps,
            0,
            order="morf",
            region=region,
            steps=steps,
            repetitions=repetitions,
            fill="uniform",
        ).values

    @torch.no_grad()
    def loop() -> Tensor:
        """From the definition: one batch of all images, one region of each replaced at a step."""
        rows, columns = (-(-side // region) for side in x.shape[2:])
        sums = nn.functional.avg_pool2d(maps[:, None], region, ceil_mode=True, divisor_override=1).flatten(1)
        order = sums.argsort(dim=1, descending=True, stable=True)
        assert sums.shape[1] == rows * columns
        low, high = x.amin((2, 3)), x.amax((2, 3))
        curves = []
        for repetition in range(repetitions):
            generator = torch.Generator().manual_seed(repetition)
            now = x.clone()
            scores = [model(now).softmax(1)[:, 0]]
            for step in range(steps):
                for n, place in enumerate(order[:, step].tolist()):
                    top, left = place // columns * region, place % columns * region
                    patch = now[n, :, top : top + region, left : left + region]
                    noise = torch.rand(patch.shape, generator=generator)
                    patch.copy_(low[n, :, None, None] + (high - low)[n, :, None, None] * noise)
                scores.append(model(now).softmax(1)[:, 0])
            curves.append(torch.stack(scores, 1))
        mean = torch.stack(curves).double().mean(0)
        return (mean[:, :1] - mean).mean(1)

    sides = {OURS: ours, STEP_BY_STEP: loop}
    apart = float((ours() - loop()).abs().max())
    compare(
        f"region perturbation, {steps} steps, {repetitions} repetitions, seconds for all, float32",
        f"{len(x)} images",
        sides,
        rounds=3,
        notes=lambda _: {"bytes held by convviz": peak(ours), "apart, as other noise was drawn": apart},
    )
