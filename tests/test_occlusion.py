"""Occlusion: equality with Captum for any function, and where Captum is wrong."""

from __future__ import annotations

import math
from typing import Any

import captum.attr
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from occlusion_cases import AGGREGATES, assert_close, by_captum, net, normal, scores, two
from torch import Tensor, nn

from convviz_cuda.attr import Occlusion, occlusion
from convviz_cuda.attr._windows import WindowGrid


@pytest.fixture
def images() -> Tensor:
    return normal(2, 3, 6, 7)


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
