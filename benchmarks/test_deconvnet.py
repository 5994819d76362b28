"""DeconvNet against a loop of Captum's NeuronDeconvolution: many projections of one image, and top activations.

What is found once for a model and a size of image (the capture, for receptive fields) is not in the times.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import captum.attr
import pytest
import torch
from interleave import OURS, relative_error
from models import build
from torch import Tensor

from convviz_cuda.deconvnet import DeconvNet

CAPTUM = "captum, one at a time"
PROJECTIONS, IMAGES, K = 64, 512, 9
LAYERS = {
    "squeezenet1_0": ("features.5", "features.9", "features.12"),
    "vgg16": ("features.15", "features.29"),
}
NETWORKS = [(name, layer) for name, layers in LAYERS.items() for layer in layers]


def images(count: int, quick: bool) -> Tensor:
    size = 64 if quick else 224
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def captum_project(model: Any, layer: str, image: Tensor, chosen: list[tuple[int, int, int]]) -> Tensor:
    method = captum.attr.NeuronDeconvolution(model, dict(model.named_modules())[layer])
    return torch.cat([method.attribute(image, neuron) for neuron in chosen])


@pytest.mark.parametrize("name, layer", NETWORKS)
def test_projections_of_one_image(name: str, layer: str, quick: bool, compare: Callable[..., Any]) -> None:
    """64 feature maps' strongest activations; Captum is told the positions."""
    model, image = build(name, quick), images(1, quick)
    channels = list(range(4 if quick else PROJECTIONS))
    net = DeconvNet(model, layer, seed="one")
    net.receptive_field(image)  # once a model and size of image
    found = net.project(image, channels)
    places = found.positions[:, 0].tolist()
    chosen = [(channel, *place) for channel, place in zip(channels, places, strict=True)]
    part = chosen if quick or name != "vgg16" else chosen[:8]
    # A copy: weights that change would have to be captured again.
    wide, exact = copy.deepcopy(model).double(), image.double()
    one = captum_project(wide, layer, exact, chosen[:2])
    error = relative_error(DeconvNet(wide, layer, seed="one").project(exact, channels[:2]).pixels[:, 0], one)
    assert error < 1e-9, f"The projections differ from Captum's by {error} of their largest value in float64."
    compare(
        f"{len(channels)} projections of one image, seconds for all, float32",
        f"{name} {layer}",
        {
            OURS: lambda: net.project(image, channels),
            CAPTUM: lambda: captum_project(model, layer, image, part),
        },
        rounds=3 if name == "vgg16" else 5,
        goals={CAPTUM: 5.0},
        errors={"float64": error},
        scales={CAPTUM: len(chosen) / len(part)},
    )


@pytest.mark.parametrize("layer", ("features.5", "features.9"))
def test_top_activations(layer: str, quick: bool, compare: Callable[..., Any]) -> None:
    """The nine strongest activations of all feature maps over 512 images, with their projections.

    The loop: a plain forward of all images, then Captum for each of the activations. It does a part of both.
    """
    model, data = build("squeezenet1_0", quick), images(8 if quick else IMAGES, quick)
    net = DeconvNet(model, layer)
    module = dict(model.named_modules())[layer]
    found = net.top_activations(data[:32], k=K, project=False)
    maps = len(found.channels)
    share = 1 if quick else maps * K // 64

    def loop() -> None:
        kept: list[Tensor] = []
        handle = module.register_forward_hook(lambda _, __, out: kept.append(out.flatten(2).max(2).values))
        with torch.no_grad():
            for part in data[: len(data) // share].split(32):
                model(part)
        handle.remove()
        for c in range(2 if quick else 64):
            image = data[int(found.indices[c, 0])][None]
            captum_project(model, layer, image, [(c, *found.positions[c, 0].tolist())])

    loop()
    compare(
        f"top {K} activations of all feature maps over {len(data)} images, with projections, seconds, float32",
        f"squeezenet1_0 {layer}, {maps} maps",
        {OURS: lambda: net.top_activations(data, k=K), CAPTUM: loop},
        rounds=3,
        scales={CAPTUM: share},
    )
