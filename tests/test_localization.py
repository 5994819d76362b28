"""Boxes and masks from maps: thresholds by hand and against scikit-image, the graph cut against all labellings."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
import skimage.measure
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import multivariate_normal
from sklearn.mixture import GaussianMixture

from convviz_cuda import _graph_cut, models, scenes
from convviz_cuda.attr import LayerGradCam
from convviz_cuda.localization import GraphCut, localize


def one(rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)[None]


def iou(a, b) -> float:
    a, b = np.asarray(a, bool), np.asarray(b, bool)
    return (a & b).sum() / (a | b).sum()


def filled(box, size: int) -> np.ndarray:
    x0, y0, x1, y1 = (int(v) for v in box)
    area = np.zeros((size, size), dtype=bool)
    area[y0:y1, x0:x1] = True
    return area


def box_iou(a, b, size: int) -> float:
    return iou(filled(a, size), filled(b, size))


# ---------------------------------------------------------------------------------------------- thresholds


def test_a_threshold_by_hand():
    maps = one([[0, 0, 0, 0, 0], [0, 10, 3, 0, 0], [0, 2, 1.6, 0, 9], [0, 0, 0, 0, 0]])
    found = localize(maps, "cam20")  # above 2: 10 and 3 together, 9 alone; 2 itself is not above
    assert found.boxes.tolist() == [[1, 1, 3, 2]] and found.boxes.dtype == torch.int64
    assert found.masks.nonzero().tolist() == [[0, 1, 1], [0, 1, 2]] and found.masks.dtype == torch.bool
    assert localize(maps, "gradcam15").boxes.tolist() == [[1, 1, 3, 3]]  # above 1.5: 2 and 1.6 too
    assert localize(maps, 0.95).boxes.tolist() == [[1, 1, 2, 2]]
    assert found.found.tolist() == [True]


def test_nothing_is_stretched_before_the_threshold():
    # Between 6 and 10, 20 % of the way is 6.8; 20 % of the maximum is 2, which all are above.
    assert localize(one([[6, 6, 6], [6, 10, 6]]), "cam20").boxes.tolist() == [[0, 0, 3, 2]]
    # Between -90 and 10, 20 % of the way is -70.
    assert localize(one([[-60, 3, -60], [-90, 10, 1]]), "cam20").boxes.tolist() == [[1, 0, 2, 2]]


def test_diagonal_pixels_join_and_components_are_separate():
    maps = one([[1, 0, 0, 0, 0, 1], [0, 1, 0, 0, 0, 0], [0, 0, 1, 0, 1, 1]])
    assert localize(maps, 0.5).boxes.tolist() == [[0, 0, 3, 3]]
    assert int(localize(maps, 0.5).masks.sum()) == 3


def test_of_equal_components_the_first_in_scan_order_is_taken():
    assert localize(one([[0, 0, 0, 0, 1], [1, 1, 0, 0, 1]]), 0.5).boxes.tolist() == [[4, 0, 5, 2]]
    assert localize(one([[1, 1, 0, 0, 0], [0, 0, 0, 1, 1]]), 0.5).boxes.tolist() == [[0, 0, 2, 1]]
    # First by its first pixel, also where a later one starts further to the left.
    assert localize(one([[0, 0, 0, 1], [1, 0, 0, 1], [1, 0, 0, 0]]), 0.5).boxes.tolist() == [[3, 0, 4, 2]]


@given(
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([("cam20", 0.2), ("gradcam15", 0.15), (0.3, 0.3)]),
    st.floats(0.01, 100.0),
)
def test_a_value_of_exactly_the_share_is_never_above_it(dtype, rule, scale):
    maps = torch.tensor([[[rule[1], 1.0, rule[1] * 1.02]]], dtype=dtype) * torch.tensor(scale, dtype=dtype)
    found = localize(maps, rule[0])
    assert found.masks.tolist() == [[[False, True, True]]]
    assert found.settings["dtype"] == str(dtype).removeprefix("torch.")
    if dtype in (torch.float32, torch.float64):
        least = torch.nextafter(maps[0, 0, 0], torch.tensor(math.inf, dtype=dtype))
        maps[0, 0, 0] = least
        assert localize(maps, rule[0]).masks.all()


@pytest.mark.parametrize("rule", ["cam20", "gradcam15", 0.5])
@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_map_without_a_positive_value_has_no_box(rule, value):
    maps = torch.stack([torch.full((4, 5), value), torch.eye(4, 5)])
    found = localize(maps, rule)
    assert found.boxes.tolist() == [[0, 0, 0, 0], [0, 0, 4, 4]]
    assert not found.masks[0].any() and found.found.tolist() == [False, True]


@given(
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    st.sampled_from(["cam20", "gradcam15", 0.3, 0.75]),
    st.integers(0, 2**32 - 1),
)
def test_thresholds_against_scikit_image(shape, rule, seed):
    share = {"cam20": 0.2, "gradcam15": 0.15}.get(rule, rule)
    maps = np.random.default_rng(seed).integers(-3, 5, shape).astype(np.float32)
    found = localize(torch.from_numpy(maps), rule)
    for values, mask, box in zip(maps, found.masks.numpy(), found.boxes.tolist(), strict=True):
        above = (values > share * float(values.max())) & (values.max() > 0)
        regions = skimage.measure.regionprops(skimage.measure.label(above, connectivity=2))
        if not regions:
            assert not mask.any() and box == [0, 0, 0, 0]
            continue
        best = min(regions, key=lambda r: (-r.area, r.coords.tolist()))  # coords are in scan order
        assert np.argwhere(mask).tolist() == best.coords.tolist()
        y0, x0, y1, x1 = best.bbox
        assert box == [x0, y0, x1, y1]


def test_maps_of_other_shapes_types_and_sizes():
    maps = torch.zeros(2, 6, 6)
    maps[0, 1:3, 2:5] = maps[1, 4:, :2] = 1.0
    expected = [[2, 1, 5, 3], [0, 4, 2, 6]]
    for given_ in (maps[:, None], maps.bfloat16(), maps.double().requires_grad_(), maps.mT.contiguous().mT):
        assert localize(given_, "cam20").boxes.tolist() == expected
    images = torch.zeros(2, 3, 12, 12, dtype=torch.uint8)
    large = localize(maps, 0.5, images=images, resize="nearest")
    assert large.boxes.tolist() == [[2 * v for v in box] for box in expected]
    assert large.masks.shape == (2, 12, 12) and large.settings["resize"] == "nearest"
    empty = localize(maps[:0], "cam20")
    assert empty.boxes.shape == (0, 4) and empty.masks.shape == (0, 6, 6)
    none = localize(maps[:0], "graphcut", images=images[:0, :, :6, :6], workers=2)
    assert none.boxes.shape == (0, 4) and none.masks.shape == (0, 6, 6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rule", ["cam20", 0.3, "graphcut"])
def test_maps_of_a_gpu(rule):
    generator = torch.Generator().manual_seed(0)
    maps, images = torch.rand(3, 9, 8, generator=generator), torch.rand(3, 3, 9, 8, generator=generator)
    found, expected = localize(maps.cuda(), rule, images=images.cuda()), localize(maps, rule, images=images)
    assert torch.equal(found.masks, expected.masks) and torch.equal(found.boxes, expected.boxes)


# ------------------------------------------------------------------------------------------- the minimum cut


def energies(cost, links) -> tuple[np.ndarray, np.ndarray]:
    """All labellings (2^P, H, W) of a small grid, and the energy of each."""
    height, width = cost.shape
    labellings = np.array(list(itertools.product((False, True), repeat=cost.size))).reshape(-1, height, width)
    total = np.where(labellings, cost, 0.0).sum((1, 2))
    for y, x in itertools.product(range(height), range(width)):
        for k, (down, right) in enumerate([(0, 1), (1, 0), (1, 1), (1, -1)]):
            if y + down < height and 0 <= x + right < width:
                parted = labellings[:, y, x] != labellings[:, y + down, x + right]
                total = total + parted * links[k, y, x]
    return labellings, total


def valid_links(rng, shape) -> np.ndarray:
    links = rng.random((4, *shape)) ** 3
    links[0, :, -1] = links[1, -1] = links[2, -1] = links[3, -1] = links[2, :, -1] = links[3, :, 0] = 0.0
    return links


@given(
    st.sampled_from([(3, 3), (3, 4), (2, 5), (1, 6), (6, 1), (1, 1)]),
    st.sampled_from([0.1, 1.0, 3.0, 100.0]),
    st.integers(0, 2**32 - 1),
)
def test_the_cut_is_the_minimum_over_all_labellings(shape, strength, seed):
    rng = np.random.default_rng(seed)
    links, cost = valid_links(rng, shape), strength * rng.standard_normal(shape)
    labellings, energy = energies(cost, links)
    found = _graph_cut.minimum_cut(cost, links)
    at = int((labellings == found).all((1, 2)).argmax())
    assert (labellings[at] == found).all()
    assert energy[at] <= energy.min() + 1e-6 * (1.0 + np.abs(cost).sum())


@given(st.integers(0, 2**32 - 1))
def test_of_equal_cuts_the_smallest_foreground_is_taken(seed):
    # Whole numbers with a largest sum of links that is a power of two: rounding is exact and ties are many.
    rng = np.random.default_rng(seed)
    links = np.zeros((4, 3, 3))
    links[0, :, :2], links[1, :2] = rng.integers(0, 3, (3, 2)), rng.integers(0, 3, (2, 3))
    links[0, 1], links[1, :, 1] = [2, 2, 0], [2, 2, 0]  # the middle: 8
    cost = rng.integers(-3, 4, (3, 3)).astype(float)
    labellings, energy = energies(cost, links)
    smallest = labellings[energy == energy.min()].all(
        0
    )  # the least minimiser is the minimisers' intersection
    assert (_graph_cut.minimum_cut(cost, links) == smallest).all()


def test_infinite_costs_are_kept():
    rng = np.random.default_rng(5)
    cost, links = rng.standard_normal((3, 4)), 10.0 * valid_links(rng, (3, 4))
    cost[0, 0], cost[2, 3], cost[1, 1] = -math.inf, math.inf, math.inf
    labellings, energy = energies(np.nan_to_num(cost, posinf=1e6, neginf=-1e6), links)
    assert (_graph_cut.minimum_cut(cost, links) == labellings[energy.argmin()]).all()
    # Without links each pixel is its own.
    assert (_graph_cut.minimum_cut(cost, 0.0 * links) == (cost < 0)).all()


def test_a_large_grid_keeps_its_capacities_within_the_integers():
    # Strong links everywhere and weak, opposite halves: one straight cut; the flow passes 2^31 of the smallest unit.
    cost = np.where(np.arange(120)[None, :] < 70, -50.0, 50.0) * np.ones((90, 1))
    links = _graph_cut.colour_links(np.zeros((90, 120, 3)), 10.0, None)
    assert (_graph_cut.minimum_cut(cost, links) == (cost < 0)).all()


# ---------------------------------------------------------------------------------------- colours and links


def test_links_by_the_formula():
    pixels = np.random.default_rng(1).standard_normal((4, 5, 3))
    squares = {}
    for y, x, (k, (down, right)) in itertools.product(
        range(4), range(5), enumerate([(0, 1), (1, 0), (1, 1), (1, -1)])
    ):
        if y + down < 4 and 0 <= x + right < 5:
            squares[k, y, x] = float(((pixels[y, x] - pixels[y + down, x + right]) ** 2).sum())
    for sigma in (None, 0.7):
        variance = np.mean(list(squares.values())) if sigma is None else sigma**2
        expected = np.zeros((4, 4, 5))
        for (k, y, x), square in squares.items():
            expected[k, y, x] = 3.0 / (1.0, 1.0, 2**0.5, 2**0.5)[k] * math.exp(-square / (2 * variance))
        np.testing.assert_allclose(_graph_cut.colour_links(pixels, 3.0, sigma), expected, rtol=1e-12)
    flat = _graph_cut.colour_links(np.ones((2, 2, 1)), 3.0, None)
    np.testing.assert_allclose(flat[:, 0], [[3, 0], [3, 3], [3 / 2**0.5, 0], [0, 3 / 2**0.5]])


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_likelihood_is_that_of_the_mixture(channels):
    rng = np.random.default_rng(2)
    colours = rng.standard_normal((200, channels)) * 0.3 + rng.integers(0, 3, (200, 1))
    model = _graph_cut.fit_colours(colours, 3, 1e-3, 0)
    asked = 2.0 * rng.standard_normal((5, 6, channels))
    densities = sum(
        weight * multivariate_normal(mean, covariance).pdf(asked)
        for weight, mean, covariance in zip(model.weights_, model.means_, model.covariances_, strict=True)
    )
    found = _graph_cut.log_likelihood(model, asked)
    known = densities > 1e-200
    assert known.any() and np.isfinite(found).all()
    np.testing.assert_allclose(found[known], np.log(densities)[known], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(
        found, model.score_samples(asked.reshape(-1, channels)).reshape(5, 6), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("seeds", ["soft", "hard"])
@pytest.mark.parametrize("seed", range(4))
def test_the_whole_of_it_on_a_tiny_image(seed, seeds):
    """Simonyan's steps written out with scikit-learn's own calls, and all 4096 labellings of 3x4 pixels."""
    rng = np.random.default_rng(seed)
    image, saliency = rng.random((3, 4, 3)), rng.permutation(12.0 * 1.1 ** np.arange(12)).reshape(3, 4)
    order = np.sort(saliency.ravel())
    # Linear quantiles of 12 values: at 0.7 and 0.4 of the 11 steps from the least to the largest, 7.7 and 4.4.
    inside, outside = (
        saliency > order[7] + 0.7 * (order[8] - order[7]),
        saliency <= order[4] + 0.4 * (order[5] - order[4]),
    )
    assert inside.sum() == 4 and outside.sum() == 5
    unit = math.sqrt(((image - image.mean()) ** 2).mean())
    models = [
        GaussianMixture(
            2, reg_covar=0.05 * unit**2, init_params="k-means++", random_state=9, tol=1e-2, max_iter=1000
        ).fit(image[chosen])
        for chosen in (inside, outside)
    ]
    cost = (
        models[1].score_samples(image.reshape(12, 3)) - models[0].score_samples(image.reshape(12, 3))
    ).reshape(3, 4)
    if seeds == "hard":
        cost[inside], cost[outside] = -1e6, 1e6
    links = np.zeros((4, 3, 4))
    for y, x, (k, (down, right)) in itertools.product(
        range(3), range(4), enumerate([(0, 1), (1, 0), (1, 1), (1, -1)])
    ):
        if y + down < 3 and 0 <= x + right < 4:
            square = ((image[y, x] - image[y + down, x + right]) ** 2).sum()
            links[k, y, x] = 0.8 / math.hypot(down, right) * math.exp(-square / (2 * 0.3**2))
    labellings, energy = energies(cost, links)
    least = np.sort(energy)
    assert least[1] - least[0] > 1e-4  # one answer
    expected = labellings[energy.argmin()]
    cut = GraphCut(
        foreground=0.7, background=0.4, components=2, covariance=0.05, samples=None, smoothness=0.8, sigma=0.3,
        seeds=seeds, seed=9,
    )  # fmt: skip
    found = localize(
        torch.from_numpy(saliency)[None], cut, images=torch.from_numpy(image).permute(2, 0, 1)[None]
    )
    label = skimage.measure.label(expected, connectivity=2)
    largest = max(skimage.measure.regionprops(label), key=lambda r: r.area, default=None)
    assert np.argwhere(found.masks[0].numpy()).tolist() == (
        [] if largest is None else largest.coords.tolist()
    )


# --------------------------------------------------------------------------------------------- whole images


def coloured(seed: int, size: int = 40) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """A red-and-yellow disc on a noisy blue-green ground, a rough blob of saliency beside its centre, and the disc."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    centre = rng.uniform(14, 26, 2)
    disc = np.hypot(y - centre[0], x - centre[1]) < rng.uniform(8, 12)
    paint = np.where(rng.random((size, size, 1)) < 0.5, (0.8, 0.2, 0.1), (0.8, 0.7, 0.1))
    ground = np.where(rng.random((size, size, 1)) < 0.5, (0.1, 0.3, 0.7), (0.2, 0.6, 0.5))
    image = np.where(disc[..., None], paint, ground) + 0.05 * rng.standard_normal((size, size, 3))
    off = centre + rng.uniform(-3, 3, 2)
    blob = np.exp(-((y - off[0]) ** 2 + (x - off[1]) ** 2) / (2 * 4.0**2)) + 0.1 * rng.random((size, size))
    return torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(blob), disc


