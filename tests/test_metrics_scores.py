"""Average drop, increase in confidence and win rate against the paper's formulas, done by hand."""

from __future__ import annotations

import contextlib
import json
import math
import sys

import pytest
import torch
from attribution_cases import Plain, Reused, built, images, state
from torch import Tensor, nn

from convviz_cuda import metrics
from convviz_cuda.metrics import average_drop
from convviz_cuda.metrics._result import RESIZES

confidence_module = sys.modules[average_drop.__module__]


class Mean(nn.Module):
    """Scores of two classes whose probabilities are m and 1 - m, of the image's mean m in (0, 1)."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((1, 2, 3))
        return torch.stack([mean, 1 - mean], 1).log()


def halves() -> tuple[Tensor, Tensor]:
    """An image of 0.8 and one of 0.4; maps that show a half, and all but a quarter."""
    x = torch.tensor([0.8, 0.4], dtype=torch.float64).view(2, 1, 1, 1).expand(2, 3, 4, 4).contiguous()
    maps = torch.zeros(2, 4, 4, dtype=torch.float64)
    maps[0, :2] = 1
    maps[1, :3] = 5.0
    return x, maps


def test_average_drop_is_divided_by_the_score() -> None:
    x, maps = halves()
    found = metrics.average_drop(Mean(), x, maps, 0)
    # 0.8 -> 0.4 and 0.4 -> 0.3: a half and a quarter, not 0.4 and 0.1.
    assert found.values.tolist() == pytest.approx([50.0, 25.0])
    assert found.values.dtype == torch.float64 and found.mean == pytest.approx(37.5)
    # Of the other class 0.2 -> 0.6 and 0.6 -> 0.7: rises are no drops.
    assert metrics.average_drop(Mean(), x, maps, 1).values.tolist() == [0.0, 0.0]
    assert metrics.increase_in_confidence(Mean(), x, maps, 1).values.tolist() == [100.0, 100.0]
    assert metrics.increase_in_confidence(Mean(), x, maps, [0, 1]).values.tolist() == [0.0, 100.0]
    # Whole images are their predicted classes': 0 for 0.8, 1 for 0.4.
    assert metrics.average_drop(Mean(), x, maps).values.tolist() == pytest.approx([50.0, 0.0])
    assert metrics.increase_in_confidence(Mean(), x, maps).values.tolist() == [0.0, 100.0]


def test_the_same_score_is_no_increase() -> None:
    x, _ = halves()
    whole = torch.ones(2, 4, 4, dtype=torch.float64)
    found = metrics.confidence(Mean(), x, {"all": whole}, 0, normalise=None)
    assert torch.equal(found.full, found.masked["all"])
    assert found.increase("all").values.tolist() == [0.0, 0.0]
    assert found.average_drop("all").values.tolist() == [0.0, 0.0]


def test_win_rate_and_its_ties() -> None:
    x, maps = halves()
    other = maps.clone()
    other[0, 2] = 1  # shows more of the first image; the second is the same
    assert metrics.win_rate(Mean(), x, other, maps, 0).values.tolist() == [100.0, 0.0]
    assert metrics.win_rate(Mean(), x, maps, other, 0).values.tolist() == [0.0, 0.0]
    # Two rises: 0.2 -> 0.6 beats 0.2 -> 0.4, though both drops are 0.
    assert metrics.win_rate(Mean(), x, maps, other, 1).values.tolist() == [100.0, 0.0]


def test_normalisation() -> None:
    maps = torch.tensor([[[-1.0, 0.0], [1.0, 3.0]], [[2.0, 2.0], [2.0, 2.0]], [[-4.0, -2.0], [-3.0, -4.0]]])
    x = torch.full((3, 1, 2, 2), 0.5, dtype=torch.float64)

    def shown(how: str | None) -> list[float]:
        found = metrics.confidence(
            Mean(), x, {"m": maps.clamp(0, 1) if how is None else maps}, 0, normalise=how
        )
        return (found.masked["m"] / 0.5).tolist()  # the map's mean

    assert shown("minmax") == pytest.approx([(0.25 + 0.5 + 1) / 4, 0.0, (1 + 0.5) / 4])
    assert shown("max") == pytest.approx([(1 / 3 + 1) / 4, 1.0, 0.0])
    assert shown(None) == pytest.approx([0.5, 1.0, 0.0])


@pytest.mark.parametrize("options", [{}, {"preset": "gradcampp2018"}])
def test_what_is_irrelevant_in_a_signed_map_is_hidden(options) -> None:
    x = torch.full((1, 3, 4, 4), 0.8, dtype=torch.float64)
    maps = torch.zeros(1, 4, 4, dtype=torch.float64)
    maps[0, 0, 0], maps[0, 3, 3] = 5.0, -5.0  # the other pixels have no relevance at all
    shown = []

    def model(v: Tensor) -> Tensor:
        shown.append(v.clone())
        return Mean()(v.clamp(min=1e-9))

    metrics.average_drop(model, x, maps, 0, **options)
    expected = torch.zeros(1, 3, 4, 4, dtype=torch.float64)
    expected[0, :, 0, 0] = 0.8
    assert torch.equal(shown[-1], expected)


def test_outputs_instead_of_probabilities() -> None:
    model, x = built(Plain), images()
    maps = torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    with torch.no_grad():
        full = model(x)[:, 2]
        masked = model(x * ((maps - low) / (high - low))[:, None])[:, 2]
    found = metrics.average_drop(model, x, maps, 2, score="output", normalise="minmax")
    expected = [
        100 * max(0.0, y - o) / y if y > 0 else math.nan
        for y, o in zip(full.tolist(), masked.tolist(), strict=True)
    ]
    assert found.values.tolist() == pytest.approx(expected, nan_ok=True)
    assert found.settings["score"] == "output"
    # Logits of any sign: where the whole image's is not above 0, the quotient says nothing.
    shifted = metrics.average_drop(lambda v: model(v) - 100, x, maps, 2, score="output")
    assert shifted.values.isnan().all() and math.isnan(shifted.mean)


def test_several_methods_in_one_pass_and_any_batch_size() -> None:
    model, x = built(Reused), images(7)
    about = torch.randn(7, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    maps = {
        name: torch.rand(7, 1, 12, 12, generator=torch.Generator().manual_seed(seed))
        for seed, name in enumerate("ab")
    }
    target = [0, 1, 2, 3, 4, 0, 1]
    calls = []

    def counted(v: Tensor, *args: Tensor) -> Tensor:
        calls.append(len(v))
        return model(v, *args)

    whole = metrics.confidence(counted, x, maps, target, about, batch_size=7)
    assert calls == [7, 7, 7]  # images, then each method
    for size in (1, 3, None):
        found = metrics.confidence(model, x, maps, target, about, batch_size=size)
        torch.testing.assert_close(found.full, whole.full)
        for name in maps:
            torch.testing.assert_close(found.masked[name], whole.masked[name])
    with torch.no_grad():
        expected = model(x, about).softmax(1)[range(7), target]
    torch.testing.assert_close(whole.full, expected)
    alone = metrics.average_drop(model, x, maps["b"], target, about)
    torch.testing.assert_close(alone.values, whole.average_drop("b").values)


@pytest.mark.parametrize("limit", [1, 4, 100])
def test_images_at_once_are_as_many_as_fit(limit, monkeypatch) -> None:
    """A function that bears few images at once, as on a GPU whose memory is full."""
    model, x = built(Plain), images(11)
    maps = torch.rand(11, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = metrics.average_drop(model, x, maps, batch_size=1).values
    calls: list[int] = []

    def tight(v: Tensor) -> Tensor:
        calls.append(len(v))
        if len(v) > limit:
            raise torch.OutOfMemoryError("no memory")
        return model(v)

    torch.testing.assert_close(metrics.average_drop(tight, x, maps).values, expected)
    assert sum(n for n in calls if n <= limit) >= 22 and max(calls) == 8 and min(limit, 8) in calls
    with pytest.raises(torch.OutOfMemoryError) if limit < 11 else contextlib.nullcontext():
        metrics.average_drop(tight, x, maps, batch_size=11)
    calls.clear()
    monkeypatch.setitem(confidence_module.INPUT_BYTES, "cpu", 3 * x[:1].nbytes)
    metrics.average_drop(tight, x, maps)
    assert max(calls) == 3  # never more than this many bytes of images


def test_maps_of_another_size() -> None:
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    small = torch.tensor([[[0.0, 1.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)
    with pytest.raises(ValueError, match="upsample"):
        metrics.average_drop(Mean(), x, small, 0)
    found = metrics.average_drop(Mean(), x, small, 0, resize="nearest")
    large = small.repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert found.values.tolist() == pytest.approx(metrics.average_drop(Mean(), x, large, 0).values.tolist())
    assert found.settings["resize"] == "nearest"


def test_what_is_recorded() -> None:
    x, maps = halves()
    found = metrics.average_drop(Mean(), x, maps, preset="gradcampp2018")
    expected = {"score": "softmax", "normalise": "max", "fill": 0.0, "target": "predicted"}
    assert expected.items() <= found.settings.items() and found.settings["preset"] == "gradcampp2018"
    assert found.name == "average_drop"
    written = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert written["values"] == pytest.approx([50.0, 0.0])
    assert (
        found.settings["targets"] == [0, 1] and found.settings["method"] == "maps"
    )  # 0.8 and 0.4, see halves
    given = metrics.average_drop(Mean(), x, maps, torch.tensor([1, 0])).as_dict()["settings"]
    assert given["target"] == "given" and given["targets"] == [1, 0]
    both = metrics.confidence(Mean(), x, {"this": maps, "that": maps}, 1)
    assert both.targets == [1, 1]
    won = both.win_rate("that", "this").settings
    assert (won["method"], won["against"], won["targets"]) == ("that", "this", [1, 1])
    assert both.increase("that").settings["method"] == both.average_drop("that").settings["method"] == "that"


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (
            ValueError,
            "preset 'gradcampp2018' has normalise",
            {"preset": "gradcampp2018", "normalise": "minmax"},
        ),
        (ValueError, "preset 'gradcampp2018' has score", {"preset": "gradcampp2018", "score": "output"}),
        (ValueError, "preset must be", {"preset": "rise2018"}),
        (ValueError, "preset must be", {"preset": []}),
        (TypeError, "maps must be a dense tensor", {"maps": torch.ones(2, 4, 4).to_sparse()}),
        (TypeError, "but it is torch.float8_e5m2", {"maps": torch.ones(2, 4, 4).to(torch.float8_e5m2)}),
        (TypeError, "images must be a dense tensor", {"images": torch.ones(2, 1, 4, 4).to_sparse()}),
        *(
            (ValueError, "at least one pixel", {"maps": torch.ones(2, 0, 4), "resize": how})
            for how in RESIZES[1:]
        ),
        (ValueError, "score must be", {"score": "logits"}),
        (ValueError, "normalise must be", {"normalise": "l2"}),
        (ValueError, "batch_size must be", {"batch_size": 0}),
        (ValueError, "resize must be", {"resize": "cubic"}),
        (AssertionError, "Target list length", {"target": [0, 1, 0]}),
    ],
)
def test_settings_that_make_no_sense(error, message, options) -> None:
    x, maps = halves()

    def untouched(_: Tensor) -> Tensor:
        raise RuntimeError("nothing may be computed before the arguments are checked")

    with pytest.raises(error, match=message):
        metrics.average_drop(untouched, **{"images": x, "maps": maps, **options})


def test_arguments_that_do_not_fit() -> None:
    x, maps = halves()
    with pytest.raises(ValueError, match="each of 2 images"):
        metrics.average_drop(Mean(), x, maps[:1])
    with pytest.raises(ValueError, match="finite"):
        metrics.average_drop(Mean(), x, maps / 0)
    with pytest.raises(TypeError, match="dict"):
        metrics.confidence(Mean(), x, maps)
    with pytest.raises(ValueError, match="maps of at least one method, but it is empty"):
        metrics.confidence(Mean(), x, {})
    with pytest.raises(IndexError):
        metrics.average_drop(Mean(), x, maps, 2)
    with pytest.raises(ValueError, match="softmax"):
        metrics.average_drop(lambda v: v.mean((1, 2, 3)), x, maps)
    assert metrics.average_drop(Mean(), x[:0], maps[:0]).values.shape == (0,)
    one_score = metrics.average_drop(lambda v: v.mean((1, 2, 3)), x, maps, score="output")
    assert one_score.values.tolist() == pytest.approx([50.0, 25.0])


@pytest.mark.parametrize("normalise", ["max", "minmax"])
@pytest.mark.parametrize("scale", [3.4e38, 1e-38])
def test_the_scale_of_maps_does_not_matter(normalise: str, scale: float) -> None:
    maps = torch.randn(3, 12, 12, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    model, x = built(Plain), images(3)
    expected = metrics.confidence(model, x, {"m": maps}, 1, normalise=normalise).masked["m"]
    found = metrics.confidence(model, x, {"m": maps * scale}, 1, normalise=normalise).masked["m"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(fails: bool) -> None:
    model, x = built(Plain), images()
    maps = torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(0), requires_grad=True)
    before, pixels, weights = state(model), x.clone(), maps.detach().clone()
    random = torch.random.get_rng_state()

    def changing(v: Tensor) -> Tensor:
        result = model(v)
        v.zero_()  # its own copy
        if fails and len(v) == 1:
            raise RuntimeError("broken")
        return result

    if fails:
        with pytest.raises(RuntimeError, match="broken"):
            metrics.average_drop(changing, x, maps, batch_size=1)
    else:
        torch.testing.assert_close(
            metrics.average_drop(changing, x, maps).values, metrics.average_drop(model, x, maps).values
        )
    assert state(model) == before and torch.equal(x, pixels) and torch.equal(maps, weights)
    assert torch.equal(torch.random.get_rng_state(), random) and maps.grad is None and torch.is_grad_enabled()


def test_low_precision_and_layouts() -> None:
    model, x = built(Plain, dtype=torch.float32), images(dtype=torch.float32)
    maps = torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(0))
    plain = metrics.average_drop(model, x, maps, 1).values
    turned = metrics.average_drop(model, x.contiguous(memory_format=torch.channels_last), maps, 1).values
    torch.testing.assert_close(turned, plain, rtol=1e-4, atol=1e-3)
    low = metrics.average_drop(model.bfloat16(), x.bfloat16(), maps.bfloat16(), 1).values
    torch.testing.assert_close(low, plain, rtol=0.05, atol=1.0)


def test_equals_torch_cam() -> None:
    """Its definition is the same, but for an epsilon of 1e-7 below the fraction."""
    reason = "torch-cam is not installed: its metric is not compared with"
    peer = pytest.importorskip("torchcam.metrics", reason=reason)
    net, x = built(Plain), images(6)
    maps = torch.rand(6, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)

    class Extractor:
        model = net

        def __call__(self, *_: object, **__: object) -> list[Tensor]:
            return [(maps - low) / (high - low)]

        fuse_cams = staticmethod(lambda cams: cams[0])
        _hooks_off = staticmethod(contextlib.nullcontext)

    metric = peer.ClassificationMetric(Extractor(), lambda scores: scores.softmax(1))
    metric.update(x)
    expected = metric.summary()
    drop = metrics.average_drop(net, x, maps, normalise="minmax")
    assert drop.mean == pytest.approx(100 * expected["avg_drop"], rel=1e-5)
    rise = metrics.increase_in_confidence(net, x, maps, normalise="minmax")
    assert rise.mean == pytest.approx(100 * expected["conf_increase"])
