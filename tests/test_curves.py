"""Insertion, deletion and region perturbation: closed forms of linear models, the masked images themselves, errors."""

from __future__ import annotations

import contextlib
import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from convviz_cuda.attr._masked import PeakBytes
from convviz_cuda.fills import fill_values
from convviz_cuda.metrics import (
    _curves,
    average_drop,
    confidence,
    insertion_deletion,
    perturbation_curve,
    road,
    sensitivity_n,
)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Linear:
    """The sum of pixels under weights, (N, 1): each row is summed by itself, in any batch alike."""

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights

    def __call__(self, x: Tensor) -> Tensor:
        return torch.stack([(row * self.weights).sum() for row in x]).reshape(-1, 1)


class Seen:
    """Keeps copies of the images that it is given."""

    def __init__(self) -> None:
        self.images: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.images += [row.clone() for row in x]
        return torch.stack([row.double().sum() for row in x]).reshape(-1, 1)


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.conv = nn.Conv2d(3, 6, 3, padding=1, dtype=dtype)
        self.fc = nn.Linear(6, 4, dtype=dtype)
        for p in self.parameters():
            p.data.copy_(torch.randn(p.shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu().mean((2, 3)))


def scan_order(values: np.ndarray, most_first: bool = True) -> list[int]:
    """By insertion, one number after the other: those that are equal stay as they came."""
    order: list[int] = []
    for i, value in enumerate(values):
        place = 0
        while place < len(order) and (
            values[order[place]] >= value if most_first else values[order[place]] <= value
        ):
            place += 1
        order.insert(place, i)
    return order


def masked(image: Tensor, fill: Tensor, order: list[int], hidden: int) -> Tensor:
    """The image with the first pixels of an order replaced, one by one."""
    out, width = image.clone(), image.shape[2]
    for pixel in order[:hidden]:
        y, x = divmod(pixel, width)
        out[:, y, x] = fill[:, y, x]
    return out


# -------------------------------------------------------------------------------- insertion and deletion


def test_a_linear_model_has_a_closed_form():
    x, weights, maps = drawn(2, 3, 5, 6), drawn(3, 5, 6, seed=1), drawn(2, 5, 6, seed=2)
    fill = drawn(2, 3, 5, 6, seed=3)
    found = insertion_deletion(
        Linear(weights), x, maps, 0, pixels_per_step=7, score="output", deletion_fill=0.0, insertion_fill=fill
    )
    counts = [0, 7, 14, 21, 28, 30]
    for n in range(2):
        order = np.argsort(-maps[n].numpy().ravel(), kind="stable")
        given = (x[n] * weights).sum(0).numpy().ravel()[order]
        filled = (fill[n] * weights).sum(0).numpy().ravel()[order]
        deletion = [given[k:].sum() for k in counts]
        insertion = [given[:k].sum() + filled[k:].sum() for k in counts]
        for curve, expected in ((found.deletion, deletion), (found.insertion, insertion)):
            np.testing.assert_allclose(curve.curves[n].numpy(), expected, rtol=0, atol=1e-12)
            np.testing.assert_allclose(curve.fractions.numpy(), np.array(counts) / 30, rtol=0, atol=1e-15)
            widths = np.diff(counts) / 30
            area = sum(w * (a + b) / 2 for w, a, b in zip(widths, expected, expected[1:], strict=False))
            assert abs(float(curve.values[n]) - area) < 1e-12


@pytest.mark.parametrize(
    "steps", [{"steps": 1}, {"steps": 7}, {"steps": 100}, {"pixels_per_step": 13}, {"pixels_per_step": 1000}]
)
def test_the_area_does_not_depend_on_the_steps(steps):
    """Equal pixels under a linear model: a straight line from 1 to 0, and from 0 to 1."""
    x, weights = (
        torch.ones(1, 2, 10, 10, dtype=torch.float64),
        torch.full((2, 10, 10), 1 / 200, dtype=torch.float64),
    )
    found = insertion_deletion(
        Linear(weights), x, drawn(1, 10, 10), score="output", insertion_fill=0.0, **steps
    )
    assert abs(found.deletion.mean - 0.5) < 1e-12 and abs(found.insertion.mean - 0.5) < 1e-12
    assert found.deletion.fractions[0] == 0 and found.deletion.fractions[-1] == 1
    assert found.deletion.settings["steps"] == len(found.deletion.fractions) - 1


def test_steps_are_of_about_equal_size():
    x, maps = torch.ones(1, 1, 7, 7), drawn(1, 7, 7)
    for steps, allowed in ((10, {4, 5}), (30, {1, 2}), (48, {1, 2}), (49, {1})):
        found = insertion_deletion(Seen(), x, maps, mode="deletion", steps=steps, score="output")
        sizes = (found.fractions * 49).diff().round().long().tolist()
        assert sum(sizes) == 49 and set(sizes) == allowed and len(sizes) == steps
    usual = insertion_deletion(Seen(), x, maps, mode="deletion", score="output")
    assert usual.settings["steps"] == 49  # no more than pixels


@pytest.mark.parametrize("score", ["softmax", "output"])
@pytest.mark.parametrize(
    "fill", [0.0, 0.25, [0.1, -1.0, 3.0], "mean", "grey", "blur", "rise2018", "noise", "tensor", "picture"]
)
def test_both_ends_are_the_image_and_the_fill(fill, score):
    model, x, maps = Net(), drawn(2, 3, 12, 14), drawn(2, 12, 14, seed=1)
    if fill in ("tensor", "picture"):
        fill = drawn(2 if fill == "tensor" else 1, 3, 12, 14, seed=7)
    found = insertion_deletion(
        model, x, maps, 2, steps=5, deletion_fill=fill, insertion_fill=fill, score=score, batch_size=1, seed=4
    )
    with torch.no_grad():
        ends = []
        for images in (x, fill_values(x, fill, 4).expand(x.shape)):
            output = torch.cat([model(image[None].contiguous()) for image in images])
            ends.append((output.softmax(1) if score == "softmax" else output)[:, 2])
    assert torch.equal(found.deletion.curves[:, 0], ends[0]) and torch.equal(
        found.insertion.curves[:, -1], ends[0]
    )
    # A blur of one image rounds differently than of several.
    for curve, place in ((found.deletion, -1), (found.insertion, 0)):
        torch.testing.assert_close(curve.curves[:, place], ends[1], rtol=0, atol=1e-12)
    assert (ends[0] - ends[1]).abs().min() > 1e-6


values = st.sampled_from([-1.0, -0.0, 0.0, 0.5, 0.5, 2.0])


@given(
    st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)),
    st.data(),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    st.booleans(),
    st.integers(1, 5),
)
def test_the_masked_images(size, data, dtype, last, per_step):
    """Every image of both curves, pixel by pixel; many pixels of equal value."""
    count, height, width = size
    maps = torch.tensor(
        data.draw(st.lists(values, min_size=count * height * width, max_size=count * height * width))
    ).view(size)
    x, fill = drawn(count, 3, height, width, dtype=dtype), drawn(count, 3, height, width, seed=1, dtype=dtype)
    layout = torch.channels_last if last else torch.contiguous_format
    for mode in ("insertion", "deletion"):
        model = Seen()
        found = insertion_deletion(
            model, x.contiguous(memory_format=layout), maps, mode=mode, pixels_per_step=per_step,
            insertion_fill=fill, deletion_fill=fill, score="output", target=0,
        )  # fmt: skip
        counts = [*range(0, height * width, per_step), height * width]
        expected = torch.zeros(count, len(counts), dtype=torch.float64)
        for n in range(count):
            order = scan_order(maps[n].numpy().ravel())
            for s, k in enumerate(counts):
                image = (
                    masked(x[n], fill[n], order, k) if mode == "deletion" else masked(fill[n], x[n], order, k)
                )
                expected[n, s] = image.double().sum()
                assert any(torch.equal(image, seen) for seen in model.images)
        torch.testing.assert_close(found.curves, expected, rtol=0, atol=1e-6)


