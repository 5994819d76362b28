"""The adapter to Quantus: its call shape by a stand-in, and the library itself where it is installed."""

from __future__ import annotations

import contextlib
import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from attribution_cases import Plain, built, images, state
from torch import nn

from convviz_cuda import attr, metrics


@pytest.fixture(scope="module")
def quantus():
    return pytest.importorskip(
        "quantus", reason="Quantus is not installed: the adapter is not run against it"
    )


def grad_cam(model: nn.Module) -> attr.LayerGradCam:
    return attr.LayerGradCam(model, "features.1")


def test_explain_func_has_quantus_call_shape() -> None:
    model, x = built(Plain, dtype=torch.float32), images(5, dtype=torch.float32)
    classes = np.array([0, 4, 2, 1, 3])
    expected = attr.InputXGradient(model).attribute(x, classes.tolist()).numpy()
    for size in (None, 2):
        explain = metrics.explain_func(attr.InputXGradient, batch_size=size)
        found = explain(model=model, inputs=x.numpy(), targets=classes, device="cpu")
        assert isinstance(found, np.ndarray) and found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    cams = metrics.explain_func(grad_cam, relu_attributions=True)(model, x, torch.from_numpy(classes))
    assert cams.shape == (5, 1, 12, 12) and cams.min() == 0
    signed = metrics.explain_func(attr.Saliency)(model, x.numpy(), classes, abs=False, method="Saliency")
    assert signed.min() < 0  # what is asked for at the call reaches the method
    double = metrics.explain_func(attr.Saliency)(model.double(), x.numpy(), classes)
    assert double.dtype == np.float64
    low = metrics.explain_func(attr.Saliency)(model.bfloat16(), x.numpy(), classes)
    assert low.dtype == np.float32


def test_explain_func_leaves_nothing_behind() -> None:
    model, x = built(Plain), images()
    before, pixels = state(model), x.clone()
    metrics.explain_func(attr.GuidedBackprop)(model, x.numpy(), [1, 2, 0])
    assert state(model) == before and torch.equal(x, pixels)
    with pytest.raises(ValueError, match="each of 3 images"):
        metrics.explain_func(attr.Saliency)(model, x, [1])
    with pytest.raises(TypeError, match="method must"):
        metrics.explain_func("Saliency")
    with pytest.raises(AssertionError, match="Module"):
        metrics.explain_func(attr.Saliency)(lambda v: v, x, [1, 2, 0])


NO_CLASSES = ([0.7, 1.2, 2.9], [True, False, True], np.array([1.0, 2.0, 0.0]), "x", ["0", "1", "2"])


@pytest.mark.parametrize("wrong", NO_CLASSES, ids=repr)
def test_targets_that_are_no_ints(wrong) -> None:
    model, x = built(Plain), images()
    with pytest.raises(AssertionError, match="targets must be an int or ints, but it is"):
        metrics.explain_func(attr.Saliency)(model, x, wrong)
    with pytest.raises(AssertionError, match="target must be an int or ints, but it is"):
        metrics.quantus_metric(StandIn(), model, x, x, wrong)


def test_integers_of_any_kind_are_targets() -> None:
    model, x = built(Plain), images()
    explain = metrics.explain_func(attr.Saliency)
    expected = attr.Saliency(model).attribute(x, [4, 0, 2]).numpy()
    for classes in ([4, 0, 2], np.array([[4], [0], [2]], np.uint8), torch.tensor([4, 0, 2]).int()):
        np.testing.assert_allclose(explain(model, x, classes), expected)
    assert explain(model, x[:0], []).shape == explain(model, x[:0], None).shape == (0, *x.shape[1:])
    seen = StandIn()
    metrics.quantus_metric(seen, model, x, x, np.uint8(4))
    assert seen.given["y"].tolist() == [4, 4, 4] and seen.given["y"].dtype == np.int64


def test_a_method_may_write_on_the_images_and_return_them() -> None:
    def doubled(images, target=None):
        return images.mul_(2)

    for kind in (torch.from_numpy, np.asarray):
        pixels = np.random.default_rng(0).random((3, 3, 12, 12))
        before = pixels.copy()
        found = metrics.explain_func(lambda _: doubled)(built(Plain), kind(pixels), [0, 1, 2])
        np.testing.assert_array_equal(found, 2 * before)
        np.testing.assert_array_equal(pixels, before)


@pytest.mark.parametrize(
    "returned, error, words",
    [
        (lambda x: (x, x), TypeError, "it returned tuple"),
        (lambda x: x.long(), TypeError, "it returned torch.int64"),
        (lambda x: x.numpy(), TypeError, "it returned ndarray"),
        (lambda x: x[:1], ValueError, "of 3 images, but its result has the shape"),
        (lambda x: x.sum((1, 2, 3)), ValueError, "of 3 images, but its result has the shape"),
    ],
)
def test_what_a_method_returns_must_be_maps(returned, error, words: str) -> None:
    explain = metrics.explain_func(lambda model: lambda x, target: returned(x))
    with pytest.raises(error, match=words):
        explain(built(Plain), images(), [0, 1, 2])
    alone = metrics.explain_func(lambda model: lambda x, target: (x.sum(1),))
    assert alone(built(Plain), images(), [0, 1, 2]).shape == (3, 1, 12, 12)