@pytest.fixture(scope="module")
def discs():
    images, maps, truth = zip(*map(coloured, range(6)), strict=True)
    return torch.stack(images), torch.stack(maps), np.stack(truth)


def test_the_cut_finds_a_coloured_object_better_than_a_threshold_does(discs):
    images, maps, truth = discs
    cut = localize(maps, "graphcut", images=images)
    plain = localize(maps, "cam20")
    for mask, other, box, disc in zip(cut.masks, plain.masks, cut.boxes, truth, strict=True):
        assert iou(mask, disc) > 0.9 > 0.8 > iou(other, disc)
        rows, columns = np.flatnonzero(disc.any(1)), np.flatnonzero(disc.any(0))
        exact = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        assert np.abs(np.subtract(box.tolist(), exact)).max() <= 1


def test_scenes_with_grad_cam_of_the_trained_network():
    """Held-out scenes, Grad-CAM of the true class, against the best of all centred squares for these very scenes."""
    data = scenes.batch(24, seed=2027)
    model = models.zfnet_mini()
    cam = LayerGradCam(model, model.relu5).attribute(
        models.preprocess(data.images), target=data.labels, relu_attributions=True
    )
    maps = F.interpolate(cam, (96, 96), mode="bilinear", align_corners=False)

    def scores(boxes) -> tuple[float, float]:
        each = np.array([box_iou(a, b, 96) for a, b in zip(boxes, data.boxes, strict=True)])
        return each.mean(), (each >= 0.5).mean()

    # A hill in the middle is no control of the cut: its colours suffice for most of these scenes. Noise is one.
    noise = torch.rand(24, 96, 96, generator=torch.Generator().manual_seed(0))
    random = scores(localize(noise, "graphcut", images=data.images).boxes)
    cut = scores(localize(maps, "graphcut", images=data.images).boxes)
    plain = scores(localize(maps, "gradcam15").boxes)
    small = localize(cam, "gradcam15", images=data.images, resize="bilinear")
    assert scores(small.boxes) == plain
    centre = max(scores([(48 - r, 48 - r, 48 + r, 48 + r)] * 24) for r in range(15, 48))
    assert cut[0] > 0.65 and cut[1] > 0.75
    assert cut[0] > plain[0] + 0.1 and plain[0] > centre[0] + 0.05 and random[0] < 0.4