def test_pixels_of_equal_value_follow_the_scan():
    """Also where there are many, for which sorting is stable only when asked to be."""
    x = torch.ones(1, 1, 70, 80)
    for value in (0.0, -3.0, 7.0):
        model = Seen()
        insertion_deletion(
            model, x, torch.full((1, 70, 80), value), 0, mode="deletion", pixels_per_step=800, score="output",
            batch_size=1,
        )  # fmt: skip
        hidden = {int((image == 0).sum()): image.flatten() for image in model.images}
        assert set(hidden) == set(range(0, 5601, 800))
        assert all(not image[:k].any() and image[k:].all() for k, image in hidden.items())


def test_the_predicted_class_or_targets_of_each_image():
    model, x, maps = Net(), drawn(3, 3, 8, 8), drawn(3, 1, 8, 8, seed=1)
    best = model(x).argmax(1)
    usual = insertion_deletion(model, x, maps, mode="deletion", steps=4)
    assert usual.targets == best.tolist() and usual.settings["target"] == "predicted"
    for target in (best, best.tolist(), best.numpy(), [(int(b),) for b in best]):
        again = insertion_deletion(model, x, maps, target, mode="deletion", steps=4)
        assert torch.equal(again.curves, usual.curves) and again.settings["target"] == "given"
    mixed = insertion_deletion(model, x, maps, [3, 0, -2], mode="deletion", steps=4)
    for n, target in enumerate((3, 0, 2)):
        alone = insertion_deletion(model, x[n : n + 1], maps[n : n + 1], target, mode="deletion", steps=4)
        torch.testing.assert_close(mixed.curves[n], alone.curves[0], rtol=0, atol=1e-12)
    with pytest.raises(AssertionError, match="2 targets"):
        insertion_deletion(model, x, maps, [0, 1])
    with pytest.raises(IndexError):
        insertion_deletion(model, x, maps, [0, 1, 4])


