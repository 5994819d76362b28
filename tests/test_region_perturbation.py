"""Region perturbation: its curves by hand, the order of its regions, its noise."""

from __future__ import annotations

import pytest
import torch
from curves_cases import Linear, Net, Seen, drawn
from torch import Tensor

from convviz_cuda.metrics import (
    perturbation_curve,
)

# Contributions of 2 x 2 regions in an image of ones, which are the map too.
PARTS = torch.tensor([[1.0, 8.0], [4.0, 2.0]], dtype=torch.float64)


def test_aopc_and_abpc_by_hand():
    relevance = (PARTS / 4).repeat_interleave(2, 0).repeat_interleave(2, 1)
    x, maps = torch.ones(1, 1, 4, 4, dtype=torch.float64), relevance[None]
    options = {"region": 2, "steps": 3, "fill": 0.0, "score": "output"}
    found = perturbation_curve(Linear(relevance[None]), x, maps, **options)
    assert found.morf.curves.tolist() == [[15.0, 7.0, 3.0, 1.0]]
    assert found.lerf.curves.tolist() == [[15.0, 14.0, 12.0, 8.0]]
    # k = 0 is one of the four terms: (0 + 8 + 12 + 14) / 4, (0 + 1 + 3 + 7) / 4.
    assert found.morf.values.tolist() == [8.5] and found.lerf.values.tolist() == [2.75]
    assert found.abpc.values.tolist() == [5.75]
    assert found.morf.fractions.tolist() == [0.0, 0.25, 0.5, 0.75]
    alone = perturbation_curve(Linear(relevance[None]), x, maps, order="lerf", **options)
    assert torch.equal(alone.curves, found.lerf.curves) and alone.settings == found.lerf.settings


@pytest.mark.parametrize("order", ["morf", "lerf"])
def test_regions_are_compared_by_sums_at_the_edges_too(order):
    """5 x 7 pixels in regions of 3 x 4: of the corner's 2 x 3 pixels each is the largest, but not their sum."""
    maps = torch.ones(1, 5, 7)
    maps[:, 3:, 4:] = 1.2  # 7.2 in all; the others have 12, 9 and 8
    model = Seen()
    perturbation_curve(
        model, torch.ones(1, 2, 5, 7), maps, 0, order=order, region=(3, 4), steps=4, fill=0.0, score="output",
        batch_size=1,
    )  # fmt: skip
    corners = [(slice(0, 3), slice(0, 4)), (slice(0, 3), slice(4, 7)), (slice(3, 5), slice(0, 4)),
               (slice(3, 5), slice(4, 7))]  # fmt: skip
    image, expected = torch.ones(2, 5, 7), [torch.ones(2, 5, 7)]
    for rows, columns in corners if order == "morf" else corners[::-1]:
        image[:, rows, columns] = 0
        expected.append(image.clone())
    assert all(any(torch.equal(image, seen) for seen in model.images) for image in expected)
    assert {int((i == 0).sum()) for i in model.images} == {int((i == 0).sum()) for i in expected}


@pytest.mark.parametrize("order", ["morf", "lerf"])
def test_regions_of_equal_sums_follow_the_scan_in_both_orders(order):
    model = Seen()
    perturbation_curve(
        model, torch.ones(1, 1, 6, 6), torch.zeros(1, 6, 6), 0, order=order, region=2, steps=9, fill=0.0,
        score="output", batch_size=1,
    )  # fmt: skip
    for image in model.images:
        regions = image[0, ::2, ::2].flatten()
        assert not regions[: int((regions == 0).sum())].any()


def noise_of(images: Tensor, batch_size: int | None = 1, **options) -> Tensor:
    """(repetitions, N, C, H, W): each noise, from the images in which all regions are replaced."""
    model = Seen()
    height, width = images.shape[2:]
    perturbation_curve(
        model, images, torch.zeros(len(images), height, width), 0, order="morf", region=(height, width), steps=1,
        score="output", batch_size=batch_size, **options,
    )  # fmt: skip
    replaced = [i for i in model.images if not any(torch.equal(i, x) for x in images)]
    repetitions = options.get("repetitions", 10)
    unique: list[Tensor] = []
    for image in replaced:
        if not any(torch.equal(image, other) for other in unique):
            unique.append(image)
    return torch.stack(unique).view(repetitions, len(images), *images.shape[1:])


