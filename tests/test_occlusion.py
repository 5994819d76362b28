"""Occlusion: equality with Captum for any function, what it does where Captum does not, and what it leaves behind."""

from __future__ import annotations

import copy
import math
import signal
import threading
import warnings
from collections.abc import Callable
from typing import Any

import captum.attr
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from convviz_cuda.attr import Occlusion, occlusion
from convviz_cuda.attr._masked import PeakBytes
from convviz_cuda.attr._windows import WindowGrid


def by_captum(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return captum.attr.Occlusion(function).attribute(*args, **kwargs)


def assert_close(found: Any, expected: Any, tolerance: float = 2e-6) -> None:
    """Shapes, dtypes and values, within ``tolerance`` of the largest value expected."""
    if isinstance(expected, tuple):
        assert isinstance(found, tuple) and len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other, tolerance)
        return
    assert found.shape == expected.shape and found.dtype == expected.dtype == torch.float32
    scale = expected.abs().max().item()
    assert (found - expected).abs().max().item() <= tolerance * max(scale, 1e-3)


def scores(x: Tensor, outputs: int = 5) -> Tensor:
    """(N, outputs) scores of inputs of any shape, not linear, so that windows do not simply add up."""
    flat = x.flatten(1)
    flat = flat if flat.is_floating_point() else flat.float()
    weight = torch.randn(
        flat.shape[1], outputs, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    return torch.tanh(flat @ weight.to(flat.dtype) / math.sqrt(flat.shape[1]))


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def images() -> Tensor:
    return normal(2, 3, 6, 7)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5),
    ).eval()  # fmt: skip


# --------------------------------------------------------------------------------------- equal to Captum

CASES = {
    # name: shape of the input, window, further arguments
    "1-D": ((2, 9), (2,), {}),
    "1-D, strides": ((2, 9), (5,), {"strides": 4}),
    "1-D, stride in a tuple": ((2, 9), (5,), {"strides": (4,)}),
    "2-D": ((2, 5, 6), (2, 3), {"strides": (1, 2)}),
    "images": ((2, 3, 6, 7), (3, 2, 2), {}),
    "clipped at both borders": ((2, 3, 6, 7), (3, 4, 4), {"strides": (1, 4, 3)}),
    "a clipped column of one": ((1, 1, 5, 9), (1, 4, 4), {"strides": (1, 4, 4)}),
    "channels one by one": ((2, 3, 6, 7), (1, 3, 3), {"strides": (1, 2, 3)}),
    "two of three channels": ((2, 3, 6, 7), (2, 3, 3), {"strides": 2}),
    "a window over everything": ((2, 3, 6, 7), (3, 6, 7), {"strides": 30}),
    "a window over all rows": ((2, 3, 6, 7), (3, 6, 2), {"strides": (3, 100, 2)}),
    "3-D": ((1, 2, 4, 5, 3), (2, 2, 2, 2), {"strides": (2, 2, 1, 1)}),
    "nested tuples": ((2, 3, 6, 7), ((3, 2, 2),), {"strides": ((3, 1, 2),)}),
    "one image": ((1, 3, 6, 7), (3, 2, 2), {"strides": 2}),
}


@pytest.mark.parametrize("at_once", [1, 4])
@pytest.mark.parametrize("case", CASES)
def test_windows_equal_captum(case, at_once):
    shape, window, more = CASES[case]
    x = normal(*shape)
    assert_close(
        Occlusion(scores).attribute(x, window, target=1, perturbations_per_eval=at_once, **more),
        by_captum(scores, x, window, target=1, **more),
    )


TARGETS = {
    "int": 3,
    "negative": -2,
    "scalar tensor": torch.tensor(4),
    "one element": torch.tensor([4]),
    "list": [0, 3],
    "tensor": torch.tensor([4, 1]),
    "tuple": (3,),
    "list of tuples": [(0,), (2,)],
    "none": None,
}


@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize("target", TARGETS)
def test_targets_equal_captum(images, target, at_once):
    target = TARGETS[target]
    found = Occlusion(scores).attribute(images, (3, 3, 2), 2, target=target, perturbations_per_eval=at_once)
    assert_close(found, by_captum(scores, images, (3, 3, 2), 2, target=target))
    assert found.shape[0] == (10 if target is None else 2)