class StandIn:
    """What the adapter knows of a metric of Quantus: its call."""

    def __init__(self, fails: bool = False, aggregate: bool = False) -> None:
        self.normalise, self.fails, self.return_aggregate = True, fails, aggregate
        self.evaluation_scores: list[float] = []
        self.given: dict = {}

    def __call__(self, model, x_batch, y_batch, a_batch, s_batch, channel_first, device, **kwargs):
        self.given = dict(x=x_batch, y=y_batch, a=a_batch, s=s_batch, first=channel_first, **kwargs)
        model.train()
        model(torch.from_numpy(x_batch)).sum().backward()
        self.given["gradient"] = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.0 + 1e-9)
        model.features[0].weight = nn.Parameter(model.features[0].weight.clone())
        model.register_forward_hook(lambda *_: None)
        drawn = torch.rand(())
        torch.manual_seed(1)
        a = (
            kwargs["explain_func"](model=model, inputs=x_batch, targets=y_batch)
            if a_batch is None
            else a_batch
        )
        a /= np.abs(a).max()
        if self.fails:
            raise RuntimeError("broken")
        scores = (a.reshape(len(a), -1).sum(1) + np.random.rand(len(a)) + float(drawn)).tolist()
        return [np.mean(scores)] if self.return_aggregate else scores


def test_a_metric_takes_our_maps() -> None:
    model, x = built(Plain), images()
    maps = attr.Saliency(model).attribute(x, 1)
    model(x).square().sum().backward()  # gradients that are there already
    gradients = {name: (p.grad, p.grad.clone()) for name, p in model.named_parameters()}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    kept, before = maps.clone(), state(model)
    np.random.seed(3)
    random, torchs = np.random.get_state()[1].copy(), torch.random.get_rng_state()

    def untouched() -> bool:
        same = [p.grad is gradients[n][0] and torch.equal(*gradients[n]) for n, p in model.named_parameters()]
        same += [torch.equal(value, weights[name]) for name, value in model.state_dict().items()]
        same += [torch.equal(torch.random.get_rng_state(), torchs), torch.equal(maps, kept)]
        return all(same) and state(model) == before and bool((np.random.get_state()[1] == random).all())

    metric = StandIn()
    found = metrics.quantus_metric(metric, model, x, maps.sum(1), 1, masks=maps.sum(1) > 0, softmax=True)
    assert metric.given["x"].shape == (3, 3, 12, 12) and metric.given["y"].tolist() == [1, 1, 1]
    assert metric.given["a"].shape == metric.given["s"].shape == (3, 1, 12, 12)
    assert metric.given["first"] is True and metric.given["softmax"] is True
    assert found.name == "StandIn" and found.values.shape == (3,) and found.values.dtype == torch.float64
    again = metrics.quantus_metric(StandIn(), model, x, maps.sum(1), [1, 1, 1], masks=maps.sum(1) > 0)
    assert torch.equal(found.values, again.values)
    other = metrics.quantus_metric(StandIn(), model, x, maps.sum(1), 1, seed=1)
    assert not torch.equal(found.values, other.values)
    assert untouched()
    alone = copy.deepcopy(model)
    alone.zero_grad()
    alone(x).sum().backward()
    for own, other in zip(metric.given["gradient"], alone.parameters(), strict=True):
        torch.testing.assert_close(own, other.grad)  # of its own call, not added to those that were there
    assert found.settings["metric"]["normalise"] is True and found.settings["targets"] == [1, 1, 1]
    json.dumps(found.as_dict(), allow_nan=False)
    itself = metrics.quantus_metric(StandIn(), model, x, None, 1, method=attr.Saliency)
    reduced = metrics.quantus_metric(StandIn(), model, x, maps, 1)
    torch.testing.assert_close(itself.values, reduced.values)
    with pytest.raises(RuntimeError, match="broken"):
        metrics.quantus_metric(StandIn(fails=True), model, x, maps, 1)
    assert untouched()
    for wrong in (-1, 1.5, 2**32):
        with pytest.raises(ValueError, match="seed must"):
            metrics.quantus_metric(StandIn(), model, x, maps, 1, seed=wrong)
    with pytest.raises(ValueError, match="each of 3 images"):
        metrics.quantus_metric(StandIn(aggregate=True), model, x, maps, 1)
    with pytest.raises(ValueError, match="each of 3 images"):
        metrics.quantus_metric(StandIn(), model, x, maps, [1, 2])