def test_it_repeats_and_depends_on_its_seed_alone(discs):
    images, maps, _ = discs
    # Few samples and components that fit badly, so that another seed is another result.
    rough = {"samples": 20, "components": 4, "smoothness": 0.5}
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = localize(maps, GraphCut(**rough), images=images)
    again = localize(maps, GraphCut(**rough), images=images)
    other = localize(maps, GraphCut(**rough, seed=1), images=images)
    assert torch.equal(first.masks, again.masks) and torch.equal(first.boxes, again.boxes)
    assert not torch.equal(first.masks, other.masks)
    assert torch.equal(state[0], torch.get_rng_state()) and (state[1] == np.random.get_state()[1]).all()
    # An image's result is its own: not its neighbours', not its place in the batch.
    turned = localize(maps.flip(0)[:4], GraphCut(**rough), images=images.flip(0)[:4])
    assert torch.equal(turned.masks.flip(0), first.masks[2:])


def test_threads_give_the_same(discs):
    images, maps, _ = discs
    expected = localize(maps, "graphcut", images=images).masks
    results: list = [None] * 3

    def work(i: int) -> None:
        results[i] = localize(maps, "graphcut", images=images).masks

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert all(torch.equal(result, expected) for result in results)


def test_pixels_of_any_scale_and_offset_and_dtype(discs):
    images, maps, _ = discs
    expected = localize(maps, "graphcut", images=images)
    for same in (255.0 * images, (images - 0.45) / 0.22, images.float()):
        assert torch.equal(localize(maps, "graphcut", images=same).boxes, expected.boxes)
    bytes_ = (images.clamp(0, 1) * 255).round().to(torch.uint8)
    a = localize(maps, "graphcut", images=bytes_)
    b = localize(maps, "graphcut", images=bytes_.double() / 255)
    assert torch.equal(a.masks, b.masks)
    assert torch.equal(localize(7 * maps - 3, "graphcut", images=images).masks, expected.masks)  # order alone
    wide = localize(maps, GraphCut(sigma=0.2), images=images)
    assert torch.equal(localize(maps, GraphCut(sigma=51.0), images=255.0 * images).masks, wide.masks)
    assert localize(maps, "graphcut", images=images[:, :1]).masks.shape == maps.shape
    assert localize(maps, "graphcut", images=images.bfloat16()).found.all()