def test_numpy_targets(images):
    for target, plain in ((np.int64(3), 3), (np.array([1, 2]), [1, 2])):
        found = Occlusion(scores).attribute(images, (3, 3, 2), target=target)
        assert torch.equal(found, Occlusion(scores).attribute(images, (3, 3, 2), target=plain))


@pytest.mark.parametrize("target", [None, 1, (1,), (1, 0), [(1, 0), (0, 1)], [(1,), (0,)]])
def test_outputs_with_more_dimensions(images, target):
    def function(x):
        return scores(x, 6).unflatten(1, (3, 2))

    for at_once in (1, 5):
        found = Occlusion(function).attribute(
            images, (3, 3, 2), 2, target=target, perturbations_per_eval=at_once
        )
        assert_close(found, by_captum(function, images, (3, 3, 2), 2, target=target))


@pytest.mark.parametrize("shape", [(2, 3, 6, 7), (1, 3, 6, 7), (3, 6, 7), (6, 7), (7,), (1,), (3, 1, 1),
                                   (2, 1, 1, 1), ()])  # fmt: skip
def test_baseline_tensors(images, shape):
    baseline = normal(*shape, seed=5)
    expected = by_captum(scores, images, (2, 3, 3), 2, baseline, 1)
    for at_once in (1, 4):
        found = Occlusion(scores).attribute(images, (2, 3, 3), 2, baseline, 1, perturbations_per_eval=at_once)
        assert_close(found, expected)
    assert_close(Occlusion(scores).attribute(images, (2, 3, 3), 2, (baseline,), 1), expected)


@pytest.mark.parametrize("baseline", [0.7, -1, True, (0.5,), None])
def test_baseline_numbers(images, baseline):
    assert_close(
        Occlusion(scores).attribute(images, (3, 2, 2), 2, baseline, 1),
        by_captum(scores, images, (3, 2, 2), 2, baseline, 1),
    )


def two(a: Tensor, b: Tensor, gain: Tensor | float = 1.0) -> Tensor:
    return scores(a) * gain + scores(b.sin()) * scores(a)[:, :1]


@pytest.mark.parametrize("at_once", [1, 4])
def test_several_inputs(images, at_once):
    inputs = (images, normal(2, 4, 5, seed=3))
    windows, strides = ((3, 2, 2), (2, 2)), ((3, 1, 2), 2)
    for baselines in (None, (0.5, normal(5, seed=4)), (normal(2, 3, 6, 7, seed=6), 1)):
        found = Occlusion(two).attribute(
            inputs, windows, strides, baselines, 2, perturbations_per_eval=at_once
        )
        assert_close(found, by_captum(two, inputs, windows, strides, baselines, 2))


def test_one_input_as_a_tuple(images):
    found = Occlusion(scores).attribute((images,), ((3, 2, 2),), target=1)
    assert isinstance(found, tuple) and len(found) == 1
    assert torch.equal(found[0], Occlusion(scores).attribute(images, (3, 2, 2), target=1))


@pytest.mark.parametrize("at_once", [1, 4])
def test_additional_arguments_follow_the_batch(images, at_once):
    gain = normal(2, 1, seed=7)
    second = normal(2, 4, seed=8)
    for args in ((second, gain), (second, torch.tensor(2.0)), (second, 3.0), (second,), second):
        found = Occlusion(two).attribute(
            images, (3, 3, 3), 2, None, [0, 4], args, perturbations_per_eval=at_once
        )
        assert_close(found, by_captum(two, images, (3, 3, 3), 2, None, [0, 4], args))


def test_additional_tensors_that_do_not_follow_the_batch(images):
    """They cannot be repeated as the examples are: the windows are evaluated one by one."""
    mean = normal(3, 1, 1, seed=7)

    def function(x, mean):
        return scores(x - mean)

    found = Occlusion(function).attribute(images, (3, 2, 2), target=1, additional_forward_args=mean)
    assert_close(found, by_captum(function, images, (3, 2, 2), target=1, additional_forward_args=mean))


AGGREGATES = {
    "scalar": lambda x: scores(x).sum(),
    "number": lambda x: scores(x).sum().item(),
    "integer": lambda x: int((1e4 * scores(x)).sum()),
    "one element": lambda x: scores(x).sum().reshape(1),
    "one row": lambda x: scores(x).sum(0, keepdim=True),
}