def authors_kernel() -> np.ndarray:
    """A point in 11 x 11 zeros after diffusion with mirrors around it, summed over the point's mirror images."""
    reach = range(-4 * 11, 4 * 11 + 11)  # the Gaussian is cut off at 20
    bell = {d: np.exp(-(d**2) / 50) for d in range(-20, 21)}
    total = sum(bell.values())
    # The mirror images of the middle, 5: 5 + 22 m and -1 - 5 + 22 m.
    mirrored = {5 + 22 * m for m in range(-4, 5)} | {-6 + 22 * m for m in range(-4, 5)}
    line = [sum(bell.get(i - j, 0.0) for j in reach if j in mirrored) / total for i in range(11)]
    return np.outer(line, line)


def test_the_blur_of_rises_authors():
    impulse = torch.zeros(1, 2, 31, 31, dtype=torch.float64)
    impulse[0, 1, 15, 15], impulse[0, 0, 0, 0] = 1, 1
    blurred = fill_values(impulse, "rise2018")[0]
    np.testing.assert_allclose(blurred[1, 10:21, 10:21].numpy(), authors_kernel(), rtol=1e-12)
    assert abs(float(blurred[1].sum()) - 1) < 1e-12 and blurred[1].count_nonzero() == 121
    assert abs(float(blurred[1, 15, 15] / blurred[1, 10, 10]) - 1.14) < 0.01
    # Zeros beyond the border: what falls there is lost.
    np.testing.assert_allclose(blurred[0, :6, :6].numpy(), authors_kernel()[5:, 5:], rtol=1e-12)
    assert blurred[0].count_nonzero() == 36


def test_the_blur_of_rises_authors_is_scipys():
    filters = pytest.importorskip("scipy.ndimage", reason="SciPy is not installed")
    point = np.zeros((11, 11))
    point[5, 5] = 1
    kernel = filters.gaussian_filter(point, 5)
    np.testing.assert_allclose(authors_kernel(), kernel, rtol=1e-12)
    x = drawn(2, 3, 20, 24)
    expected = [[filters.convolve(plane, kernel, mode="constant") for plane in image] for image in x.numpy()]
    np.testing.assert_allclose(fill_values(x, "rise2018").numpy(), np.array(expected), rtol=0, atol=1e-12)


def test_the_preset_is_the_papers_settings():
    model, x, maps = Net(), drawn(1, 3, 30, 31), drawn(1, 30, 31, seed=1)
    found = insertion_deletion(model, x, maps, 1, preset="rise2018")
    # The authors' kernel, from what they say it is: see below.
    blurred = torch.nn.functional.conv2d(
        x.transpose(0, 1), torch.from_numpy(authors_kernel())[None, None], padding=5
    ).transpose(0, 1)
    same = insertion_deletion(
        model, x, maps, 1, pixels_per_step=224, deletion_fill=0, insertion_fill=blurred, score="softmax"
    )
    torch.testing.assert_close(found.insertion.curves, same.insertion.curves, rtol=0, atol=1e-12)
    assert torch.equal(found.deletion.curves, same.deletion.curves)
    assert found.deletion.settings["preset"] == "rise2018" and found.deletion.settings["steps"] == 5
    assert "kernel 11" in found.insertion.settings["fill"] and found.deletion.settings["fill"] == 0.0
    insertion_deletion(
        model, x, maps, 1, preset="rise2018", deletion_fill=0, score="softmax"
    )  # as it has them
    for wrong in (
        {"pixels_per_step": 10},
        {"deletion_fill": 0.5},
        {"insertion_fill": torch.zeros(3, 30, 31)},
        {"insertion_fill": "blur"},
        {"score": "output"},
        {"steps": 3},
    ):
        with pytest.raises(ValueError, match="rise2018"):
            insertion_deletion(model, x, maps, 1, preset="rise2018", **wrong)


