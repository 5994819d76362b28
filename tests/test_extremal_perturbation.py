"""Extremal perturbations: each part against a direct float64 computation, the whole where the answer is known."""

from __future__ import annotations

import json
import math
import threading
import warnings

import numpy as np
import pytest
import torch
from attribution_cases import Plain, Reused, Segmentation, built, images, state
from scipy import ndimage
from torch import Tensor

from convviz_cuda import models, scenes
from convviz_cuda.attr import ExtremalMasks, ExtremalPerturbation
from convviz_cuda.attr.extremal_perturbation import AreaLoss, Levels, SmoothMasks, blurred
from convviz_cuda.preprocess import Preprocess

F64, F32 = torch.float64, torch.float32
FEW = {"steps": 4, "areas": (0.1, 0.3), "sigma": 3.0, "step": 2, "blur_sigma": 2.0}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


# ------------------------------------------------------------------------------------------ smooth masks


@pytest.mark.parametrize(
    ("size", "step", "sigma", "temperature"),
    [((9, 12), 3, 4.0, 0.05), ((7, 5), 1, 2.0, 0.5), ((10, 1), 4, 1.0, 0.1), ((6, 8), 7, 21.0, 0.02)],
)
def test_a_mask_is_its_definition(size, step, sigma, temperature):
    smooth = SmoothMasks(size, step, sigma, temperature, torch.zeros(1, dtype=F64))
    parameters = drawn(2, *smooth.grid)
    reach = math.floor(2 * sigma / step)
    nodes = [math.ceil((extent - 1) / step) + 1 for extent in size]
    assert smooth.grid == tuple(nodes)
    for values, found in zip(parameters.tolist(), smooth(parameters), strict=True):
        peaks = np.zeros(nodes)
        for i, j in np.ndindex(*nodes):
            products = []
            for y, x in np.ndindex(nodes[0] + 2 * reach, nodes[1] + 2 * reach):
                distance = step * math.hypot(y - reach - i, x - reach - j)
                v, u = min(max(y - reach, 0), nodes[0] - 1), min(max(x - reach, 0), nodes[1] - 1)
                if distance <= 2 * sigma:
                    kernel = math.exp(-(max(0.0, distance - sigma / 2) ** 2) / (2 * (sigma / 2) ** 2))
                    products.append(kernel * values[v][u])
            weights = [math.exp(value / temperature) for value in products]
            peaks[i, j] = np.dot(weights, products) / sum(weights)
        expected = np.zeros(size)
        for y, x in np.ndindex(*size):
            v, u = (
                (p - (e - 1) / 2) / step + (n - 1) / 2 for p, e, n in zip((y, x), size, nodes, strict=True)
            )
            for i, j in np.ndindex(*nodes):
                expected[y, x] += max(0, 1 - abs(v - i)) * max(0, 1 - abs(u - j)) * peaks[i, j]
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-12)


