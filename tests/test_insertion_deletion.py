"""Insertion and deletion: closed forms of linear models, and the masked images themselves."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from curves_cases import MAPS, Linear, Net, Seen, X, drawn
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from convviz_cuda.fills import fill_values
from convviz_cuda.metrics import (
    _curves,
    insertion_deletion,
)


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