@pytest.mark.parametrize(
    "given, error, words",
    [
        ({"maps": "x"}, TypeError, "maps must be a tensor"),
        ({"maps": np.zeros((3, 12, 12))}, TypeError, "maps must be a tensor"),
        ({"maps": torch.zeros(2, 12, 12)}, ValueError, r"maps must have .* shape \(2, 12, 12\)"),
        ({"maps": torch.zeros(12, 12)}, ValueError, "maps must have the shape"),
        ({"maps": None}, ValueError, "maps=None needs method"),
        ({"masks": "x"}, TypeError, "masks must be a tensor"),
        ({"masks": torch.zeros(1, 12, 12)}, ValueError, "masks must have the shape"),
        ({"target": None}, AssertionError, "target must be an int"),
        ({"target": 1.5}, AssertionError, "target must be an int"),
        ({"target": True}, AssertionError, "target must be an int"),
        ({"seed": None}, ValueError, "seed must"),
        ({"seed": True}, ValueError, "seed must"),
        ({"method": "Saliency"}, TypeError, "method must"),
    ],
)
def test_arguments_that_make_no_sense(given: dict, error: type[Exception], words: str) -> None:
    x, metric = images(), StandIn()
    with pytest.raises(error, match=words) as raised:
        metrics.quantus_metric(metric, built(Plain), x, **{"maps": x, "target": 1, **given})
    assert len(str(raised.value)) < 300 and not metric.given


def test_a_metric_is_an_object_and_may_bring_its_explain_func() -> None:
    x = images()
    for wrong in (StandIn, None):
        with pytest.raises(TypeError, match="metric must be an object that can be called"):
            metrics.quantus_metric(wrong, built(Plain), x, x, 1)
    own = metrics.explain_func(attr.Saliency)  # in place of a method
    found = metrics.quantus_metric(StandIn(), built(Plain), x, None, 1, explain_func=own)
    assert found.values.isfinite().all()


def test_quantus_is_not_imported() -> None:
    code = "import sys, convviz_cuda.metrics; assert 'quantus' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# ------------------------------------------------------------------------------------------ the library itself


@pytest.mark.torchvision
def test_its_metrics_on_our_maps(quantus) -> None:
    model, x = built(Plain, dtype=torch.float32), images(dtype=torch.float32)
    maps = attr.Saliency(model).attribute(x, 1).sum(1)
    options = {"disable_warnings": True, "display_progressbar": False}
    masks = torch.zeros(3, 12, 12, dtype=torch.bool)
    masks[:, 2:9, 2:9] = True
    found = metrics.quantus_metric(
        quantus.RelevanceMassAccuracy(abs=True, normalise=True, **options), model, x, maps, 1, masks=masks
    )
    ours = metrics.energy_pointing_game(maps, masks)
    torch.testing.assert_close(found.values, ours.values, rtol=1e-4, atol=0)
    pointing = metrics.quantus_metric(quantus.PointingGame(**options), model, x, maps, 1, masks=masks)
    assert torch.equal(pointing.values, metrics.pointing_game(maps, masks, tolerance=0).values)
    correlation = quantus.FaithfulnessCorrelation(
        nr_runs=5, subset_size=20, return_aggregate=False, **options
    )
    found = metrics.quantus_metric(correlation, model, x, maps, [0, 1, 2], seed=4)
    again = metrics.quantus_metric(correlation, model, x, maps, [0, 1, 2], seed=4)
    assert found.values.isfinite().all() and torch.equal(found.values, again.values)


@pytest.mark.torchvision
@pytest.mark.parametrize("name", ["MPRT", "EfficientMPRT", "RandomLogit", "Completeness"])
def test_its_metrics_leave_the_model_alone(quantus, name: str) -> None:
    """Those that seed PyTorch's generator and give layers other weights."""
    model, x = built(Plain, dtype=torch.float32), images(dtype=torch.float32)
    model(x).sum().backward()
    gradients = [(p.grad, p.grad.clone()) for p in model.parameters()]
    before, random = state(model), torch.random.get_rng_state()
    options = {"disable_warnings": True, "display_progressbar": False}
    if name == "RandomLogit":
        options["num_classes"] = 5
    with contextlib.suppress(ValueError):  # of some there is no number for each image
        metrics.quantus_metric(getattr(quantus, name)(**options), model, x, None, 1, method=attr.Saliency)
    assert state(model) == before and torch.equal(torch.random.get_rng_state(), random)
    assert all(
        p.grad is g and torch.equal(g, c) for p, (g, c) in zip(model.parameters(), gradients, strict=True)
    )


@pytest.mark.torchvision
def test_its_metrics_call_our_methods(quantus) -> None:
    model, x = built(Plain, dtype=torch.float32), images(dtype=torch.float32)
    metric = quantus.MaxSensitivity(
        nr_samples=4, lower_bound=0.02, disable_warnings=True, display_progressbar=False
    )
    found = metrics.quantus_metric(metric, model, x, None, 1, method=attr.InputXGradient)
    assert found.values.shape == (3,) and (found.values > 0).all()
    before = metrics.explain_func(attr.InputXGradient)(model, x, [1] * 3)
    given = metrics.quantus_metric(metric, model, x, torch.from_numpy(before), 1, method=attr.InputXGradient)
    torch.testing.assert_close(given.values, found.values)