# ---------------------------------------------------------------------------------- region perturbation


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


# -------------------------------------------------------------------------------------- both kinds alike


def both(model, x, maps, target=None, **options):
    """All curves, as one tensor."""
    one = insertion_deletion(model, x, maps, target, steps=6, **options)
    two = perturbation_curve(model, x, maps, target, region=3, steps=6, repetitions=2, **options)
    return torch.stack([one.insertion.curves, one.deletion.curves, two.morf.curves, two.lerf.curves])


@pytest.mark.parametrize("count", [1, 4])
def test_chunks_change_nothing(count):
    x, maps, model = drawn(count, 3, 9, 10), drawn(count, 9, 10, seed=1), Linear(drawn(3, 9, 10, seed=2))
    alone = both(model, x, maps, 0, batch_size=1, score="output")
    for batch_size in (2, 3, 5, 13, 100, None):
        assert torch.equal(both(model, x, maps, 0, batch_size=batch_size, score="output"), alone)
    assert torch.equal(both(model, x, maps, 0, memory_limit=10_000, score="output"), alone)
    for n in range(count if count > 1 else 0):  # noise belongs to an image's number
        part = insertion_deletion(model, x[n : n + 1], maps[n : n + 1], 0, steps=6, score="output")
        assert torch.equal(torch.stack([part.insertion.curves, part.deletion.curves])[:, 0], alone[:2, n])


def test_memory_is_bounded():
    """Neither the masks of all steps nor the fills of all images are held at once."""
    x, maps = drawn(24, 3, 64, 64, dtype=torch.float32), drawn(24, 64, 64, dtype=torch.float32)
    for run in (
        lambda: insertion_deletion(Linear(torch.ones(3, 64, 64)), x, maps, 0, steps=64, score="output"),
        lambda: perturbation_curve(
            Linear(torch.ones(3, 64, 64)), x, maps, 0, order="morf", steps=30, repetitions=3, score="output"
        ),
    ):
        with PeakBytes(True) as peak:
            run()
        assert peak.bytes < 8 * x.nbytes  # all masks would be 130 and 93


@pytest.mark.parametrize("run", ["sensitivity_n", "confidence"])
def test_memory_does_not_grow_with_what_is_computed(run):
    x, maps = drawn(32, 3, 64, 64, dtype=torch.float32), drawn(32, 64, 64, dtype=torch.float32)
    options = {
        "sensitivity_n": {"samples": 10, "sizes": 6},
        "confidence": {"maps": {str(i): maps for i in range(6)}},
    }[run]
    call = {"sensitivity_n": sensitivity_n, "confidence": confidence}[run]
    usual = {
        "model": Linear(torch.ones(3, 64, 64)),
        "images": x,
        "maps": maps,
        "target": 0,
        "score": "output",
    }
    with PeakBytes(True) as peak:
        call(**usual | options)
    # All at once they would be 61 and 7 times the images.
    assert peak.bytes < {"sensitivity_n": 4, "confidence": 3}[run] * x.nbytes


def test_a_function_that_mixes_its_batch_is_evaluated_image_by_image():
    net = Net()

    def mixing(x: Tensor) -> Tensor:
        return net(x) - net(x).mean(0)

    def alone(x: Tensor) -> Tensor:
        return torch.cat([mixing(row[None]) for row in x])

    x, maps = drawn(2, 3, 9, 10), drawn(2, 9, 10, seed=1)
    torch.testing.assert_close(both(mixing, x, maps, 1), both(alone, x, maps, 1), rtol=0, atol=0)