def test_a_mask_has_the_symmetries_of_its_parameters():
    smooth = SmoothMasks((13, 20), 3, 5.0, 0.05, torch.zeros(1, dtype=F64))
    parameters = drawn(1, *smooth.grid)
    torch.testing.assert_close(smooth(parameters.flip(1)), smooth(parameters).flip(1), rtol=0, atol=1e-12)
    torch.testing.assert_close(smooth(parameters.flip(2)), smooth(parameters).flip(2), rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------ the area


def area_loss(masks, areas):
    return AreaLoss(areas, masks[0].numel(), masks.device)(masks)


def test_the_area_loss_of_a_hand_made_mask():
    # Sorted: 0, .1, .2, .5, .9, 1. A third of six pixels are 2 ones: squares 0, .01, .04, .25, .01, 0.
    mask = torch.tensor([[[0.9, 0.1, 0.5], [1.0, 0.2, 0.0]]], dtype=F64, requires_grad=True)
    loss = area_loss(mask, [1 / 3])
    assert loss.item() == pytest.approx(0.31 / 6, abs=1e-12)
    loss.sum().backward()
    expected = torch.tensor([[[-0.1, 0.1, 0.5], [0.0, 0.2, 0.0]]], dtype=F64) * 2 / 6
    torch.testing.assert_close(mask.grad, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("area", [0.001, 0.03, 0.5, 0.77, 1.0])
def test_the_area_loss_is_the_distance_of_the_sorted_mask(area):
    masks, areas = drawn(4, 9, 11), [area, 0.2, 0.21, area]
    ones = [max(1, round(each * 99)) for each in areas]
    wanted = torch.tensor([[0.0] * (99 - count) + [1.0] * count for count in ones], dtype=F64)
    expected = (masks.flatten(1).sort(1).values - wanted).square().mean(1)
    found = area_loss(masks, areas)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


def test_equal_values_have_equal_gradients_and_the_same_loss():
    # Of 8 pixels 3 are ones; the four of .5 fill the ranks 4 to 7, of which two are ones.
    values = [0.1, 0.5, 0.5, 1.0, 0.3, 0.5, 0.5, 0.2]
    mask = torch.tensor(values, dtype=F64).view(1, 2, 4).requires_grad_()
    loss = area_loss(mask, [3 / 8])
    assert loss.item() == pytest.approx((0.01 + 0.04 + 0.09 + 4 * 0.25 + 0) / 8, abs=1e-12)
    (found,) = torch.autograd.grad(loss.sum(), mask)
    share = [0.5 if value == 0.5 else float(value == 1.0) for value in values]
    expected = [2 * (value - one) / 8 for value, one in zip(values, share, strict=True)]
    torch.testing.assert_close(found.flatten(), torch.tensor(expected, dtype=F64), rtol=0, atol=1e-12)
    # Rounding does not rank: a mask that is uniform but for it is pushed everywhere alike.
    noise = 1e-8 * drawn(1, 5, 7)
    mask = (0.4 + noise).requires_grad_()
    (found,) = torch.autograd.grad(area_loss(mask, [0.2]).sum(), mask)
    torch.testing.assert_close(found, torch.full_like(found, 2 * 0.2 / 35), rtol=0, atol=1e-8)


# ------------------------------------------------------------------------------------------ what hides


def test_the_blur_is_a_gaussian_over_what_lies_in_the_image():
    image = drawn(1, 2, 7, 9)
    found = blurred(image, 1.7)[0]
    for y, x in np.ndindex(7, 9):
        weights = np.array(
            [[math.exp(-((y - i) ** 2 + (x - j) ** 2) / (2 * 1.7**2)) for j in range(9)] for i in range(7)]
        )
        expected = (image[0].numpy() * weights).sum((1, 2)) / weights.sum()
        np.testing.assert_allclose(found[:, y, x].numpy(), expected, rtol=0, atol=1e-13)


def test_the_blur_far_from_the_border_is_scipys():
    image = drawn(1, 1, 41, 41)
    expected = ndimage.gaussian_filter(image[0, 0].numpy(), 2.0, truncate=9)
    found = blurred(image, 2.0)[0, 0].numpy()
    np.testing.assert_allclose(found[18:23, 18:23], expected[18:23, 18:23], rtol=0, atol=1e-12)


def test_masked_images_are_mixed_of_blurred_ones():
    x = images(3, 9)
    levels = Levels(x, "blur", 3.0, 4)
    stack = [blurred(x, 3.0), blurred(x, 2.0), blurred(x, 1.0), x]
    masks = drawn(4, 9, 9)
    masks[0, 0, :4] = torch.tensor([0.0, 1 / 3, 2 / 3, 1.0])
    which = [2, 0, 2, 1]
    found, slope = levels.mixed(torch.tensor(which), masks)
    expected, rise = torch.empty(4, 3, 9, 9, dtype=F64), torch.empty(4, 3, 9, 9, dtype=F64)
    for n, i, j in np.ndindex(4, 9, 9):
        low = min(2, int(3 * masks[n, i, j]))
        rise[n, :, i, j] = 3 * (stack[low + 1] - stack[low])[which[n], :, i, j]
        expected[n, :, i, j] = stack[low][which[n], :, i, j] + (masks[n, i, j] - low / 3) * rise[n, :, i, j]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    generic = torch.ones_like(masks, dtype=torch.bool)
    generic[0, 0, :4] = False  # at a level either side's derivative would do
    torch.testing.assert_close(
        slope.permute(0, 2, 3, 1)[generic], rise.permute(0, 2, 3, 1)[generic], rtol=0, atol=1e-12
    )


def test_fading_and_a_picture_of_ones_own():
    x, masks = images(2, 6), drawn(2, 6, 6)
    faded, _ = Levels(x, "fade", None, 8).mixed(torch.arange(2), masks)
    torch.testing.assert_close(faded, x * masks[:, None], rtol=0, atol=1e-12)
    colour = torch.tensor([0.3, -1.0, 2.0]).view(3, 1, 1)
    found, _ = Levels(x, colour, None, 8).mixed(torch.arange(2), masks)
    torch.testing.assert_close(found, x * masks[:, None] + colour * (1 - masks[:, None]), rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------ the whole


def square_of(x: Tensor) -> Tensor:
    """A score that is the sum over a square of 16 x 16 pixels."""
    return x[:, 0, 10:26, 14:30].sum((1, 2))


@pytest.mark.parametrize("variant", ["preservation", "deletion", "dual"])
def test_the_mask_of_the_right_area_is_the_square_that_is_summed(variant):
    truth = torch.zeros(48, 48, dtype=torch.bool)
    truth[10:26, 14:30] = True
    x = 0.2 * torch.ones(1, 1, 48, 48, dtype=F64)
    right = 256 / 48**2
    found = ExtremalPerturbation(square_of).masks(
        x, areas=(right / 3, right, 0.4), variant=variant, perturbation="fade", sigma=2.0, step=2, steps=150
    )
    small, exact, large = found.masks[:, 0, 0]
    assert ((exact > 0.5) & truth).sum() / ((exact > 0.5) | truth).sum() > 0.85
    assert abs(float(exact.mean()) - right) < 0.02 and abs(float(large.mean()) - 0.4) < 0.04
    # A smaller mask lies inside, a larger one covers it.
    assert float(small[truth].sum() / small.sum()) > 0.9 and float(large[truth].mean()) > 0.9
    assert found.clean.item() == pytest.approx(51.2)
    torch.testing.assert_close(
        found.kept[:, 0], 0.2 * found.masks[:, 0, 0][:, truth].sum(1), rtol=0, atol=1e-9
    )
    torch.testing.assert_close(found.kept + found.removed, found.clean.expand(3, 1), rtol=0, atol=1e-9)
    assert found.extremal_areas(0.8).tolist() == [pytest.approx(right)]
    assert found.curve.shape == (3, 1, 151)


def even_share(smooth: SmoothMasks, value: float) -> Tensor:
    """The mean over what each parameter is for an even mask, by central differences of the sum of its pixels."""
    found = torch.empty(smooth.grid, dtype=F64)
    for y, x in np.ndindex(*smooth.grid):
        change = torch.zeros(1, *smooth.grid, dtype=F64)
        change[0, y, x] = 1e-5
        found[y, x] = (smooth(value + change) - smooth(value - change)).sum() / 2e-5
    return found.mean() / found


def test_an_even_push_leaves_masks_even():
    # A score without a gradient: the area alone acts, and prefers no place.
    x = images(1)
    method = ExtremalPerturbation(lambda v: 0 * v.sum((1, 2, 3)))
    for variant, changed in (("preservation", -1), ("deletion", 1)):
        begun, found = (
            method.masks(x, areas=0.5, variant=variant, steps=1, lr=lr, sigma=3.0, step=2).masks
            for lr in (1e-9, 0.003)
        )
        assert 0.001 < changed * float(found.mean() - begun.mean()) < 0.2
        torch.testing.assert_close(found, found.mean().expand_as(found), rtol=0, atol=1e-6)


def test_the_first_step_is_the_gradient_of_the_objective():
    """By central differences of score minus penalty, from the image as it is, with a lr that clamps nothing."""
    model, x = built(Plain), images(2)
    options = {**FEW, "areas": 0.25, "steps": 1, "weight": 3.0, "temperature": 0.2, "levels": 3}
    smooth = SmoothMasks((12, 12), 2, 3.0, 0.2, x)
    levels = Levels(x, "blur", 2.0, 3)

    def objective(parameters: Tensor) -> Tensor:
        masks = smooth(parameters)
        mixed, _ = levels.mixed(torch.arange(2), masks)
        return model(mixed)[:, 3] - 3.0 * area_loss(masks, [0.25, 0.25])

    lr, h = 1e-3, 1e-6
    start = torch.ones(2, *smooth.grid, dtype=F64)
    slope = torch.zeros_like(start)
    with torch.no_grad():
        before = objective(start)
        for y, z in np.ndindex(*smooth.grid):
            lower = start.clone()
            lower[:, y, z] -= h
            slope[:, y, z] = (before - objective(lower)) / h
        expected = smooth((start + lr * slope * even_share(smooth, 1.0)).clamp(0, 1))
    found = ExtremalPerturbation(model).masks(x, 3, lr=lr, **options)
    assert (expected < smooth(start) - 1e-5).any()
    torch.testing.assert_close(found.masks[0, :, 0], expected, rtol=0, atol=1e-7)
    scores = before + 3.0 * area_loss(smooth(start), [0.25, 0.25])
    torch.testing.assert_close(found.curve[0, :, 0], scores, rtol=0, atol=1e-9)


@pytest.mark.parametrize("variant", ["preservation", "deletion", "dual"])
def test_the_ascent_is_that_of_pytorchs_optimiser(variant):
    model, x = built(Plain), images(2)
    smooth = SmoothMasks((12, 12), 2, 3.0, 0.05, x)
    start = 0.0 if variant == "deletion" else 1.0
    parameters = torch.full((2, *smooth.grid), start, dtype=F64, requires_grad=True)
    optimiser = torch.optim.SGD([parameters], lr=0.4, momentum=0.8)
    areas, curve = [0.3, 0.3], []

    def reward(masks: Tensor) -> Tensor:
        kept, removed = (model(x * values[:, None])[:, 3] for values in (masks, 1 - masks))
        return {"preservation": kept, "deletion": -removed, "dual": kept - removed}[variant]

    for weight in (20.0, 20 * math.sqrt(3), 60.0):
        optimiser.zero_grad()
        masks = smooth(parameters)
        curve.append(reward(masks))
        (weight * area_loss(masks, areas) - curve[-1]).sum().backward()
        parameters.grad *= even_share(smooth, start)
        optimiser.step()
        parameters.data.clamp_(0, 1)
    masks = smooth(parameters).detach()
    options = {"lr": 0.4, "momentum": 0.8, "weight": 20, "growth": 3, "sigma": 3.0, "step": 2, "steps": 3}
    found = ExtremalPerturbation(model).masks(
        x, 3, areas=0.3, variant=variant, perturbation="fade", **options
    )
    torch.testing.assert_close(found.masks[0, :, 0], masks, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        found.curve[0].T, torch.stack([*curve, reward(masks)]).detach(), rtol=0, atol=1e-6
    )
    assert ((parameters == 0) | (parameters == 1)).any() and (masks > 0.1).any() and (masks < 0.9).any()


@pytest.mark.parametrize("variant", ["preservation", "deletion", "dual"])
@pytest.mark.parametrize("score", ["output", "softmax"])
def test_scores_are_those_of_the_masked_images(variant, score):
    model, x = built(Plain), images(2)
    found = ExtremalPerturbation(model).masks(x, [3, 1], variant=variant, score=score, **FEW)
    levels = Levels(x, "blur", 2.0, 8)

    def scored(masks: Tensor) -> tuple[Tensor, Tensor]:
        scores = model(levels.mixed(torch.arange(2), masks)[0]).detach()
        odds = torch.log(scores.softmax(1) / (1 - scores.softmax(1)))
        scores, merit = (scores.softmax(1), odds) if score == "softmax" else (scores, scores)
        return scores[[0, 1], [3, 1]], merit[[0, 1], [3, 1]]

    for a in range(2):
        (kept, shown), (removed, left) = scored(found.masks[a, :, 0]), scored(1 - found.masks[a, :, 0])
        torch.testing.assert_close(found.kept[a], kept, rtol=0, atol=1e-10)
        torch.testing.assert_close(found.removed[a], removed, rtol=0, atol=1e-10)
        last = {"preservation": shown, "deletion": -left, "dual": shown - left}[variant]
        torch.testing.assert_close(found.curve[a, :, -1], last, rtol=0, atol=1e-9)
    clean, _ = scored(torch.ones(2, 12, 12, dtype=F64))
    torch.testing.assert_close(found.clean, clean, rtol=0, atol=1e-10)
    start = {"preservation": 1.0, "deletion": 0.0, "dual": 1.0}[variant]
    assert found.masks.min() >= 0 and found.masks.max() <= 1 and (found.masks != start).any()


def test_the_smallest_area_that_is_enough():
    def result(variant: str) -> ExtremalMasks:
        clean = torch.tensor([10.0, 10.0, -1.0, 4.0])
        kept = torch.tensor([[7.0, 9.5, 5.0, 1.0], [9.5, 2.0, 5.0, 2.0]])
        removed = torch.tensor([[0.5, 1.5, -5.0, 4.0], [0.2, 0.5, -5.0, 3.0]])
        return ExtremalMasks(
            variant, [0.3, 0.1], clean, kept, removed, torch.zeros(2, 4, 2), {}, torch.zeros(2, 4, 1, 1, 1)
        )

    nan = math.nan
    for variant, threshold, expected in (
        ("preservation", 0.9, [0.1, 0.3, nan, nan]),
        ("dual", 0.5, [0.1, 0.3, nan, 0.1]),
        ("deletion", 0.9, [0.1, 0.1, nan, nan]),
        ("deletion", 0.8, [0.1, 0.1, nan, nan]),
        ("deletion", 0.85, [0.1, 0.1, nan, nan]),
        ("deletion", 0.25, [0.1, 0.1, nan, 0.1]),
    ):
        found = result(variant).extremal_areas(threshold)
        np.testing.assert_array_equal(found.numpy(), expected)
    for threshold, kind in ((1.5, ValueError), (math.nan, ValueError), ("0.9", TypeError), (True, TypeError)):
        with pytest.raises(kind, match="threshold must be"):
            result("dual").extremal_areas(threshold)


def test_a_result_writes_itself(tmp_path):
    found = ExtremalPerturbation(built(Plain)).masks(images(2), 3, perturbation=torch.zeros(3, 1, 1), **FEW)
    found.write_json(tmp_path / "found.json")
    written = json.loads((tmp_path / "found.json").read_text())
    assert written["areas"] == [0.1, 0.3] and "masks" not in written and "images" not in written["settings"]
    assert written["settings"]["sigma"] == 3.0 and "(3, 1, 1)" in written["settings"]["perturbation"]
    np.testing.assert_allclose(written["kept"], found.kept.numpy())
    assert torch.equal(found.summary, found.masks.sum(0))


def test_defaults_in_pixels_follow_the_size():
    method = ExtremalPerturbation(lambda x: x.sum((1, 2, 3)))
    for size, expected in (((224, 300), (7, 21.0, 20.0)), ((96, 112), (3, 9.0, 8.571428571428571))):
        found = method.masks(torch.ones(1, 1, *size), steps=1, areas=0.5).settings
        assert (found["step"], found["sigma"], found["blur_sigma"]) == pytest.approx(expected)


# ------------------------------------------------------------------------------------------ batches


def test_all_entrances_agree_and_chunks_do_not_matter():
    model, x = built(Plain), images(3)
    method = ExtremalPerturbation(model)
    every = method.attribute_many(x, [3, [0, 4, 1], -1], **FEW)
    assert every.shape == (3, 3, 1, 12, 12) and every.is_contiguous() and every.dtype == F64
    for size in (1, 7, 100):
        found = method.attribute_many(x, torch.tensor([[3] * 3, [0, 4, 1], [4] * 3]), batch_size=size, **FEW)
        torch.testing.assert_close(found, every, rtol=0, atol=1e-9)
    limited = method.attribute_many(x, [3, [0, 4, 1], 4], memory_limit=1, **FEW)
    torch.testing.assert_close(limited, every, rtol=0, atol=1e-9)
    for k, targets in enumerate(([3] * 3, [0, 4, 1], [4] * 3)):
        for n, target in enumerate(targets):
            alone = method.attribute(x[n : n + 1], target, **FEW)
            torch.testing.assert_close(alone[0], every[k, n], rtol=0, atol=1e-9)
    both = method.masks(x, 3, **FEW)
    torch.testing.assert_close(both.summary, every[0], rtol=0, atol=1e-9)
    for a, area in enumerate(FEW["areas"]):
        one = method.masks(x, 3, **{**FEW, "areas": area})
        torch.testing.assert_close(one.masks[0], both.masks[a], rtol=0, atol=1e-9)
    assert (every[0] - every[1]).abs().max() > 1e-3
    (wrapped,) = method.attribute((x,), 3, **FEW)
    torch.testing.assert_close(wrapped, every[0], rtol=0, atol=1e-9)


def test_memory_limits_decide_how_many_masks_pass_together():
    seen: list[int] = []
    model = built(Plain)

    def function(x: Tensor) -> Tensor:
        seen.append(len(x))
        return model(x)

    x = images(4)
    ExtremalPerturbation(function).attribute(x, 3, **FEW)
    assert max(seen) == 8
    seen.clear()
    ExtremalPerturbation(function).attribute(x, 3, memory_limit=1, **FEW)
    assert set(seen[1:]) == {1} and seen[0] == 4  # the clean images first
    seen.clear()
    ExtremalPerturbation(function).attribute(x, 3, batch_size=3, variant="dual", **FEW)
    assert max(seen) == 6


def test_arguments_and_targets_of_each_example():
    model, x = built(Reused), images(3)
    about, gain = drawn(3, 3), torch.tensor([0.5, 5.0, 40.0], dtype=F64)

    def function(v: Tensor, about: Tensor, gain: Tensor, scale: float) -> Tensor:
        return model(v, about, scale) * gain[:, None]

    args = (about, gain, 0.5)
    found = ExtremalPerturbation(function).attribute_many(x, [2, [0, 1, 2]], args, batch_size=4, **FEW)
    for n in range(3):
        for k, target in enumerate((2, n)):
            own = (about[n : n + 1], gain[n : n + 1], 0.5)
            alone = ExtremalPerturbation(function).attribute(x[n : n + 1], target, own, batch_size=1, **FEW)
            torch.testing.assert_close(found[k, n], alone[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("score", ["output", "softmax"])
def test_targets_in_maps_and_single_scores(score):
    model, x = built(Segmentation), images(2)
    method = ExtremalPerturbation(model)
    found = method.attribute_many(x, [(1, 3, 4), [(0, 2, 2), (2, 11, 0)]], score=score, **FEW)
    for k, targets in enumerate((((1, 3, 4), (1, 3, 4)), ((0, 2, 2), (2, 11, 0)))):
        for n, (channel, row, column) in enumerate(targets):
            point = ExtremalPerturbation(lambda v, r=row, c=column: model(v)[:, :, r, c])
            alone = point.attribute(x[n : n + 1], channel, score=score, **FEW)
            torch.testing.assert_close(found[k, n], alone[0], rtol=0, atol=1e-9)
    flat = ExtremalPerturbation(lambda v: model(v)[:, 1, 3, 4])
    column = ExtremalPerturbation(lambda v: model(v)[:, 1:2, 3, 4])
    if score == "output":
        torch.testing.assert_close(flat.attribute(x, **FEW), found[0], rtol=0, atol=1e-9)
        torch.testing.assert_close(column.attribute(x, **FEW), found[0], rtol=0, atol=1e-9)
        torch.testing.assert_close(column.attribute_many(x, [0, None], **FEW)[1], found[0], rtol=0, atol=1e-9)


def test_empty_batches():
    model = built(Plain)
    method = ExtremalPerturbation(model)
    assert method.attribute(torch.empty(0, 3, 12, 12), 3).shape == (0, 1, 12, 12)
    assert method.attribute_many(images(2), []).shape == (0, 2, 1, 12, 12)
    assert method.masks(torch.empty(0, 3, 12, 12), 3, areas=(0.1, 0.2, 0.3)).masks.shape == (3, 0, 1, 12, 12)
    assert method.attribute(torch.empty(2, 3, 0, 12), 3).shape == (2, 1, 0, 12)


# ------------------------------------------------------------------------------------------ the caller's things


def test_kinds_of_inputs_and_callers():
    model, x = built(Plain, dtype=F32), images(2, dtype=F32)
    method = ExtremalPerturbation(model)
    mild = {**FEW, "weight": 0.0}  # or ranks count, of which rounding may change some
    expected = method.attribute(x, 3, **mild)
    assert expected.dtype == F32 and expected.is_contiguous()
    exact = ExtremalPerturbation(built(Plain)).attribute(x.double(), 3, **mild)
    torch.testing.assert_close(expected.double(), exact, rtol=0, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(method.attribute(x, 3, **mild), expected)
    last = method.attribute(x.contiguous(memory_format=torch.channels_last), 3, **mild)
    assert last.is_contiguous()
    torch.testing.assert_close(last, expected, rtol=0, atol=1e-5)
    half = ExtremalPerturbation(built(Plain, dtype=torch.bfloat16)).attribute(x.bfloat16(), 3, **mild)
    assert half.dtype == F32 and 0 < (half - expected).abs().max() < 0.1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = method.attribute(x, 3, **mild)
    assert rounded.dtype == F32 and 0 < (rounded - expected).abs().max() < 0.1
    # Our own sums are not rounded by the caller's autocast.
    plain = ExtremalPerturbation(lambda v: 0.01 * v.square().sum((1, 2, 3)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = plain.attribute(x, **mild)
    torch.testing.assert_close(found, plain.attribute(x, **mild), rtol=0, atol=1e-6)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"torch.no_grad\(\)"):
        method.attribute(x, 3, **mild)


@pytest.mark.parametrize("variant", ["preservation", "deletion", "dual"])
def test_the_callers_things_stay_as_they_were(variant):
    model, x = built(Plain), images(2).requires_grad_()
    model.fc.weight.requires_grad_(False)
    x.grad = torch.ones_like(x)
    kept, before, random = x.detach().clone(), state(model), torch.get_rng_state()
    values = {name: value.clone() for name, value in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = ExtremalPerturbation(model).attribute(x, 3, variant=variant, **FEW)
    assert not found.requires_grad and state(model) == before and x.requires_grad and x.is_leaf
    assert (
        torch.equal(x, kept)
        and torch.equal(x.grad, torch.ones_like(x))
        and torch.equal(torch.get_rng_state(), random)
    )
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())

    def greedy(v: Tensor) -> Tensor:  # changes its argument in place
        return model(v.mul_(1.0))

    torch.testing.assert_close(
        ExtremalPerturbation(greedy).attribute(x, 3, variant=variant, **FEW), found, rtol=0, atol=1e-9
    )
    assert torch.equal(x, kept)


def test_an_exception_leaves_nothing_behind():
    model, x, calls = built(Plain), images(2), []

    def broken(v: Tensor) -> Tensor:
        calls.append(len(v))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return model(v)

    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        ExtremalPerturbation(broken).attribute(x, 3, **FEW)
    assert len(calls) == 4 and state(model) == before and torch.is_grad_enabled()


def test_threads():
    model = built(Plain)
    cases = [(images(2, seed=s), s % 5) for s in range(4)]
    expected = [ExtremalPerturbation(model).attribute(x, t, **FEW) for x, t in cases]
    found: dict[int, Tensor] = {}

    def work(i: int) -> None:
        found[i] = ExtremalPerturbation(model).attribute(*cases[i], **FEW)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], expected[i]) for i in range(4))


def test_progress(capsys):
    ExtremalPerturbation(built(Plain)).attribute_many(
        images(2), [1, 2], show_progress=True, batch_size=3, **FEW
    )
    assert "extremal perturbation: 32/32 steps in " in capsys.readouterr().err
    ExtremalPerturbation(built(Plain)).attribute(images(2), 1, **FEW)
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"areas": ()}, ValueError, "areas must name at least one area"),
        ({"areas": (0.1, 0.0)}, ValueError, "areas must be above 0 and at most 1, but one is 0.0"),
        ({"areas": 1.5}, ValueError, "but one is 1.5"),
        ({"areas": math.nan}, ValueError, "but one is nan"),
        ({"areas": "0.1"}, TypeError, "areas must be a number, but it is '0.1'"),
        ({"areas": (True,)}, TypeError, "areas must be a number, but it is True"),
        ({"steps": 0}, ValueError, "steps must be an int of at least 1, but it is 0"),
        ({"steps": 2.0}, ValueError, "steps must be an int"),
        (
            {"variant": "keep"},
            ValueError,
            "variant must be one of 'preservation', 'deletion', 'dual', but it is 'keep'",
        ),
        ({"score": None}, ValueError, "score must be one of 'output', 'softmax', but it is None"),
        (
            {"perturbation": "noise"},
            ValueError,
            "perturbation must be 'blur', 'fade' or a tensor, but it is 'noise'",
        ),
        ({"perturbation": torch.zeros(2, 1, 1)}, ValueError, "broadcasts to the images"),
        ({"perturbation": torch.zeros(5, 2, 3, 12, 12)}, ValueError, "broadcasts to the images"),
        (
            {"perturbation": torch.zeros(1, dtype=torch.int64)},
            ValueError,
            "perturbation must be a float tensor",
        ),
        ({"blur_sigma": -1.0}, ValueError, "blur_sigma must be at least 0 and finite, but it is -1.0"),
        ({"levels": 1}, ValueError, "levels must be an int of at least 2"),
        ({"step": 0}, ValueError, "step must be an int of at least 1"),
        ({"sigma": 0}, ValueError, "sigma must be above 0 and finite, but it is 0"),
        ({"sigma": math.inf}, ValueError, "sigma must be above 0 and finite"),
        ({"sigma": "3"}, TypeError, "sigma must be a number"),
        ({"temperature": 0.0}, ValueError, "temperature must be above 0"),
        ({"lr": math.nan}, ValueError, "lr must be above 0"),
        ({"momentum": 1.0}, ValueError, "momentum must be at least 0 and below 1, but it is 1.0"),
        ({"weight": -1}, ValueError, "weight must be at least 0"),
        ({"growth": 0}, ValueError, "growth must be above 0"),
        ({"batch_size": 0}, ValueError, "batch_size must be an int of at least 1, but it is 0"),
        ({"memory_limit": 0.5}, ValueError, "memory_limit must be an int of at least 1"),
        ({"target": 5}, IndexError, "out of"),
        ({"target": [1]}, AssertionError, "Target list length does not match output"),
        ({"target": None}, AssertionError, "Target not provided when necessary"),
        ({"target": 0.5}, AssertionError, "not valid"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_before_the_first_step(options, kind, message):
    calls: list[int] = []
    model = built(Plain)

    def function(x: Tensor) -> Tensor:
        calls.append(len(x))
        return model(x)

    method = ExtremalPerturbation(function)
    for call in (method.attribute, method.masks):
        with pytest.raises(kind, match=message):
            call(images(2), **{"target": 1, **options})
    assert len(calls) <= (2 if "target" in options else 0)


def test_bad_inputs_and_functions():
    with pytest.raises(TypeError, match="forward_func must be callable, but it is 3"):
        ExtremalPerturbation(3)
    method = ExtremalPerturbation(built(Plain))
    with pytest.raises(ValueError, match=r"images \(N, C, H, W\)"):
        method.attribute(images(2)[0], 1)
    with pytest.raises(TypeError, match="torch.int64"):
        method.attribute(images(2).long(), 1)
    with pytest.raises(
        ValueError, match="Extremal perturbation masks one batch of images, but inputs holds 2 tensors"
    ):
        method.attribute((images(2), images(2)), 1)
    with pytest.raises(AssertionError, match="scores of each image"):
        ExtremalPerturbation(lambda x: x.mean((0, 2, 3))[None]).attribute(images(2), 1)
    with pytest.raises(ValueError, match="use score='output'"):
        ExtremalPerturbation(lambda x: x.sum((1, 2, 3))).attribute(images(2), score="softmax")
    with pytest.raises(FloatingPointError, match="not finite"):
        ExtremalPerturbation(lambda x: x.sum((1, 2, 3)) / 0).attribute(images(2), **FEW)


# ------------------------------------------------------------------------------------------ a trained network


def test_what_is_preserved_of_scenes_keeps_the_class_and_lies_on_the_object():
    count = 6
    data = scenes.batch(count, seed=2027)
    model, x = models.zfnet_mini(), models.preprocess(data.images)
    found = ExtremalPerturbation(model).masks(x, data.labels, areas=0.1, steps=40)
    masks = found.masks[0, :, 0]
    assert (masks.mean((1, 2)) - 0.1).abs().max() < 0.05
    inside = torch.zeros(count, 96, 96)
    for each, (left, top, right, bottom) in zip(inside, data.boxes.tolist(), strict=True):
        each[top:bottom, left:right] = 1

    def share(values: Tensor) -> float:
        return float(((values * inside).sum((1, 2)) / values.sum((1, 2))).mean())

    # The controls: the same masks in other places, which show as much, as smoothly.
    moved = [masks.flip(1), masks.flip(2), masks.flip((1, 2)), masks.roll(48, 1), masks.roll(48, 2)]
    levels = Levels(x, "blur", 20 * 96 / 224, 8)
    with torch.no_grad():
        kept, *others = (
            float(
                model(levels.mixed(torch.arange(count), values)[0])
                .softmax(1)[range(count), data.labels]
                .mean()
            )
            for values in (masks, *moved)
        )
    assert kept > 0.8 and max(others) < kept - 0.2
    assert share(masks) > 0.85 and max(map(share, moved)) < share(masks) - 0.1 and float(inside.mean()) < 0.3


def test_what_is_preserved_of_a_photograph_is_the_coffee(squeezenet):
    data, images = pytest.importorskip("skimage.data"), pytest.importorskip("PIL.Image")
    preprocess = Preprocess()
    x = preprocess.tensor(preprocess.picture(images.fromarray(data.coffee())))[None]
    found = ExtremalPerturbation(squeezenet).masks(x, 967, areas=0.1, steps=30)  # espresso
    mask = found.masks[0, 0, 0]
    assert abs(float(mask.mean()) - 0.1) < 0.02 and float((mask > 0.5).double().mean()) < 0.12
    cup = torch.zeros(224, 224)
    cup[:135, 30:195] = 1  # drawn by hand, 44 % of the picture
    assert float((mask * cup).sum() / mask.sum()) > 0.9
    # The controls: the same mask half a picture away, where it shows as much.
    moved = torch.stack([mask.roll(112, 1), mask.roll(112, 0), mask.roll((112, 112), (0, 1))])
    given, _ = Levels(x, "blur", 20.0, 8).mixed(torch.zeros(3, dtype=torch.long), moved)
    with torch.no_grad():
        others = squeezenet(given)[:, 967]
    assert float(found.kept) > 5 and float(others.max()) < float(found.kept) / 2
    torch.testing.assert_close(found.clean, squeezenet(x)[:, 967].detach(), rtol=1e-4, atol=1e-4)