def test_each_setting_has_its_effect(discs):
    images, maps, _ = discs
    base = {"samples": 100, "components": 3, "smoothness": 1.0, "foreground": 0.95, "background": 0.3}
    expected = localize(maps, GraphCut(**base), images=images)
    for changed in (
        {"foreground": 0.6}, {"background": 0.8}, {"components": 1}, {"covariance": 0.5}, {"samples": 12},
        {"smoothness": 60.0}, {"sigma": 0.02}, {"seeds": "hard", "background": 0.9},
    ):  # fmt: skip
        other = localize(maps, GraphCut(**{**base, **changed}), images=images)
        assert not torch.equal(other.masks, expected.masks), changed


def test_degenerate_images_and_maps():
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, 12, 12, generator=generator)
    rough = torch.rand(1, 12, 12, generator=generator)
    # A constant map says nothing, and neither do the colours of a constant image.
    assert localize(torch.ones(1, 12, 12), "graphcut", images=image).boxes.tolist() == [[0, 0, 0, 0]]
    assert localize(rough, "graphcut", images=torch.full_like(image, 0.1)).boxes.tolist() == [[0, 0, 0, 0]]
    # Fewer colours than components, and a map with one value above zero and with almost all at its maximum.
    two = torch.zeros(1, 3, 12, 12)
    two[..., 3:8, 4:9] = 1.0
    point = torch.zeros(1, 12, 12)
    point[0, 5, 5] = 1.0
    assert localize(point, "graphcut", images=two).boxes.tolist() == [[4, 3, 9, 8]]
    most = torch.zeros(1, 12, 12)
    most[..., 3:8, 4:9] = 2.0
    assert localize(most, "graphcut", images=two).boxes.tolist() == [[4, 3, 9, 8]]
    for size in ((1, 1), (1, 2), (2, 1), (1, 7)):
        tiny = localize(
            torch.arange(1.0, 1 + size[0] * size[1]).reshape(1, *size),
            "graphcut",
            images=torch.rand(1, 3, *size),
        )
        assert tiny.masks.shape == (1, *size)