def test_mixing_is_seen_between_the_ends():
    """Neighbouring steps are so alike that what a mean over them does to a score is within float32's rounding."""

    def mixing(x: Tensor) -> Tensor:
        total = x.flatten(1).sum(1, keepdim=True)
        return total + 0.04 * (total.mean(0) - total)

    x, maps = torch.ones(1, 1, 30, 30), drawn(1, 30, 30)
    options = {"mode": "deletion", "steps": 900, "score": "output"}
    found = insertion_deletion(mixing, x, maps, 0, **options)
    torch.testing.assert_close(
        found.curves, torch.arange(900.0, -1, -1, dtype=torch.float64)[None], rtol=0, atol=1e-3
    )
    alone = insertion_deletion(mixing, x, maps, 0, batch_size=1, **options)
    assert torch.equal(found.curves, alone.curves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts_and_dtypes(dtype):
    model = Net(dtype)
    x, maps = drawn(2, 3, 12, 13, dtype=dtype), drawn(2, 12, 13, seed=1)
    exact = both(Net(), x.double(), maps, 1)  # the noise is drawn in each dtype
    for given_images in (
        x,
        x.contiguous(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().mT,
    ):
        found = both(model, given_images, maps, 1)
        assert found.dtype == torch.float64
        assert (found - exact).abs().max() < (1e-5 if dtype == torch.float32 else 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert (both(Net(torch.float32), x.float(), maps, 1) - exact).abs().max() < 0.1


def test_arguments_of_each_image():
    x, maps, shift = drawn(3, 3, 8, 8), drawn(3, 8, 8, seed=1), torch.tensor([0.0, 10.0, 200.0]).double()
    net = Linear(drawn(3, 8, 8, seed=2))
    plain = both(net, x, maps, score="output")
    shifted = both(
        lambda x, s, scale: net(x) * scale + s[:, None],
        x,
        maps,
        score="output",
        additional_forward_args=(shift, 2),
    )
    torch.testing.assert_close(shifted, 2 * plain + shift[None, :, None], rtol=0, atol=1e-9)


def test_maps_of_another_size_need_a_word():
    x, maps = drawn(1, 3, 8, 8), torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    with pytest.raises(ValueError, match="resize"):
        insertion_deletion(Net(), x, maps)
    large = maps.repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert torch.equal(both(Net(), x, maps, 0, resize="nearest"), both(Net(), x, large, 0))


def test_no_images():
    x, maps = torch.zeros(0, 3, 8, 8), torch.zeros(0, 8, 8)
    assert both(Net(torch.float32), x, maps).shape == (4, 0, 7)
    assert np.isnan(insertion_deletion(Net(torch.float32), x, maps, steps=2).insertion.mean)


@pytest.mark.parametrize("raised", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_behind(raised):
    model = Net(torch.float32).train()
    x, maps = drawn(2, 3, 8, 9, dtype=torch.float32).requires_grad_(), drawn(2, 8, 9).requires_grad_()
    given_x, given_maps, state = x.detach().clone(), maps.detach().clone(), torch.get_rng_state()
    calls = 0

    def spoiling(images: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        out = model(images.clone())
        images.zero_()  # what it is given is its own
        return out

    def failing(images: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 6:
            raise raised("enough")
        return model(images)

    found = both(spoiling, x, maps, 1)
    torch.testing.assert_close(found, both(model, x, maps, 1), rtol=0, atol=1e-6)
    assert calls and not found.requires_grad
    both(spoiling, x, maps, None)
    calls = 0
    with pytest.raises(raised, match="enough"):
        both(failing, x, maps, 1, batch_size=1)
    assert torch.equal(x, given_x) and torch.equal(maps, given_maps)
    assert x.requires_grad and x.grad is None and model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_progress_is_counted(capsys):
    x, maps = drawn(2, 3, 8, 8), drawn(2, 8, 8)
    both(Net(), x, maps, 0)
    assert capsys.readouterr().err == ""
    both(Net(), x, maps, 0, show_progress=True)
    said = capsys.readouterr().err
    assert (
        "insertion and deletion: 28/28 masked images" in said and "perturbation: 56/56 masked images" in said
    )


def test_results_write_themselves(tmp_path):
    x, maps = drawn(2, 3, 8, 8), drawn(2, 8, 8)
    one = insertion_deletion(Net(), x, maps, steps=3, deletion_fill=torch.zeros(3, 1, 1))
    two = perturbation_curve(Net(), x, maps, region=4, steps=3)
    for result in (one, two, one.insertion, two.morf):
        result.write_json(tmp_path / "result.json")
        json.loads((tmp_path / "result.json").read_text())
        result.plot(tmp_path / "result.png")
        assert (tmp_path / "result.png").stat().st_size > 1000
    read = one.as_dict()["deletion"]
    assert read["values"] == one.deletion.values.tolist() and read["curves"] == one.deletion.curves.tolist()
    assert read["settings"]["fill"]["shape"] == [3, 1, 1] and len(read["settings"]["fill"]["sha256"]) == 64
    other = insertion_deletion(Net(), x, maps, steps=3, deletion_fill=torch.ones(3, 1, 1))
    assert other.deletion.settings["fill"] != one.deletion.settings["fill"]


X, MAPS = torch.ones(2, 3, 8, 8), torch.ones(2, 8, 8)
REFUSED = [
    *(
        (call, changed, error, words)
        for call in (insertion_deletion, perturbation_curve)
        for changed, error, words in (
            ({"model": None}, TypeError, "model must be callable, but it is None."),
            ({"images": X.int()}, TypeError, "images must be a float64, float32, bfloat16 or float16 tensor, but it "),
            ({"images": None}, TypeError, "but it is NoneType."),
            ({"images": X[0]}, ValueError, "images must have the shape (N, C, H, W), but it has the shape (3, 8, 8)."),
            ({"images": X[:, :0]}, ValueError, "but it has the shape (2, 0, 8, 8)."),
            ({"maps": MAPS[:1]}, ValueError, "maps must hold a map for each of 2 images, but it holds 1."),
            ({"maps": MAPS * float("nan")}, ValueError, "maps must be finite"),
            ({"score": "logit"}, ValueError, "score must be 'softmax' or 'output', but it is 'logit'."),
            ({"batch_size": 0}, ValueError, "batch_size must be an int of at least 1, but it is 0."),
            ({"memory_limit": 0.5}, ValueError, "memory_limit must be an int of at least 1, but it is 0.5."),
            ({"seed": -1}, ValueError, "seed must be an int of at least 0 and at most 2147483647, but it is -1."),
            ({"steps": 0}, ValueError, "steps must be an int of at least 1"),
            ({"preset": "rise"}, ValueError, "preset must be None or one of "),
        )
    ),
    (insertion_deletion, {"mode": "all"}, ValueError, "mode must be 'both', 'insertion' or 'deletion', but it is "),
    (insertion_deletion, {"steps": 65}, ValueError, "steps must be an int of at least 1 and at most 64, but it is 65."),
    (insertion_deletion, {"steps": 3, "pixels_per_step": 3}, ValueError, "steps and pixels_per_step both say"),
    (insertion_deletion, {"pixels_per_step": 0}, ValueError, "pixels_per_step must be an int of at least 1"),
    (insertion_deletion, {"deletion_fill": "black"}, ValueError, "but it is 'black'."),
    (insertion_deletion, {"insertion_fill": torch.ones(2, 1, 1)}, ValueError, "fill must broadcast to the images'"),
    *(
        (insertion_deletion, {"mode": "deletion", "deletion_fill": fill}, ValueError, "fill must be finite, but some ")
        for fill in (float("nan"), float("inf"), 1e300, [0.0, 0.0, -1e39], torch.tensor([float("nan")]))
    ),
    (insertion_deletion, {"deletion_fill": ["a", "b", "c"]}, TypeError, "but it is ['a', 'b', 'c']."),
    (perturbation_curve, {"order": "both ways"}, ValueError, "order must be 'both', 'morf' or 'lerf'"),
    (perturbation_curve, {"region": 0}, ValueError, "region must be at least 1, but it is 0."),
    (perturbation_curve, {"region": 4, "steps": 5}, ValueError, "steps must be at most the 4 regions of 4 x 4 pixels"),
    (perturbation_curve, {"steps": None}, ValueError, "but it is 100."),
    (perturbation_curve, {"repetitions": 0}, ValueError, "repetitions must be an int of at least 1 and at most 1000"),
    (perturbation_curve, {"fill": 0.0, "repetitions": 2}, ValueError, "repetitions must be 1 for a fill that is not"),
    (perturbation_curve, {"fill": 0.0, "noise_range": (0, 1)}, ValueError, "noise_range is of fill='uniform'"),
    (perturbation_curve, {"noise_range": (0, 1, 2)}, ValueError, "noise_range must be a low and a high end"),
    (perturbation_curve, {"noise_range": (1, 0)}, ValueError, "noise_range must go from a finite low end to a high"),
    (perturbation_curve, {"noise_range": (0, 1e300)}, ValueError, "from a finite low end"),
    (perturbation_curve, {"noise_range": ([0, 0], 1)}, ValueError, "each one number or 3 (one a channel)"),
    (perturbation_curve, {"preset": "samek2017", "region": 8}, ValueError, "has region=9, but region is 8."),
]  # fmt: skip


@pytest.mark.parametrize(("call", "wrong", "error", "words"), REFUSED, ids=range(len(REFUSED)))
def test_bad_arguments(call, wrong, error, words):
    def model(x: Tensor) -> Tensor:
        raise AssertionError("evaluated")

    usual = {"model": model, "images": X, "maps": MAPS, "target": 0}
    if call is perturbation_curve:
        usual |= {"region": 2, "steps": 2}
    if "preset" in wrong:
        usual = {k: v for k, v in usual.items() if k not in ("region", "steps")}
    with pytest.raises(error, match=re.escape(words)) as caught:
        call(**usual | wrong)
    assert str(caught.value).endswith(".")


class Noisy(nn.Module):
    """Batch norm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body = nn.Sequential(
                nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(), nn.AdaptiveAvgPool2d(1)
            )
            self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).flatten(1))


RUNS = {
    "insertion": lambda model, x, maps, **k: insertion_deletion(model, x, maps, steps=5, **k).insertion,
    "perturbation": lambda model, x, maps, **k: (
        perturbation_curve(model, x, maps, region=4, steps=3, repetitions=2, **k).abpc
    ),
    "road": lambda model, x, maps, **k: road(model, x, maps, fractions=[0.2, 0.6], **k).combined,
    "sensitivity_n": lambda model, x, maps, **k: sensitivity_n(model, x, maps, samples=4, sizes=3, **k),
    "confidence": lambda model, x, maps, **k: average_drop(model, x, maps, **k),
}


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_a_model_in_training_mode_stays_as_it_was(run, fails):
    model, x, maps = Noisy().train(), drawn(2, 3, 12, 12, dtype=torch.float32), drawn(2, 12, 12, seed=1)
    buffers, state = [b.clone() for b in model.buffers()], torch.get_rng_state()
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1
        if fails and calls == 4:
            raise KeyboardInterrupt

    hook = model.register_forward_hook(count)
    found = []
    for _ in range(2):
        with pytest.warns(UserWarning, match="BatchNorm2d.*Dropout") as warned:
            if fails:
                with pytest.raises(KeyboardInterrupt):
                    run(model, x, maps, batch_size=1)
                calls = 0
            else:
                found.append(run(model, x, maps, batch_size=3).values)
        assert len(warned) == 1
    hook.remove()
    assert fails or (torch.equal(*found) and found[0].isfinite().any())
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))
    assert torch.equal(torch.get_rng_state(), state) and all(part.training for part in model.modules())


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_a_model_that_draws_leaves_the_random_state(run):
    class Drawing(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + 0.1 * torch.rand_like(x))

    model, x, maps = Drawing().eval(), drawn(2, 3, 12, 12), drawn(2, 12, 12, seed=1)
    state = torch.get_rng_state()
    found = [run(model, x, maps, batch_size=1).values for _ in range(2)]
    assert torch.equal(*found) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_images_that_are_no_numbers(run, bad):
    x = drawn(2, 3, 12, 12)
    x[1, 2, 3, 4] = bad

    def model(_: Tensor) -> Tensor:
        raise AssertionError("evaluated")

    with pytest.raises(ValueError, match="images must be finite"):
        run(model, x, drawn(2, 12, 12))


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_every_number_says_of_which_class_it_is(run):
    model, x, maps = Net(), drawn(3, 3, 12, 12), drawn(3, 12, 12, seed=1)
    best = model(x).argmax(1).tolist()
    usual = run(model, x, maps)
    assert usual.settings["target"] == "predicted" and usual.settings["targets"] == best
    given = run(model, x, maps, target=torch.tensor([2, 0, 1]))
    assert given.settings["target"] == "given" and given.settings["targets"] == [2, 0, 1]
    one = run(model, x, maps, target=3)
    assert one.settings["targets"] == [3, 3, 3] == one.as_dict()["settings"]["targets"]


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same(run):
    model, x, maps = Net(), drawn(2, 3, 12, 12), drawn(2, 12, 12, seed=1)
    host = run(model, x, maps)
    found = run(Net().cuda(), x.cuda(), maps.cuda())
    assert found.values.device.type == "cpu" and found.settings == host.settings
    torch.testing.assert_close(found.values, host.values, rtol=0, atol=1e-6)
    from_host = run(Net().cuda(), x.cuda(), maps)
    torch.testing.assert_close(from_host.values, found.values, rtol=0, atol=1e-6)


def test_defined_values_are_counted():
    x, maps = drawn(3, 3, 8, 8), drawn(3, 8, 8, seed=1)
    maps[1] = 0
    found = sensitivity_n(Linear(drawn(3, 8, 8, seed=2)), x, maps, 0, sizes=3, samples=5)
    assert found.defined == 2 and found.mean == float(found.values[[0, 2]].mean())


@pytest.mark.parametrize("steps", [7, 24])
def test_equals_torch_cam(steps):
    """Its areas are over as many pixels a step, rounded up; the fills are ours to say."""
    reason = "torch-cam is not installed: its metric is not compared with"
    peer = pytest.importorskip("torchcam.metrics", reason=reason)
    net, x, maps = Net(), drawn(3, 3, 12, 14), drawn(3, 12, 14, seed=1).round(decimals=1)  # with ties

    class Extractor:
        model = net

        def __call__(self, *_: object, **__: object) -> list[Tensor]:
            return [maps]

        fuse_cams = staticmethod(lambda cams: cams[0])
        _hooks_off = staticmethod(contextlib.nullcontext)

    metric = peer.DeletionInsertionMetric(
        Extractor(), lambda scores: scores.softmax(1), steps=steps, baseline=None
    )
    metric.update(x)
    expected = metric.summary()
    found = insertion_deletion(net, x, maps, pixels_per_step=-(-168 // steps), insertion_fill=0.0)
    assert found.deletion.mean == pytest.approx(expected["deletion_auc"], rel=1e-6)
    assert found.insertion.mean == pytest.approx(expected["insertion_auc"], rel=1e-6)


def test_functions_without_a_score_for_each_image():
    with pytest.raises(ValueError, match="give target"):
        insertion_deletion(lambda x: x, X, MAPS)
    with pytest.raises(AssertionError, match="scores of each image"):
        insertion_deletion(lambda x: x.sum().reshape(1).expand(3), X, MAPS, 0)
    with pytest.raises(ValueError, match="several classes"):
        insertion_deletion(lambda x: x.sum((1, 2, 3))[:, None], X, MAPS)


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_a_target_out_of_range_is_found_at_once(run):
    forwards = []

    def model(x: Tensor) -> Tensor:
        forwards.append(len(x))
        return Net()(x)

    x, maps = drawn(4, 3, 8, 8), drawn(4, 8, 8)
    with pytest.raises(IndexError, match="Target 9 is out of range"):
        run(model, x, maps, target=[0, 1, 2, 9], batch_size=1)
    assert forwards == [1]


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("target", [None, 0])
def test_a_model_without_classes(run, target):
    with pytest.raises(ValueError, match=r"output .*\(1, 0\)"):
        run(lambda v: v.new_zeros(len(v), 0), X, MAPS, target=target, batch_size=1, score="output")


def test_noise_does_not_depend_on_the_default_dtype():
    x, expected = (
        drawn(2, 3, 8, 8),
        torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(3 * 1_000_003)),
    )
    usual = fill_values(x, "noise", 3)
    spread = x[0].std((1, 2), correction=0, keepdim=True)
    torch.testing.assert_close(usual[0], x[0].mean((1, 2), keepdim=True) + spread * expected[0])
    try:
        torch.set_default_dtype(torch.float64)
        assert torch.equal(fill_values(x, "noise", 3), usual)
    finally:
        torch.set_default_dtype(torch.float32)


def test_all_steps_of_a_chunk_are_one_launch(monkeypatch):
    """A call of the op for each forward, and one more where a chunk takes in the end of a curve and the next one."""
    launches, forwards = [], []
    op = _curves.replace_ranked_
    monkeypatch.setattr(_curves, "replace_ranked_", lambda out, *a: launches.append(len(out)) or op(out, *a))
    net = Net()

    def model(x: Tensor) -> Tensor:
        forwards.append(len(x))
        return net(x)

    x, maps = drawn(2, 3, 9, 8), drawn(2, 9, 8, seed=1)
    insertion_deletion(model, x, maps, 1, steps=20, batch_size=16)
    # Two curves of 2 x 21 images: the third chunk holds ten of one and six of the other.
    looked_at = len(forwards) - 6
    assert forwards[looked_at:] == [16, 16, 16, 16, 16, 4]
    assert len(launches) == len(forwards) + 1 and launches[looked_at:] == [16, 16, 10, 6, 16, 16, 4]