def test_noise_belongs_to_the_image_and_the_repetition():
    x = drawn(1, 3, 20, 20, dtype=torch.float32).expand(3, -1, -1, -1).contiguous()
    noise = noise_of(x, seed=5, repetitions=4)
    flat = noise.view(12, -1).double()
    apart = torch.corrcoef(flat - flat.mean(1, keepdim=True)).fill_diagonal_(0)
    assert apart.abs().max() < 0.12  # 12 noises of 1200 numbers that have nothing to do with each other
    assert torch.equal(noise_of(x[:2], seed=5, repetitions=3), noise[:3, :2])
    assert torch.equal(noise_of(x, 7, seed=5, repetitions=4), noise)
    assert not (noise_of(x, seed=6, repetitions=4) == noise).any(-1).all()


def test_noise_is_uniform_within_its_bounds():
    x = drawn(1, 3, 40, 40) * torch.tensor([1.0, 10.0, 0.1])[None, :, None, None]
    noise = noise_of(x, repetitions=5).transpose(0, 2).flatten(1)
    low, high = x[0].amin((1, 2))[:, None], x[0].amax((1, 2))[:, None]
    unit = (noise - low) / (high - low)
    assert (unit >= 0).all() and (unit <= 1).all()
    counts = torch.stack([torch.histc(row, 10, 0, 1) for row in unit])
    assert (counts / 800 - 1).abs().max() < 0.2  # 8000 numbers: 5 deviations are 0.17
    ranged = noise_of(x, repetitions=2, noise_range=(2.0, [3.0, 4.0, 2.5]))
    tops = torch.tensor([3.0, 4.0, 2.5])
    assert (ranged >= 2).all() and (ranged.amax((0, 1, 3, 4)) <= tops).all()
    assert (ranged.amax((0, 1, 3, 4)) > 2 + 0.99 * (tops - 2)).all()


def test_curves_are_means_over_repetitions():
    weights, x, maps = drawn(3, 6, 6), drawn(2, 3, 6, 6, seed=1), drawn(2, 6, 6, seed=2)
    options = {"region": 3, "steps": 4, "score": "output", "seed": 3}
    found = perturbation_curve(Linear(weights), x, maps, repetitions=3, **options)
    noise = noise_of(x, seed=3, repetitions=3)
    each = [
        perturbation_curve(Linear(weights), x, maps, fill=fill, **{**options, "seed": 0}) for fill in noise
    ]
    for name in ("morf", "lerf", "abpc"):
        mean = torch.stack([getattr(one, name).values for one in each]).mean(0)
        torch.testing.assert_close(getattr(found, name).values, mean, rtol=0, atol=1e-12)


def test_normal_noise_is_drawn_anew_in_each_repetition():
    weights, x, maps = drawn(3, 6, 6), drawn(2, 3, 6, 6, seed=1), drawn(2, 6, 6, seed=2)
    options = {"region": 3, "steps": 4, "score": "output", "fill": "noise", "order": "morf"}
    ends = [
        perturbation_curve(Linear(weights), x, maps, repetitions=r, **options).curves[:, -1]
        for r in (1, 2, 3)
    ]
    second, third = 2 * ends[1] - ends[0], 3 * ends[2] - 2 * ends[1]
    for a, b in ((ends[0], second), (ends[0], third), (second, third)):
        assert (a - b).abs().min() > 1e-3
    again = perturbation_curve(Linear(weights), x, maps, repetitions=3, **options)
    assert torch.equal(again.curves[:, -1], ends[2])


def test_the_preset_of_region_perturbation():
    model, x, maps = Net(), drawn(1, 3, 90, 92), drawn(1, 90, 92, seed=1)
    found = perturbation_curve(model, x, maps, 0, order="morf", preset="samek2017")
    settings = found.settings
    assert settings["region"] == [9, 9] and settings["steps"] == 100 and settings["repetitions"] == 10
    assert settings["fill"] == "uniform" and settings["regions"] == 110 and found.curves.shape == (1, 101)
    again = perturbation_curve(model, x, maps, 0, order="morf")
    assert torch.equal(found.curves, again.curves)