@pytest.mark.parametrize("function", AGGREGATES)
def test_one_score_for_the_whole_batch(images, function):
    function = AGGREGATES[function]
    found = Occlusion(function).attribute(images, (3, 2, 2), 2)
    assert_close(found, by_captum(function, images, (3, 2, 2), 2))
    assert found.shape[0] in (1, 5)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("baseline", [None, 1, 1.5, torch.tensor(1.5), torch.tensor([3.5] * 7)])
def test_integer_inputs(images, dtype, baseline):
    x = (images.abs() * 5).to(dtype)
    seen = []

    def function(x):
        seen.append(x.dtype)
        return scores(x * 0.3)

    found = Occlusion(function).attribute(x, (3, 2, 3), 2, baseline, 1)
    assert_close(found, by_captum(function, x, (3, 2, 3), 2, baseline, 1))
    fractional = isinstance(baseline, float | Tensor)
    assert set(seen) == {dtype, torch.float32 if fractional else dtype}


def test_boolean_inputs(images):
    assert_close(
        Occlusion(scores).attribute(images > 0, (3, 2, 2), target=1),
        by_captum(scores, images > 0, (3, 2, 2), target=1),
    )


def test_tokens(images):
    """Integer inputs of an embedding: a baseline token stands in the window."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 6), nn.Flatten(), nn.Linear(9 * 6, 4)).eval()
    x = torch.randint(1, 20, (3, 9))
    for baseline in (0, 7, torch.arange(9)):
        found = Occlusion(model).attribute(x, (2,), baselines=baseline, target=1)
        assert_close(found, by_captum(model, x, (2,), baselines=baseline, target=1))


# A network's windows, on either path.
NETWORK_SWEEPS = [((3, 2, 2), 1), ((3, 3, 4), (3, 2, 3)), ((3, 6, 7), (1, 100, 100)), ((1, 3, 3), 1)]


@pytest.mark.parametrize("least", [0, 1 << 30])
@pytest.mark.parametrize("window", NETWORK_SWEEPS)
def test_a_network(images, monkeypatch, window, least):
    monkeypatch.setattr(occlusion, "WORTH_CAPTURING", least)
    model = net()
    for baseline in (0.1, None, normal(3, 1, 1, seed=4), normal(2, 3, 6, 7, seed=5)):
        for target in (2, -1, [1, 4], torch.tensor([4, 0]), (3,), [(2,), (0,)]):
            assert_close(
                Occlusion(model).attribute(images, *window, baseline, target),
                by_captum(model, images, *window, baseline, target),
                1e-5,
            )


class Seen(nn.Module):
    """A network, and the sizes of the batches that it was run with."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.layers, self.batches = net(), []
        self.layers[-1] = nn.Linear(32, classes)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x.shape[0], int) and not torch.compiler.is_exporting():
            self.batches.append(len(x))
        return self.layers(x)


def swept(model: Seen, x: Tensor, *args: Any, **kwargs: Any) -> bool:
    """Whether the incremental engine did it, which runs captured layers: with Captum's result in any case."""
    model.batches.clear()
    found = Occlusion(model).attribute(x, *args, **kwargs)
    runs = len(model.batches)
    assert_close(found, by_captum(model, x, *args, **kwargs), 1e-5)
    return runs < 5


def test_which_sweeps_are_incremental(images, monkeypatch):
    monkeypatch.setattr(occlusion, "WORTH_CAPTURING", 0)
    model, window = Seen(), (3, 2, 2)
    assert swept(model, images, window, target=1)
    assert swept(model, (images,), window, target=[1, 2])
    assert swept(Seen(1), images, window)
    assert not swept(model, images, window)
    assert not swept(model, images, (1, 2, 2), target=1)
    assert not swept(model, images, window, target=1, perturbations_per_eval=2)
    assert not swept(model.train(), images, window, target=1)
    monkeypatch.setattr(occlusion, "WORTH_CAPTURING", images.numel() * 30 + 1)
    assert not swept(model.eval(), images, window, target=1)
    monkeypatch.setattr(occlusion, "WORTH_CAPTURING", images.numel() * 30)
    assert swept(model, images, window, target=1)
    handle = model.layers[0].register_forward_hook(lambda module, given, out: out * 2)
    assert not swept(model, images, window, target=1)
    handle.remove()


