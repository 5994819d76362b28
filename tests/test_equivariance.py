"""Equivariance against hand-made methods that are exactly equivariant, or not at all."""

from __future__ import annotations

import json
import math

import pytest
import torch
from attribution_cases import Plain, built, images, state
from robustness_cases import F64, blurred, untouched
from scipy import stats
from torch import Tensor, nn

from convviz_cuda import attr, metrics


def anchored(x: Tensor, **_: object) -> Tensor:
    """One that always points to the same place."""
    line = torch.linspace(-1, 1, x.shape[2], dtype=x.dtype)
    return (-(line[:, None] ** 2) - (line - 0.4) ** 2).expand(len(x), -1, -1)


def smooth_images() -> Tensor:
    coarse = torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=F64)
    return nn.functional.interpolate(coarse, (32, 32), mode="bicubic")


def test_equivariant_and_anchored_methods() -> None:
    x = smooth_images()
    for transform, values in {"translation": [4, (2, -3), (0, 3.5)], "rotation": [90, 10.0]}.items():
        good = metrics.equivariance(blurred, x, transform, values)
        bad = metrics.equivariance(anchored, x, transform, values)
        assert good.values["spearman"].shape == (len(values), 3)
        for name in ("spearman", "ssim", "topk_iou"):
            assert good.values[name].min() > 0.7
            assert (good.values[name] > bad.values[name]).all()
    # What the method gives is moved, so the identity is exact wherever whole pixels move, on the valid ones.
    exact = metrics.equivariance(lambda v: v, x, "translation", [5, (-7, 2)], fill=100.0)
    for name in exact.values:
        assert exact.values[name].flatten().tolist() == pytest.approx([1.0] * 6)


def test_only_valid_pixels_count() -> None:
    """Rows that a translation brings in are set to a large number: nobody sees them."""
    x = smooth_images()

    def spoilt(v: Tensor, **_: object) -> Tensor:
        result = v.sum(1)
        result[(v == 1e3).all(1)] = -1e6
        return result

    found = metrics.equivariance(spoilt, x, "translation", [3, (0, -6)], fill=1e3)
    for values in found.values.values():
        assert values.flatten().tolist() == pytest.approx([1.0] * 6)
    away = metrics.equivariance(spoilt, x, "translation", [40])
    assert all(values.isnan().all() for values in away.values.values())


def test_rotation_by_a_right_angle_is_exact() -> None:
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=F64)
    line = torch.linspace(0, 1, 16, dtype=F64)

    def method(v: Tensor, **_: object) -> Tensor:
        return v.sum(1) + 3 * line[:, None]  # knows up from down

    found = metrics.equivariance(method, x, "rotation", [90.0]).values["spearman"][0]
    for n in range(2):
        turned = torch.rot90(method(x)[n])
        expected = stats.spearmanr(
            turned.flatten(), method(torch.rot90(x, dims=(2, 3)))[n].flatten()
        ).statistic
        assert found[n].item() == pytest.approx(expected, abs=1e-6)


def test_noise() -> None:
    x = smooth_images()
    values = [0.0, 0.05, 1.0]
    random = torch.random.get_rng_state()
    found = metrics.equivariance(blurred, x, "noise", values, seed=3)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert found.values["spearman"][0].tolist() == pytest.approx([1.0] * 3)
    means = found.means("spearman")
    assert means[0] > means[1] > means[2]
    for size in (1, 2):
        again = metrics.equivariance(blurred, x, "noise", values, seed=3, batch_size=size)
        for name in found.values:
            torch.testing.assert_close(again.values[name], found.values[name], equal_nan=True)
    assert not torch.equal(
        metrics.equivariance(blurred, x, "noise", [1.0]).values["ssim"], found.values["ssim"][2:]
    )
    seen = []
    metrics.equivariance(lambda v: seen.append(v) or v, torch.zeros(4, 1, 64, 64), "noise", [2.0])
    drawn = seen[1]
    assert abs(drawn.std().item() - 2) < 0.03 and abs(drawn.mean().item()) < 0.05
    assert len({one.sum().item() for one in drawn}) == 4


def test_methods_of_the_library_and_targets() -> None:
    model, x = built(Plain, dtype=torch.float64), images(3, 16)
    cam = attr.LayerGradCam(model, model.features[1])
    before = state(model)
    seen = []

    class Kept:
        def attribute(self, inputs: Tensor, target: list[int]) -> Tensor:
            seen.append(target)
            return cam.attribute(inputs, target)

    with torch.no_grad():
        found = metrics.equivariance(
            Kept(), x, "translation", [2], target=[0, 1, 2], batch_size=2, absolute=True
        )
    assert seen == [[0, 1], [0, 1], [2], [2]] and state(model) == before
    assert found.values["spearman"].shape == (1, 3) and found.settings["absolute"] is True
    one = found.metric("ssim", 0)
    assert one.name == "equivariance" and one.settings["steps"] == [(2.0, 0.0)]
    json.dumps(found.as_dict(), allow_nan=False)
    assert found.metric("ssim").values.shape == (3,)


def test_a_method_may_change_its_images() -> None:
    x = smooth_images()
    pixels = x.clone()
    found = metrics.equivariance(lambda v: v.mul_(2).sum(1), x, "translation", [3])
    assert torch.equal(x, pixels)
    expected = metrics.equivariance(lambda v: v.sum(1), x, "translation", [3])
    torch.testing.assert_close(found.values, expected.values)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "transform must", {"transform": "shear"}),
        (ValueError, "values must", {"values": []}),
        (ValueError, "values must", {"values": [math.nan]}),
        *(
            (TypeError, "values must be a list of numbers", {"values": wrong})
            for wrong in (None, 3, "x", torch.tensor(3.0), iter([1.0]), {1.0: 2})
        ),
        (TypeError, "each of values must be a number, but it is 'a'", {"values": ["a"]}),
        *((TypeError, "absolute must be True or False", {"absolute": wrong}) for wrong in ("x", 2, None)),
        *((ValueError, "similarity must", {"similarity": wrong}) for wrong in (None, 5, [[]], ())),
        *((TypeError, "top must be a number", {"top": wrong}) for wrong in ("x", True, None)),
        *(
            (ValueError, "images must be finite", {"images": images(3, 16) * bad})
            for bad in (math.nan, math.inf)
        ),
        (ValueError, "at least 0", {"transform": "noise", "values": [-1.0]}),
        (ValueError, "similarity must", {"similarity": "mse"}),
        (ValueError, "top must", {"top": 0}),
        (ValueError, "seed must", {"seed": -1}),
        (ValueError, "fill must", {"fill": "wrap"}),
        (ValueError, "batch_size", {"batch_size": 0}),
        (ValueError, "at least 11", {"images": torch.zeros(1, 3, 8, 8)}),
        (TypeError, "method", {"method": 3}),
        (AssertionError, "Target list length", {"target": [1, 2]}),
    ],
)
def test_equivariance_checks_first(error, message, options) -> None:
    given = {"method": untouched, "images": images(3, 16), "transform": "rotation", "values": [10], **options}
    with pytest.raises(error, match=message):
        metrics.equivariance(**given)