def test_the_callers_tensors_stay(discs):
    images, maps = discs[0].clone().requires_grad_(), discs[1].clone().requires_grad_()
    before = images.detach().clone(), maps.detach().clone()
    for rule in ("graphcut", "cam20"):
        found = localize(maps, rule, images=images)
        assert not found.boxes.requires_grad
    assert torch.equal(images.detach(), before[0]) and torch.equal(maps.detach(), before[1])
    assert images.grad is None and images.requires_grad


def test_settings_and_json(discs, tmp_path, capsys):
    images, maps, _ = discs
    found = localize(maps[:2], GraphCut(components=3), images=images[:2], show_progress=True)
    assert "graph cut: 2/2 images" in capsys.readouterr().err
    found.write_json(tmp_path / "found.json")
    stored = json.loads((tmp_path / "found.json").read_text())
    assert stored["boxes"] == found.boxes.tolist() and "masks" not in stored
    assert stored["settings"]["rule"] == "graphcut" and stored["settings"]["components"] == 3
    assert set(GraphCut.__dataclass_fields__) | {"tolerance", "component", "resize"} < set(stored["settings"])
    assert localize(maps, "cam20").settings.items() >= {"rule": "cam20", "share": 0.2}.items()
    assert localize(maps, 0.4).settings.items() >= {"rule": "threshold", "share": 0.4}.items()
    localize(maps[:2], "graphcut", images=images[:2])
    assert not capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- workers