def test_a_model_that_mixes_the_batch_is_not_swept_incrementally(images, monkeypatch):
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = net()

        def forward(self, x):
            y = self.layers(x)
            return y - y.mean(0)

    monkeypatch.setattr(occlusion, "WORTH_CAPTURING", 0)
    model = Centred().eval()
    assert_close(
        Occlusion(model).attribute(images, (3, 2, 2), target=1),
        by_captum(model, images, (3, 2, 2), target=1),
        1e-5,
    )


def test_memory_too_small_for_the_engine(images, monkeypatch):
    monkeypatch.setattr(occlusion, "WORTH_CAPTURING", 0)
    for limit in (1, 10_000, 10**6):
        found = Occlusion(net()).attribute(images, (3, 2, 2), target=1, memory_limit=limit)
        assert_close(found, by_captum(net(), images, (3, 2, 2), target=1), 1e-5)


@st.composite
def sweeps(draw):
    size = draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    window = [draw(st.integers(1, extent)) for extent in size]
    strides = [draw(st.integers(1, 9 if w == extent else w)) for w, extent in zip(window, size, strict=True)]
    options = {
        "target": draw(st.sampled_from([None, 1, [2, 0, 1]])),
        "baselines": draw(st.sampled_from([None, 0.4])),
    }
    return (3, *size), tuple(window), tuple(strides), options, draw(st.sampled_from([1, 2, 7]))


@given(sweeps())
@settings(max_examples=60)
def test_any_sweep_equals_captum(sweep):
    shape, window, strides, options, at_once = sweep
    x = normal(*shape)

    def function(x):
        return scores(x, 3)

    found = Occlusion(function).attribute(x, window, strides, perturbations_per_eval=at_once, **options)
    assert_close(found, by_captum(function, x, window, strides, **options))


