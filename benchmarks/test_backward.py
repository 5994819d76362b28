"""Whole attributions: time against Captum as called by default, in channels_last, and a plain gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import captum.attr
import methods
import pytest
import torch
from interleave import OURS, relative_error
from models import build
from torch import Tensor, nn

import convviz_cuda.attr

NETWORKS = ("squeezenet1_0", "vgg16")
GOALS = {"saliency": 1.3, "guided": 1.7, "deconvnet": 1.7}
ROUNDS = {("squeezenet1_0", 1): 21, ("squeezenet1_0", 8): 9, ("squeezenet1_0", 32): 5,
          ("vgg16", 1): 7, ("vgg16", 8): 5, ("vgg16", 32): 3}  # fmt: skip
TARGETS = list(range(0, 160, 10))


@pytest.fixture(scope="module", params=NETWORKS)
def network(request: pytest.FixtureRequest, quick: bool) -> tuple[str, nn.Module, nn.Module]:
    """A network's name, the network as loaded, and a copy in channels_last with frozen parameters."""
    model = build(request.param, quick)
    return request.param, model, methods.channels_last(model).requires_grad_(False)


def random_images(batch: int, quick: bool) -> Tensor:
    size = 48 if quick else 224
    return torch.randn(
        min(batch, 2) if quick else batch, 3, size, size, generator=torch.Generator().manual_seed(1)
    )


def check_exact(name: str, model: nn.Module, images: Tensor) -> float:
    """In float64, where no rounding opens or closes a gate, ours and Captum's agree to rounding."""
    model, image = model.double(), images[:1].double()
    try:
        expected = methods.method(captum.attr, name, model)(image, methods.TARGET)
        error = relative_error(
            methods.method(convviz_cuda.attr, name, model)(image, methods.TARGET), expected
        )
    finally:
        model.float()
    assert error < 1e-9, f"{name} differs from Captum by {error} of its largest value in float64."
    return error


def differences(results: dict[str, Tensor]) -> dict[str, float]:
    """Largest float32 differences: where rounding flips a gate of the forward, a few pixels differ."""
    return {
        f"{side} to captum": relative_error(results[side], results[methods.CAPTUM])
        for side in (OURS, methods.CAPTUM_LAST)
        if side in results
    }


@pytest.mark.parametrize("batch", (1, 8, 32))
@pytest.mark.parametrize("name", methods.METHODS)
def test_attribution(
    network: tuple[str, nn.Module, nn.Module], name: str, batch: int, quick: bool, compare: Callable[..., Any]
) -> None:
    if quick and batch > 8:
        pytest.skip("--quick takes two images for every batch")
    model_name, model, turned = network
    images = random_images(batch, quick)
    errors = {"float64": check_exact(name, model, images)} if batch == 1 else {}
    sides = methods.sides(name, model, turned, images)
    errors |= differences({side: call() for side, call in sides.items()})  # the warm-up at the same time
    compare(
        f"{name}, seconds a call, float32",
        f"{model_name} batch {len(images)}",
        sides,
        rounds=ROUNDS[model_name, batch],
        goals={methods.CAPTUM: GOALS[name]},
        errors=errors,
    )


@pytest.mark.parametrize("batch", (1, 4))
@pytest.mark.parametrize("name", ("saliency", "guided"))
def test_attribute_many(
    network: tuple[str, nn.Module, nn.Module], name: str, batch: int, quick: bool, compare: Callable[..., Any]
) -> None:
    model_name, model, _ = network
    images, targets = random_images(batch, quick), TARGETS[:2] if quick else TARGETS
    sides = methods.many(name, model, images, targets)
    errors = differences({side: call() for side, call in sides.items()})
    compare(
        f"{name}, {len(targets)} targets, seconds for all, float32",
        f"{model_name} batch {len(images)}",
        sides,
        rounds=5 if model_name == "squeezenet1_0" else 3,
        errors=errors,
    )