def test_workers_change_nothing(discs):
    images, maps, _ = discs
    rule = GraphCut(samples=30, components=4, smoothness=0.5)
    assert torch.equal(
        localize(maps, rule, images=images, workers=2).masks, localize(maps, rule, images=images).masks
    )


SCRIPT = """
    import torch
    from convviz_cuda import progress
    from convviz_cuda.localization import localize

    progress.IN_LOG = 0.0
    if __name__ == "__main__":
        images = torch.rand(200, 3, 160, 160)
        try:
            localize(torch.rand(200, 160, 160), "graphcut", images=images, workers=2, show_progress=True)
        except KeyboardInterrupt:
            import multiprocessing
            print("interrupted, children left:", len(multiprocessing.active_children()), flush=True)
"""


@pytest.fixture
def working(tmp_path):
    """A process whose two workers work."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
        start_new_session=True,
    )  # fmt: skip
    try:
        said = process.stderr.readline()  # the first line of progress
        assert "left" in said, said
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_ctrl_c_ends_the_workers(working):
    os.killpg(working.pid, signal.SIGINT)  # as a terminal does
    out, err = working.communicate(timeout=60)
    assert out == "interrupted, children left: 0\n" and "Traceback" not in err
    assert working.returncode == 0


@pytest.mark.slow
def test_workers_end_with_a_process_that_is_killed(working):
    working.kill()
    working.communicate(timeout=60)  # the workers hold its stderr: it ends with them


# --------------------------------------------------------------------------------------------------- errors


MAPS, IMAGES = torch.rand(2, 5, 6), torch.rand(2, 3, 5, 6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((MAPS, "graphcut"), ValueError, "needs images="),
        ((MAPS, "otsu"), ValueError, "'graphcut', 'cam20', 'gradcam15', .* but it is 'otsu'"),
        ((MAPS, None), ValueError, "but it is None"),
        ((MAPS, True), ValueError, "but it is True"),
        ((MAPS, 0.0), ValueError, "between 0 and 1, but rule is 0.0"),
        ((MAPS, 1), ValueError, "between 0 and 1, but rule is 1"),
        ((MAPS, 20.0), ValueError, "rule is 20.0"),
        ((MAPS, math.nan), ValueError, "rule is nan"),
        ((MAPS.numpy(), "cam20"), TypeError, "maps must be a tensor of floats"),
        ((MAPS.long(), "cam20"), TypeError, "int64"),
        ((MAPS[0], "cam20"), ValueError, r"\(N, H, W\)"),
        ((IMAGES, "cam20"), ValueError, "reduce channels"),
        ((MAPS[:, :0], "cam20"), ValueError, "at least one pixel"),
        ((MAPS / 0.0, "cam20"), ValueError, "finite"),
        ((MAPS * math.nan, "graphcut", IMAGES), ValueError, "maps must be finite"),
        ((MAPS, "graphcut", IMAGES * math.nan), ValueError, "images must be finite"),
        ((MAPS, "graphcut", IMAGES[:1]), ValueError, "each of 1 images, but it holds 2"),
        ((MAPS, "graphcut", IMAGES[..., 1:]), ValueError, r"size \(5, 5\), but it is \(5, 6\)"),
        ((MAPS, "graphcut", IMAGES[0]), ValueError, r"\(N, C, H, W\)"),
        ((MAPS, "graphcut", IMAGES[:, :0]), ValueError, r"\(N, C, H, W\)"),
        ((MAPS, "graphcut", IMAGES.long()), TypeError, "uint8 or floats, but it is torch.int64"),
        ((MAPS, "graphcut", IMAGES.numpy()), TypeError, "ndarray"),
        ((MAPS, "cam20", None, "bilinear"), ValueError, "images is None"),
        ((MAPS, "cam20", IMAGES, "cubic"), ValueError, "'cubic'"),
        (
            (MAPS, "graphcut", IMAGES, None, 0),
            ValueError,
            "workers must be an int of at least 1, but it is 0",
        ),
        (
            (MAPS, "graphcut", IMAGES, None, 2.0),
            ValueError,
            "workers must be an int of at least 1, but it is 2.0",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, error, message):
    names = ("maps", "rule", "images", "resize", "workers")
    with pytest.raises(error, match=message):
        localize(**dict(zip(names, arguments, strict=False)))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"foreground": 1.0}, ValueError, "foreground 1.0"),
        ({"foreground": 0.2}, ValueError, "background is 0.3 and foreground 0.2"),
        ({"background": -0.1}, ValueError, "background must be finite and at least 0, but it is -0.1"),
        ({"foreground": 0.0}, ValueError, "background is 0.3 and foreground 0.0"),
        ({"foreground": "0.9"}, TypeError, "foreground must be a number"),
        ({"components": 0}, ValueError, "components must be an int of at least 1"),
        ({"components": 2.5}, ValueError, "components must be an int"),
        ({"covariance": 0.0}, ValueError, "covariance must be finite and positive, but it is 0.0"),
        ({"samples": 1}, ValueError, "samples must be an int of at least 2"),
        ({"smoothness": math.inf}, ValueError, "smoothness"),
        ({"sigma": 0}, ValueError, "sigma"),
        ({"seeds": "firm"}, ValueError, "'soft' or 'hard', but it is 'firm'"),
        ({"seed": -1}, ValueError, "seed must be an int of at least 0"),
        ({"seed": 2**32}, ValueError, "at most 4294967295"),
        ({"seed": 1.0}, ValueError, "seed must be an int"),
    ],
)
def test_settings_of_the_cut_that_make_no_sense_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        GraphCut(**options)
    assert GraphCut(foreground=0.0, background=0.0).foreground == 0.0


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert localize(MAPS, "cam20").found.all()
    with pytest.raises(ImportError, match=r"scikit-learn.*convviz_cuda\[localization\]"):
        localize(MAPS, "graphcut", images=IMAGES)
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ImportError, match=r"SciPy.*convviz_cuda\[localization\]"):
        localize(MAPS, "cam20")