@given(sweeps())
@settings(max_examples=60)
def test_the_mean_over_windows(sweep):
    shape, window, strides, _, _ = sweep
    grid = WindowGrid(shape[1:], window, strides)
    values = normal(len(grid), 2).double()
    total, count = (
        torch.zeros(2, *grid.size, dtype=torch.float64),
        torch.zeros(grid.size, dtype=torch.float64),
    )
    for value, region in zip(values, grid.slices(0, len(grid)), strict=True):
        total[(slice(None), *region)] += value.view(2, *[1] * len(grid.size))
        count[region] += 1
    assert count.min() >= 1
    torch.testing.assert_close(grid.mean(values), total / count, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------- functions that mix the batch


class Mixing:
    """Functions whose rows cannot be evaluated beside others; what they were called with is kept."""

    def __init__(self, name: str) -> None:
        self.name, self.batches, self.calls = name, [], 0

    def __call__(self, x: Tensor) -> Tensor:
        self.batches.append(len(x))
        self.calls += 1
        y = scores(x)
        if self.name == "mean":
            return y - y.mean(0)
        if self.name == "softmax":
            return y.softmax(0)
        if self.name == "batch norm":
            return torch.nn.functional.batch_norm(y, None, None, training=True)
        if self.name == "largest":
            return y / x.amax()
        if self.name == "neighbour":
            return y + y.roll(1, 0)
        if self.name == "position":
            return y * torch.arange(1, len(x) + 1)[:, None]
        if self.name == "batch of two":
            assert len(x) == 2, "This function takes two examples."
            return y
        raise AssertionError(self.name)


@pytest.mark.parametrize(
    "name", ["mean", "softmax", "batch norm", "largest", "neighbour", "position", "batch of two"]
)
def test_functions_that_mix_the_batch_get_one_window_at_a_time(images, name):
    expected = by_captum(Mixing(name), images, (3, 2, 2), target=1)
    function = Mixing(name)
    assert_close(Occlusion(function).attribute(images, (3, 2, 2), target=1), expected)
    assert function.batches.count(2) >= 30 and max(function.batches) <= 6


@pytest.mark.parametrize("kind", ["dropout", "noise"])
def test_random_functions_draw_what_captum_draws(images, kind):
    def function(x):
        y = scores(x)
        return torch.dropout(y, 0.5, train=True) if kind == "dropout" else y + torch.randn_like(y)

    torch.manual_seed(3)
    expected = by_captum(function, images, (3, 2, 2), target=1)
    torch.manual_seed(3)
    assert_close(Occlusion(function).attribute(images, (3, 2, 2), target=1), expected)


def test_functions_that_do_not_mix_get_several_windows_at_a_time(images):
    batches = []

    def function(x):
        batches.append(len(x))
        return scores(x)

    Occlusion(function).attribute(images, (3, 2, 2), target=1)
    assert max(batches) == 8 and len(batches) <= 12
    batches.clear()
    Occlusion(function).attribute(images, (3, 2, 2), target=1, perturbations_per_eval=7)
    assert batches == [2, 14, 14, 14, 14, 4]  # 30 windows


@pytest.mark.parametrize("limit", [1, 10_000, 10**9])
@pytest.mark.parametrize("at_once", [1, 2, 7, 1000])
def test_the_result_does_not_depend_on_the_chunks(images, at_once, limit):
    inputs = (images, normal(2, 9, seed=3))
    windows = ((3, 2, 2), (2,))
    expected = Occlusion(two).attribute(inputs, windows, target=[1, 2], perturbations_per_eval=3)
    found = Occlusion(two).attribute(
        inputs, windows, target=[1, 2], perturbations_per_eval=at_once, memory_limit=limit
    )
    assert_close(found, expected)


def test_memory_limit_bounds_what_a_forward_holds(images):
    """The function's tensors are counted: the clean batch says what one window takes."""
    batches = []

    def function(x):
        batches.append(len(x))
        return scores(torch.stack([x] * 50).sum(0))

    x = images[:1]
    one = 4 * x.numel() * 50  # bytes of the largest tensor of one window
    largest = {}
    for limit in (one, 4 * one, 7 * one):
        batches.clear()
        Occlusion(function).attribute(x, (3, 2, 2), target=1, memory_limit=limit)
        largest[limit] = max(batches)
    assert largest == {one: 1, 4 * one: 3, 7 * one: 6}


@pytest.mark.parametrize("copies", [2, 5, 12])
def test_memory_limit_is_kept_to(copies):
    """All tensors of a call, counted from outside: the check of the function and the buffers with them."""
    x = normal(1, 3, 40, 40)
    one = 4 * x.numel() * 11  # ten copies and the input

    def function(x):
        return scores(torch.stack([x] * 10)[0].mean((2, 3)))

    with PeakBytes(True) as peak:
        Occlusion(function).attribute(x, (3, 8, 8), (3, 8, 8), target=1, memory_limit=copies * one)
    result = 4 * x.numel()
    assert one < peak.bytes <= copies * one + 8 * result


def test_out_of_memory_takes_fewer_windows(images):
    batches = []

    def function(x):
        batches.append(len(x))
        if len(x) > 6:
            raise torch.OutOfMemoryError("no memory for that many")
        return scores(x)

    found = Occlusion(function).attribute(images, (3, 2, 2), target=1)
    assert_close(found, by_captum(scores, images, (3, 2, 2), target=1))
    assert max(batches) > 6 and batches[-2] in (4, 6)
    with pytest.raises(torch.OutOfMemoryError):
        Occlusion(function).attribute(images, (3, 2, 2), target=1, perturbations_per_eval=4)


# -------------------------------------------------------------------------------------------- wrong arguments

ERRORS = {
    "a bare int as window": (((5,), {}), TypeError, "sliding_window_shapes must be a tuple"),
    "too few dimensions": ((((2, 2)), {}), AssertionError, r"\(2, 2\)"),
    "too many dimensions": ((((2, 2, 2, 2)), {}), AssertionError, "should be a tuple with 3 dimensions"),
    "windows for two inputs": (
        (((3, 2, 2), (3, 2, 2)), {}), AssertionError, "should be a tuple with 3 dimensions"),
    "a window larger than the input": (((3, 7, 2), {}), AssertionError, "cannot exceed input dimensions"),
    "an empty window": (((3, 0, 2), {}), AssertionError, "at least 1"),
    "a negative window": (((3, -1, 2), {}), AssertionError, "at least 1"),
    "a stride beyond the window": (
        ((3, 2, 2), {"strides": 3}), AssertionError, "cannot be larger than sliding window"),
    "strides of too few dimensions": (
        ((3, 2, 2), {"strides": (1, 1)}), AssertionError, "Stride for input index 0"),
    "strides in a list": (((3, 2, 2), {"strides": [1, 1, 1]}), AssertionError, "Stride for input index 0"),
    "a fractional stride": (((3, 2, 2), {"strides": 1.5}), AssertionError, "1.5"),
    "a stride of zero": (((3, 2, 2), {"strides": 0}), AssertionError, "at least 1"),
    "a baseline of another shape": (
        ((3, 2, 2), {"baselines": torch.zeros(5)}), RuntimeError, r"\(5,\).*\(2, 3, 6, 7\)"),
    "a baseline of another batch": (
        ((3, 2, 2), {"baselines": torch.zeros(3, 3, 6, 7)}), RuntimeError, "does not broadcast"),
    "a larger baseline": (
        ((3, 2, 2), {"baselines": torch.zeros(1, 2, 3, 6, 7)}), RuntimeError, "does not broadcast"),
    "a baseline in words": (((3, 2, 2), {"baselines": "mean"}), AssertionError, "'mean'"),
    "a list of baselines": (((3, 2, 2), {"baselines": [0.5]}), AssertionError, r"\[0.5\]"),
    "too many baselines": (((3, 2, 2), {"baselines": (0.5, 1)}), AssertionError, "2 baselines"),
    "no perturbation": (
        ((3, 2, 2), {"perturbations_per_eval": 0}), AssertionError, "must be an integer and at least 1"),
    "half a perturbation": (
        ((3, 2, 2), {"perturbations_per_eval": 1.5}), AssertionError, "must be an integer and at least 1"),
    "no memory": (((3, 2, 2), {"memory_limit": 0}), ValueError, "memory_limit"),
    "memory in words": (((3, 2, 2), {"memory_limit": "1GB"}), ValueError, "1GB"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_bad_arguments_are_refused_before_the_first_forward(images, case):
    (window, options), error, text = ERRORS[case]
    window = window[0] if len(window) == 1 else window

    def never(x):
        raise RuntimeError("the function was called")

    with pytest.raises(error, match=text):
        Occlusion(never).attribute(images, window, target=1, **options)


def test_bad_arguments_for_several_inputs(images):
    inputs = (images, images[:, 0])
    for window, strides, text in (
        ((3, 2, 2), None, "Occlusion shape|Must provide sliding window dimensions"),
        (((3, 2, 2),), None, "Must provide sliding window dimensions for each input"),
        (((3, 2, 2), (2, 2)), 1, "Strides must be provided for each input"),
        (((3, 2, 2), (2, 2)), (1,), "Strides must be provided for each input"),
        (((3, 2, 2), (2, 2)), (1, (1, 1, 1)), "Stride for input index 1"),
        (((3, 2, 2), (2, 2, 2)), None, "input index 1"),
    ):
        with pytest.raises(AssertionError, match=text):
            Occlusion(two).attribute(inputs, window, strides, target=1)
        with pytest.raises(AssertionError):
            by_captum(two, inputs, window, strides, target=1)


@pytest.mark.parametrize(
    ("target", "error", "text"),
    [
        (5, IndexError, "out of"),
        (-6, IndexError, "out of"),
        ([0, 5], IndexError, "out of"),
        ([0], AssertionError, "Target list length does not match output!"),
        (torch.tensor([0, 1, 2]), AssertionError, "not valid"),
        ((1, 2), AssertionError, "Cannot choose target column"),
        (1.0, AssertionError, "not valid"),
    ],
)
def test_bad_targets(images, target, error, text):
    for function in (scores, net()):
        with pytest.raises(error, match=text):
            Occlusion(function).attribute(images, (3, 2, 2), target=target)


def test_bad_functions(images):
    with pytest.raises(TypeError, match="forward_func must be callable"):
        Occlusion(None)
    for output in (None, "1", lambda x: (x,)):
        with pytest.raises(AssertionError, match="must return a tensor"):
            Occlusion(lambda x, output=output: output).attribute(images, (3, 2, 2))
    with pytest.raises(AssertionError, match="the output is a scalar|The output is a scalar"):
        Occlusion(lambda x: x.sum()).attribute(images, (3, 2, 2), target=0)
    for function in (AGGREGATES["scalar"], AGGREGATES["one row"]):
        with pytest.raises(AssertionError, match="When perturbations_per_eval > 1"):
            Occlusion(function).attribute(images, (3, 2, 2), perturbations_per_eval=2)
    with pytest.raises(AssertionError, match="`inputs` must be"):
        Occlusion(scores).attribute(images.numpy(), (3, 2, 2))

    def changing(x):
        return scores(x)[:, : 5 if x.abs().min() > 0 else 4]

    with pytest.raises(AssertionError, match=r"\(2, 5\).*\(2, 4\)"):
        Occlusion(changing).attribute(images, (3, 2, 2))


# ------------------------------------------------------------------------------------ where Captum is wrong


def test_what_is_hidden_does_not_shine_through():
    """Captum multiplies by zeros, so that a NaN stays a NaN under the occluder."""
    x = normal(1, 3, 6, 7)
    x[0, 1, 2, 3] = math.nan
    seen = []

    def function(x):
        seen.append(x.isnan().sum().item())
        return scores(x.nan_to_num())

    Occlusion(function).attribute(x, (3, 6, 7), baselines=0.5, target=1)
    assert seen == [1, 0]


def test_a_nan_score_stays_in_its_window(images):
    def function(x):
        return scores(x) + torch.where(x[:, :1, 0, 0] == 0, math.nan, 0.0)

    found = Occlusion(function).attribute(images, (3, 2, 2), 2, target=1)
    assert found[:, :, :2, :2].isnan().all() and found.isnan().sum() == 2 * 3 * 4
    rest = Occlusion(scores).attribute(images, (3, 2, 2), 2, target=1)
    assert torch.equal(found.nan_to_num()[..., 2:, :], rest[..., 2:, :])


def test_close_scores_of_low_precision_are_not_added_up_in_it(images):
    x = images.bfloat16()
    found = Occlusion(scores).attribute(x, (3, 2, 2), target=1)
    clean = scores(x)[:, 1].float()
    expected, count = torch.zeros(2, 3, 6, 7), torch.zeros(6, 7)
    for i in range(5):
        for j in range(6):
            hidden = x.clone()
            hidden[:, :, i : i + 2, j : j + 2] = 0
            expected[:, :, i : i + 2, j : j + 2] += (clean - scores(hidden)[:, 1].float()).view(2, 1, 1, 1)
            count[i : i + 2, j : j + 2] += 1
    assert_close(found, expected / count, 1e-2)


# ------------------------------------------------------------------------------------ modes and cleanliness


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_results_are_float32_in_the_inputs_layout(images, dtype, layout):
    x = images.to(dtype).contiguous(memory_format=layout).requires_grad_()
    seen = set()
    model = net().to(dtype)
    model.register_forward_pre_hook(lambda _, given: seen.add((given[0].dtype, given[0].requires_grad)))
    found = Occlusion(model).attribute(x, (1, 2, 2), target=1)
    assert (found.dtype, found.shape, found.stride()) == (torch.float32, x.shape, x.stride())
    assert not found.requires_grad and seen == {(dtype, False)}
    assert x.requires_grad and x.grad is None


@pytest.mark.parametrize("least", [0, 1 << 30])
def test_callers_modes(images, monkeypatch, least):
    monkeypatch.setattr(occlusion, "WORTH_CAPTURING", least)
    model = net()
    expected = by_captum(model, images, (3, 2, 2), target=1)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        assert_close(Occlusion(model).attribute(images, (3, 2, 2), target=1), expected, 1e-5)
    with torch.inference_mode():
        found = Occlusion(model).attribute(images.clone(), (3, 2, 2), target=1)
    assert_close(found.clone(), expected, 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        low = Occlusion(model).attribute(images, (3, 2, 2), target=1)
    assert low.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(low.flatten(), expected.flatten(), 0) > 0.9
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_functions_may_change_their_arguments(images):
    """Neither the caller's tensors nor the next window see it; also where no version counter tells of it."""
    before = images.clone()

    def function(x, other):
        y = scores(x) + scores(other)
        x.data.clamp_(min=0)
        other.zero_()
        return y

    inputs, windows = (images, images.clone()), ((3, 2, 2), (3, 2, 2))
    for at_once in (1, 4):
        found = Occlusion(function).attribute(inputs, windows, target=1, perturbations_per_eval=at_once)
        assert_close(found, by_captum(lambda a, b: scores(a) + scores(b), inputs, windows, target=1))
    assert torch.equal(images, before)
    model = nn.Sequential(nn.ReLU(inplace=True), net())
    assert_close(
        Occlusion(model).attribute(images, (3, 2, 2), target=1),
        by_captum(nn.Sequential(nn.ReLU(), net()), images, (3, 2, 2), target=1),
        1e-5,
    )
    assert torch.equal(images, before)


def test_functions_may_return_their_arguments(images):
    x = images.flatten(1)
    for function, plain in (
        (lambda x: x, lambda x: x),
        (lambda x: x[:, :2], lambda x: x[:, :2]),
        (lambda x: x.mul_(2), lambda x: x * 2),
    ):
        assert_close(Occlusion(function).attribute(x, (3,)), by_captum(plain, x, (3,)))


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("when", [0, 1, 4, 6])
def test_an_interrupted_sweep_leaves_nothing(images, error, when):
    model, calls = net(), []
    before = copy.deepcopy(model.state_dict())

    def function(x):
        calls.append(len(x))
        if len(calls) > when:
            raise error
        return model(x)

    x = images.clone().requires_grad_()
    threads = threading.active_count()
    with pytest.raises(error):
        Occlusion(function).attribute(x, (3, 2, 2), target=1, show_progress=True, memory_limit=10**6)
    assert torch.is_grad_enabled() and torch.equal(x.detach(), images) and x.grad is None
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m.training for m in model.modules())
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    assert threading.active_count() == threads
    assert_close(
        Occlusion(model).attribute(images, (3, 2, 2), target=1),
        by_captum(model, images, (3, 2, 2), target=1),
        1e-5,
    )


def test_ctrl_c_ends_a_sweep(images):
    calls = []

    def function(x):
        calls.append(1)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGINT)
        return scores(x)

    with pytest.raises(KeyboardInterrupt):
        Occlusion(function).attribute(images, (3, 2, 2), target=1, perturbations_per_eval=2)
    assert len(calls) == 5 and torch.is_grad_enabled()


def test_models_in_training_mode_are_functions_like_others(images):
    model = net().train()
    expected = by_captum(copy.deepcopy(model), images, (3, 2, 2), target=1)
    assert_close(Occlusion(model).attribute(images, (3, 2, 2), target=1), expected, 1e-5)
    assert model.training


def test_empty_inputs():
    assert Occlusion(scores).attribute(torch.zeros(0, 3, 6, 7), (3, 2, 2), target=1).shape == (0, 3, 6, 7)
    assert Occlusion(net()).attribute(torch.zeros(0, 3, 6, 7), (3, 2, 2), target=1).shape == (0, 3, 6, 7)
    found = Occlusion(lambda x: x.sum((1, 2))).attribute(torch.zeros(2, 3, 0), (3, 0))
    assert found.shape == (2, 3, 0)


def test_inputs_of_a_value_for_each_example():
    x = normal(4)
    found = Occlusion(torch.tanh).attribute(x, ())
    assert_close(found, x.tanh())


def test_facts_that_captums_users_read():
    theirs = captum.attr.Occlusion(scores)
    assert Occlusion(scores).multiplies_by_inputs == theirs.multiplies_by_inputs
    assert Occlusion(scores).has_convergence_delta() == theirs.has_convergence_delta()


# ---------------------------------------------------------------------------------------------- progress


@pytest.mark.parametrize("function", [scores, net()])
def test_progress_counts_windows_of_images(images, capsys, monkeypatch, function):
    monkeypatch.setattr(occlusion, "WORTH_CAPTURING", 0)
    for x, count in ((images, 24), (images[:1], 12)):
        Occlusion(function).attribute(x, (3, 2, 2), (3, 2, 2), target=1, show_progress=True)
        text = capsys.readouterr()
        assert f"{count}/{count} windows in 0 s" in text.err and not text.out
    Occlusion(function).attribute(images, (3, 2, 2), target=1)
    text = capsys.readouterr()
    assert not text.err and not text.out


def test_progress_of_several_inputs_counts_all_windows(images, capsys):
    inputs = (images, normal(2, 9))
    Occlusion(two).attribute(inputs, ((3, 6, 7), (3,)), (1, 3), target=1, show_progress=True)
    assert "8/8 windows" in capsys.readouterr().err
