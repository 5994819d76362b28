"""Integrated gradients and the noise tunnel: equal to Captum's, to closed forms and to sums written out."""

from __future__ import annotations

import contextlib
import copy
import threading
import warnings
from typing import Any

import captum.attr
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from convviz_cuda import attr
from convviz_cuda.attr import IntegratedGradients, NoiseTunnel
from convviz_cuda.attr.integrated_gradients import METHODS


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(8, 12, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 7),
    ).eval().to(dtype)  # fmt: skip


def normal(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture
def images() -> Tensor:
    return normal(3, 3, 13, 11)


@contextlib.contextmanager
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def by_captum(function: Any, *args: Any, multiply_by_inputs: bool = True, **kwargs: Any) -> Any:
    with quiet():
        return captum.attr.IntegratedGradients(function, multiply_by_inputs).attribute(*args, **kwargs)


def assert_equal_to(found: Any, expected: Any, tolerance: float = 2e-6) -> None:
    """Within ``tolerance`` of the largest value expected: attributions have no absolute scale."""
    if isinstance(expected, tuple):
        assert isinstance(found, tuple) and len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_equal_to(one, other, tolerance)
        return
    expected = expected.detach()
    assert found.shape == expected.shape and found.dtype == expected.dtype and not found.requires_grad
    scale = expected.abs().max().item()
    assert scale > 0 and (found - expected).abs().max().item() <= tolerance * scale


# ---------------------------------------------------------------------------------- the path, written out

RULES = {  # of n points: where they lie and what they weigh
    "riemann_left": lambda n: (np.arange(n) / n, np.full(n, 1 / n)),
    "riemann_right": lambda n: (np.arange(1, n + 1) / n, np.full(n, 1 / n)),
    "riemann_middle": lambda n: ((np.arange(n) + 0.5) / n, np.full(n, 1 / n)),
    "riemann_trapezoid": lambda n: (
        np.linspace(0, 1, n),
        np.convolve(
            np.full(n - 1, 0.5 / (n - 1)), [1, 1]
        ),  # each interval gives half its length to both ends
    ),
    "gausslegendre": lambda n: [
        part / 2 + shift for part, shift in zip(np.polynomial.legendre.leggauss(n), (0.5, 0.0), strict=True)
    ],
}


def written_out(model, x: Tensor, baseline: Tensor, columns: list[int], method: str, n: int) -> Tensor:
    """The mean gradient in float64 by plain autograd, one point at a time, times the difference."""
    model, x, baseline = copy.deepcopy(model).double(), x.double(), baseline.double()
    total = torch.zeros_like(x)
    for alpha, weight in zip(*RULES[method](n), strict=True):
        point = (baseline + alpha * (x - baseline)).requires_grad_()
        score = model(point)[range(len(x)), columns].sum()
        total += weight * torch.autograd.grad(score, point)[0]
    return total * (x - baseline)


def test_the_methods_are_captums():
    assert set(METHODS) == set(RULES)
    assert sorted(METHODS) == sorted(captum.attr._utils.approximation_methods.SUPPORTED_METHODS)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n_steps", [2, 7, 50])
def test_equals_the_sum_written_out_in_float64(images, method, n_steps):
    baseline, columns = normal(1, 3, 13, 11, seed=2, dtype=torch.float64), [3, 0, 6]
    expected = written_out(net(), images, baseline, columns, method, n_steps)
    found = IntegratedGradients(net(torch.float64)).attribute(
        images.double(), baseline, columns, n_steps=n_steps, method=method
    )
    assert_equal_to(found, expected, 1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_equals_captum(images, method):
    method_of_captum = IntegratedGradients(net(), compat="captum")
    for n_steps, baseline in (
        (50, None), (13, 0.25), (6, normal(1, 3, 13, 11)), (6, images.flip(0)),
        (6, normal(1, 1, 13, 11)), (6, normal(1, 3, 1, 1)),
    ):  # fmt: skip
        for target in (2, -1, [0, 1, 6], torch.tensor([5, 1, 0]), (3,), [(0,), (1,), (2,)]):
            expected = by_captum(net(), images, baseline, target, n_steps=n_steps, method=method)
            found = method_of_captum.attribute(images, baseline, target, n_steps=n_steps, method=method)
            assert_equal_to(found, expected, 1e-5)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "riemann_trapezoid"])
def test_compat_changes_the_trapezoid_only(images, method):
    ours, captums = (
        IntegratedGradients(net(), compat=c).attribute(images, target=1, n_steps=5, method=method)
        for c in (None, "captum")
    )
    assert torch.equal(ours, captums)


def test_the_trapezoid_weighs_one(images):
    """Of a linear function every rule gives weight times input; Captum's trapezoid gives (n - 1) / n of it."""
    model = nn.Linear(5, 1, bias=False).double()
    x = normal(2, 5, dtype=torch.float64)
    expected = model.weight.detach() * x
    for method in METHODS:
        assert_equal_to(IntegratedGradients(model).attribute(x, n_steps=4, method=method), expected, 1e-14)
    captums = IntegratedGradients(model, compat="captum")
    assert_equal_to(captums.attribute(x, n_steps=4, method="riemann_trapezoid"), expected * 0.75, 1e-14)


def test_multiply_by_inputs(images):
    method = IntegratedGradients(net(), False)
    assert method.multiplies_by_inputs is False and IntegratedGradients(net()).multiplies_by_inputs is True
    expected = by_captum(net(), images, 0.5, 2, multiply_by_inputs=False)
    assert_equal_to(method.attribute(images, 0.5, 2), expected, 1e-5)


def test_a_quadratic_function_has_a_closed_form():
    """f(x) = x'Ax / 2 + b'x: attribution i is (x - x')_i (A (x + x') / 2 + b)_i."""
    a, b = normal(6, 6, seed=3, dtype=torch.float64), normal(6, seed=4, dtype=torch.float64)
    a = a + a.T
    x, start = normal(4, 6, dtype=torch.float64), normal(4, 6, seed=5, dtype=torch.float64)
    expected = (x - start) * ((x + start) @ a / 2 + b)
    method = IntegratedGradients(lambda x: ((x @ a) * x).sum(1) / 2 + x @ b)
    for rule, n_steps in (
        ("gausslegendre", 1),
        ("gausslegendre", 9),
        ("riemann_middle", 1),
        ("riemann_trapezoid", 2),
    ):
        found, delta = method.attribute(x, start, n_steps=n_steps, method=rule, return_convergence_delta=True)
        assert_equal_to(found, expected, 1e-13)
        assert delta.shape == (4,) and delta.abs().max() < 1e-12


# ------------------------------------------------------------------------------------------ completeness


def test_attributions_sum_up_to_the_difference_of_the_scores(images):
    model, start = net(torch.float64), normal(3, 3, 13, 11, seed=2, dtype=torch.float64)
    x = images.double()
    with torch.no_grad():
        difference = (model(x) - model(start))[:, 4]
    errors = []
    for n_steps in (5, 50, 500):
        found, delta = IntegratedGradients(model).attribute(
            x, start, 4, n_steps=n_steps, return_convergence_delta=True
        )
        torch.testing.assert_close(delta, found.flatten(1).sum(1) - difference, rtol=0, atol=1e-12)
        errors.append(delta.abs().max().item() / difference.abs().max().item())
    assert errors[2] < 3e-3 and errors[2] < errors[0] / 10


def test_delta_equals_captums(images):
    ours, theirs = IntegratedGradients(net()), captum.attr.IntegratedGradients(net())
    assert ours.has_convergence_delta() is True
    for target in (2, [0, 1, 6]):
        given = {"target": target, "n_steps": 6, "return_convergence_delta": True}
        found, delta = ours.attribute(images, 0.5, **given)
        expected, expected_delta = theirs.attribute(images, 0.5, **given)
        assert delta.shape == (3,)
        torch.testing.assert_close(delta, expected_delta.detach(), rtol=1e-4, atol=1e-6)
        arguments = (expected.detach(), 0.5, images, target)
        torch.testing.assert_close(
            ours.compute_convergence_delta(*arguments), theirs.compute_convergence_delta(*arguments).detach()
        )
    with pytest.raises(AssertionError, match="first dimension"):
        ours.compute_convergence_delta(found[:2], 0.5, images, 2)


# ------------------------------------------------------------------------------------------------ chunks


class Watched(nn.Module):
    """The batch sizes that a model saw."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.sizes = model, []

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        self.sizes.append(len(x))
        return self.model(x, *more)


@pytest.mark.parametrize("n_steps", [1, 10, 11])
def test_the_result_does_not_depend_on_the_chunks(images, n_steps):
    model = Watched(net(torch.float64).eval())
    method, x = IntegratedGradients(model), images.double()
    expected = method.attribute(x, target=[1, 2, 3], n_steps=n_steps)
    for size, points in ((3, 1), (8, 2), (12, 4), (1000, n_steps)):
        model.sizes.clear()
        found = method.attribute(x, target=[1, 2, 3], n_steps=n_steps, internal_batch_size=size)
        whole, rest = divmod(n_steps, points)
        assert model.sizes == [3 * points] * whole + [3 * rest] * (rest > 0)
        assert_equal_to(found, expected, 1e-13)


def test_an_internal_batch_smaller_than_the_batch_warns(images):
    with pytest.warns(UserWarning, match="internal_batch_size is 2"):
        found = IntegratedGradients(net()).attribute(images, target=1, internal_batch_size=2)
    assert_equal_to(found, by_captum(net(), images, target=1), 1e-5)


def test_memory_limits_the_points_of_a_pass():
    """Each operation makes 1 MB a point; of the forward's four and the backward's, 3 to 8 live at once."""
    sizes = []

    def function(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return (x * torch.ones(1 << 18)).pow(2).mean(1)

    x = normal(1, 1)
    expected = x * x  # of the square, by its closed form
    passes = {}
    for limit in (1, 16 << 20, 40 << 20, 1 << 40):
        sizes.clear()
        found = IntegratedGradients(function).attribute(x, n_steps=40, memory_limit=limit)
        assert_equal_to(found, expected, 1e-5)
        assert sizes[0] == 1 and sum(sizes) == 40
        passes[limit] = max(sizes)
    assert passes[1] == 1
    assert 2 <= passes[16 << 20] <= 5 and 5 <= passes[40 << 20] <= 13
    assert passes[16 << 20] < passes[40 << 20] < passes[1 << 40]


@pytest.mark.parametrize("method", ["gausslegendre", "riemann_trapezoid"])
def test_what_belongs_to_the_examples_is_repeated_with_them(images, method):
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x, scale, power, offset):
            assert len(scale) == len(x) and offset.shape == (7,)
            return (self.net(x) * scale).pow(power) + offset

    extra = (torch.tensor([[1.0], [2.0], [-3.0]]), 2, normal(7))
    expected = by_captum(
        lambda x, s, p: Scaled()(x, s, p, extra[2]), images, 0.1, [1, 2, 6], extra[:2], 9, method
    )
    for size in (None, 3, 9, 100):
        found = IntegratedGradients(Scaled(), compat="captum").attribute(
            images, 0.1, [1, 2, 6], extra, 9, method, internal_batch_size=size
        )
        assert_equal_to(found, expected, 1e-5)


def test_constants_of_one_example_are_not_repeated():
    weight = normal(1, 5)[0]
    found = IntegratedGradients(lambda x, w: (x * w).sum(1)).attribute(
        torch.ones(1, 5), additional_forward_args=weight
    )
    assert_equal_to(found, weight[None])


@settings(max_examples=15)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    n_steps=st.integers(2, 9),
    size=st.none() | st.integers(4, 30),
    method=st.sampled_from(METHODS),
)
def test_inputs_of_any_shape_equal_captum(shape, n_steps, size, method):
    x, start = normal(*shape), normal(1, *shape[1:], seed=2)

    def function(x: Tensor) -> Tensor:
        return x.reshape(len(x), -1).pow(3).add(x.reshape(len(x), -1).sin()).sum(1)

    given = {"n_steps": n_steps, "method": method, "internal_batch_size": size}
    found = IntegratedGradients(function, compat="captum").attribute(x, start, **given)
    assert_equal_to(found, by_captum(function, x, start, **given), 1e-5)


# -------------------------------------------------------------------------------------- several inputs


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(5, 4)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.relu(self.conv(a)).mean((2, 3)) * torch.tanh(self.linear(b))


@pytest.mark.parametrize("baselines", [None, (0.5, None), "tensors"])
def test_two_inputs_equal_captum(images, baselines):
    inputs = (images, normal(3, 5, seed=6))
    if baselines == "tensors":
        baselines = (normal(1, 3, 13, 11, seed=7), normal(3, 5, seed=8))
    elif baselines is not None:
        baselines = (0.5, -1)
    expected = by_captum(Two(), inputs, baselines, 2, n_steps=20, return_convergence_delta=True)
    found = IntegratedGradients(Two()).attribute(
        inputs, baselines, 2, n_steps=20, return_convergence_delta=True
    )
    assert_equal_to(found[0], expected[0], 1e-5)
    torch.testing.assert_close(found[1], expected[1].detach(), rtol=1e-4, atol=1e-6)
    assert isinstance(IntegratedGradients(net()).attribute((images,), (0,), 1), tuple)


# ------------------------------------------------------------------------------------------ many targets


@pytest.mark.parametrize("per_pass", [None, 1, 2, 8])
@pytest.mark.parametrize("size", [None, 3, 9])
def test_many_targets_equal_one_after_another(images, per_pass, size):
    method = IntegratedGradients(net(torch.float64))
    targets = [3, [0, 1, 6], torch.tensor([5, 5, 0]), (2,), [(1,), (0,), (2,)]]
    x, given = images.double(), {"n_steps": 5, "return_convergence_delta": True}
    found, delta = method.attribute_many(
        x, targets, 0.5, internal_batch_size=size, targets_per_pass=per_pass, **given
    )
    assert found.shape == (5, *x.shape) and delta.shape == (5, 3)
    for k, target in enumerate(targets):
        expected, expected_delta = method.attribute(x, 0.5, target, **given)
        assert_equal_to(found[k], expected, 1e-12)
        torch.testing.assert_close(delta[k], expected_delta, rtol=0, atol=1e-12)


def test_many_targets_share_the_forwards(images):
    model = Watched(net())
    found = IntegratedGradients(model).attribute_many(images, torch.tensor([[0, 1, 2], [3, 3, 3]]), n_steps=5)
    assert sum(model.sizes) == 5 * 3
    for k, target in enumerate(([0, 1, 2], [3, 3, 3])):
        assert_equal_to(found[k], by_captum(net(), images, None, target, n_steps=5), 1e-5)
    assert IntegratedGradients(net()).attribute_many(images, []).shape == (0, *images.shape)


def test_many_targets_of_two_inputs():
    inputs = (normal(3, 3, 13, 11), normal(3, 5, seed=6))
    found = IntegratedGradients(Two()).attribute_many(inputs, [0, 3], (0.1, 0.2))
    assert isinstance(found, tuple)
    for k, target in enumerate((0, 3)):
        assert_equal_to(tuple(f[k] for f in found), by_captum(Two(), inputs, (0.1, 0.2), target), 1e-5)


# ------------------------------------------------------------------------------- what must work, and stay


def test_reduced_precision_is_summed_in_float32(images):
    x = images.bfloat16()
    found = IntegratedGradients(net(torch.bfloat16)).attribute(x, target=1, n_steps=300)
    assert found.dtype == torch.bfloat16
    expected = IntegratedGradients(net()).attribute(x.float(), target=1, n_steps=300)
    assert (found.float() - expected).abs().max() <= 0.05 * expected.abs().max()
    # 1000 weights of 0.001 in bfloat16 would stop growing at 0.25; a linear function shows it.
    ones = torch.ones(2, 3, dtype=torch.bfloat16)
    exact = IntegratedGradients(lambda x: x.sum(1)).attribute(ones, n_steps=1000, method="riemann_left")
    assert torch.equal(exact, ones)


def test_autocast_frozen_parameters_no_grad_and_layouts(images):
    model = net()
    expected = by_captum(net(), images, target=1)
    with torch.no_grad():
        assert_equal_to(IntegratedGradients(model).attribute(images, target=1), expected, 1e-5)
    model.requires_grad_(False)
    assert_equal_to(IntegratedGradients(model).attribute(images, target=1), expected, 1e-5)
    turned = images.contiguous(memory_format=torch.channels_last)
    found = IntegratedGradients(model).attribute(turned, target=1)
    assert_equal_to(found, expected, 1e-5)
    assert found.is_contiguous(memory_format=torch.channels_last) and not found.is_contiguous()
    with torch.autocast("cpu", torch.bfloat16):
        found = IntegratedGradients(model).attribute(images, target=1)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() <= 0.05 * expected.abs().max()
    with torch.inference_mode(), pytest.raises(RuntimeError, match="no_grad"):
        IntegratedGradients(model).attribute(images, target=1)


def test_integers_are_taken_as_floats():
    x = torch.tensor([[1, 2, 3]])

    def function(x: Tensor) -> Tensor:
        return x.float().pow(2).sum(1)

    assert_equal_to(IntegratedGradients(function).attribute(x), by_captum(function, x), 1e-6)


def test_an_empty_batch():
    found, delta = IntegratedGradients(net()).attribute(
        torch.zeros(0, 3, 13, 11), target=1, return_convergence_delta=True
    )
    assert found.shape == (0, 3, 13, 11) and delta.shape == (0,)


def test_one_score_for_the_whole_batch():
    x = normal(3, 4, dtype=torch.float64)
    found, delta = IntegratedGradients(lambda x: x.pow(2).sum()).attribute(x, return_convergence_delta=True)
    assert_equal_to(found, x * x, 1e-13)
    assert delta.shape == (1,) and delta.abs() < 1e-12


def test_a_function_that_changes_its_arguments_in_place(images):
    def function(x: Tensor) -> Tensor:
        x.mul_(2)
        return x.pow(2).sum((1, 2, 3))

    before = images.clone()
    found, delta = IntegratedGradients(function).attribute(images, 0.25, return_convergence_delta=True)
    assert torch.equal(images, before)
    assert_equal_to(found, 4 * (images.pow(2) - 0.0625), 1e-5)
    assert delta.abs().max() < 1e-2


def test_a_function_that_gives_its_output_in_the_same_memory_again():
    buffer, x = torch.empty(3, dtype=torch.float64), normal(3, 4, dtype=torch.float64)

    def function(x: Tensor) -> Tensor:
        scores = x.pow(2).sum(1)
        return scores if scores.requires_grad else buffer.copy_(scores)

    _, delta = IntegratedGradients(function).attribute(x, return_convergence_delta=True)
    assert delta.abs().max() < 1e-12


def test_a_function_that_only_bears_the_callers_layout(images):
    def function(x: Tensor) -> Tensor:
        return x.view(len(x), -1).pow(2).sum(1)  # a view that channels_last does not allow

    assert_equal_to(IntegratedGradients(function).attribute(images), images.pow(2), 1e-5)


def test_nothing_is_left_behind(images):
    model = net()
    x, start = images.clone().requires_grad_(), normal(3, 3, 13, 11, seed=2)
    state, kept = torch.random.get_rng_state(), (x.detach().clone(), start.clone())
    parameters = {name: p.clone() for name, p in model.state_dict().items()}
    method = IntegratedGradients(model)
    method.attribute(x, start, 1, n_steps=3, return_convergence_delta=True)
    with pytest.raises(IndexError):
        method.attribute(x, start, 7, n_steps=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(x, kept[0]) and torch.equal(start, kept[1]) and x.requires_grad and x.grad is None
    assert all(torch.equal(p, parameters[name]) for name, p in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._backward_hooks or m.training for m in model.modules())


def test_two_threads_share_a_method(images):
    method, wrong, barrier = IntegratedGradients(net()), [], threading.Barrier(2)
    expected = {t: method.attribute(images, target=t, n_steps=4) for t in (1, 2)}

    def work(target: int) -> None:
        for _ in range(10):
            barrier.wait()
            if not torch.equal(method.attribute(images, target=target, n_steps=4), expected[target]):
                wrong.append(target)

    threads = [threading.Thread(target=work, args=(t,)) for t in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_progress_counts_the_points(images, capsys):
    IntegratedGradients(net()).attribute(images, target=1, n_steps=9, show_progress=True)
    assert "integrated gradients: 9/9 points" in capsys.readouterr().err
    IntegratedGradients(net()).attribute(images, target=1, n_steps=9)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        ({"method": "simpson"}, ValueError, "'simpson'"),
        ({"n_steps": 0}, ValueError, "n_steps must be an int of at least 1"),
        ({"n_steps": 2.5}, ValueError, "2.5"),
        ({"n_steps": 1, "method": "riemann_trapezoid"}, ValueError, "at least 2"),
        ({"internal_batch_size": 0}, ValueError, "internal_batch_size"),
        ({"memory_limit": 0}, ValueError, "memory_limit"),
        ({"baselines": torch.zeros(3, 13, 11)}, AssertionError, r"\(3, 13, 11\)"),
        ({"baselines": torch.zeros(2, 3, 13, 11)}, AssertionError, r"\(2, 3, 13, 11\)"),
        ({"baselines": (0, 0)}, AssertionError, "2 baselines"),
        ({"baselines": "black"}, AssertionError, "'black'"),
        ({"target": None}, AssertionError, "Target not provided when necessary"),
        ({"target": [0, 1]}, AssertionError, "Target list length"),
        ({"target": 7}, IndexError, "7"),
    ],
)
def test_wrong_arguments(images, wrong, error, words):
    with pytest.raises(error, match=words):
        IntegratedGradients(net()).attribute(images, **{"target": 1, **wrong})


def test_wrong_arguments_are_refused_before_the_function_runs(images):
    def never(x: Tensor) -> Tensor:
        raise RuntimeError("it ran")

    for wrong in ({"method": "simpson"}, {"baselines": torch.zeros(1)}, {"internal_batch_size": -1}):
        with pytest.raises((ValueError, AssertionError)):
            IntegratedGradients(never).attribute(images, **wrong)
    with pytest.raises(TypeError, match="callable"):
        IntegratedGradients("model")
    with pytest.raises(ValueError, match="'torch'"):
        IntegratedGradients(never, compat="torch")
    with pytest.raises(ValueError, match="targets_per_pass"):
        IntegratedGradients(net()).attribute_many(images, [0], targets_per_pass=0)


# ========================================================================================== noise tunnel

TYPES = ("smoothgrad", "smoothgrad_sq", "vargrad")


class Echo:
    """An attribution method that gives its inputs back, and keeps what it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, dict[str, Any]]] = []
        self.forward_func, self.multiplies_by_inputs = sum, False

    def has_convergence_delta(self) -> bool:
        return False

    def attribute(self, inputs: Any, **kwargs: Any) -> Any:
        copied = tuple(x.clone() for x in inputs) if isinstance(inputs, tuple) else inputs.clone()
        self.calls.append((copied, kwargs))
        return copied


def noisy_samples(inputs: Any, count: int, **kwargs: Any) -> list[Any]:
    """The inputs of each sample, as a method is given them."""
    echo = Echo()
    NoiseTunnel(echo).attribute(inputs, "smoothgrad", count, 1, **kwargs)
    assert len(echo.calls) == count
    return [given for given, _ in echo.calls]


def together(samples: list[Tensor], nt_type: str) -> Tensor:
    """Captum's definitions, in float64."""
    every = torch.stack([s.double() for s in samples])
    if nt_type == "smoothgrad":
        return every.mean(0)
    square = (every**2).mean(0)
    return square if nt_type == "smoothgrad_sq" else square - every.mean(0) ** 2


@pytest.mark.parametrize("nt_type", TYPES)
def test_without_noise_it_is_the_method(images, nt_type):
    method = attr.Saliency(net())
    once = method.attribute(images, 2, abs=False)
    found = NoiseTunnel(method).attribute(images, nt_type, 4, stdevs=0.0, target=2, abs=False)
    if nt_type == "vargrad":
        assert found.abs().max() <= 1e-10 * once.pow(2).max()
    else:
        assert_equal_to(found, once if nt_type == "smoothgrad" else once**2, 1e-6)


NOISED = {
    "Saliency": lambda model: (attr.Saliency(model), {"abs": False}),
    "GuidedBackprop": lambda model: (attr.GuidedBackprop(model), {}),
    "IntegratedGradients": lambda model: (attr.IntegratedGradients(model), {"n_steps": 3}),
    "Occlusion": lambda model: (attr.Occlusion(model), {"sliding_window_shapes": (3, 5, 5), "strides": 4}),
}


@pytest.mark.parametrize("nt_type", TYPES)
@pytest.mark.parametrize("name", NOISED)
def test_equals_a_loop_over_the_same_noise(images, name, nt_type):
    method, more = NOISED[name](net(torch.float64))
    x, given = images.double(), {"stdevs": 0.3, "seed": 5}
    samples = [method.attribute(noisy, target=[2, 0, 1], **more) for noisy in noisy_samples(x, 7, **given)]
    expected = together(samples, nt_type)
    # Occlusion rounds its results to float32, and squares of them cancel.
    tolerance = 1e-10 if samples[0].dtype == torch.float64 else 1e-4 if nt_type == "vargrad" else 1e-6
    for size in (None, 1, 3, 7, 100):
        found = NoiseTunnel(method).attribute(x, nt_type, 7, size, target=[2, 0, 1], **given, **more)
        assert_equal_to(found, expected.to(samples[0].dtype), tolerance)


@pytest.mark.parametrize("nt_type", TYPES)
def test_the_result_does_not_depend_on_the_samples_at_once(images, nt_type):
    tunnel = NoiseTunnel(attr.Saliency(lambda x: x.pow(3).sum((1, 2, 3))))
    found = [tunnel.attribute(images, nt_type, 11, size) for size in (None, 1, 2, 4, 11, 50)]
    assert all(torch.equal(one, found[0]) for one in found)
    assert not torch.equal(tunnel.attribute(images, nt_type, 11, seed=1), found[0])


def test_how_many_samples_pass_at_once(images):
    model = Watched(net())
    NoiseTunnel(attr.Saliency(model)).attribute(images, nt_samples=7, nt_samples_batch_size=3, target=1)
    assert model.sizes == [9, 9, 3]
    model.sizes.clear()
    NoiseTunnel(attr.Saliency(model)).attribute(images, nt_samples=100, target=1)
    assert sum(model.sizes) == 300 and 3 < max(model.sizes) <= 48


def test_the_noise_of_an_example_depends_on_its_place_and_the_sample_alone():
    a, b, c = normal(3, 40, seed=2)
    first = noisy_samples(torch.stack([a, b]), 3, stdevs=2.0)
    other = noisy_samples(torch.stack([c, b, a, a]), 5, stdevs=2.0)
    for sample in range(3):
        assert torch.equal(first[sample][1], other[sample][1])
        torch.testing.assert_close(first[sample][0] - a, other[sample][0] - c)
    every = torch.stack([x - torch.stack([c, b, a, a]) for x in other]).flatten(0, 1)
    equal = (every[:, None] - every[None]).abs().amax(2) < 1e-3
    assert torch.equal(equal, torch.eye(20, dtype=torch.bool))


def test_the_noise_is_normal():
    x = normal(20, 500, dtype=torch.float64)
    noise = torch.stack(noisy_samples(x, 20, stdevs=1.5, seed=-3)) - x
    count = noise.numel()
    assert abs(noise.mean()) < 5 * 1.5 / count**0.5
    assert abs(noise.var() / 1.5**2 - 1) < 5 * (2 / count) ** 0.5
    ranks = noise.flatten().sort().values / 1.5
    exact = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    assert (torch.special.ndtr(ranks) - torch.special.ndtr(exact)).abs().max() < 2 / count**0.5  # Kolmogorov
    # Neither examples nor samples go together.
    for rows in (noise.flatten(1), noise.transpose(0, 1).flatten(1)):
        off = torch.corrcoef(rows) - torch.eye(20, dtype=torch.float64)
        assert off.abs().max() < 5 / rows.shape[1] ** 0.5


def test_a_quadratic_functions_expectations():
    """The gradient of x'Ax / 2 is A(x + e): mean A x, variance s^2 diag(AA'), mean square the sum of both."""
    a = normal(5, 5, seed=3, dtype=torch.float64)
    a, x, s, n = a + a.T, normal(3, 5, dtype=torch.float64), 0.7, 4000
    tunnel = NoiseTunnel(attr.Saliency(lambda x: ((x @ a) * x).sum(1) / 2))
    variance = s**2 * (a @ a).diagonal().expand(3, 5)
    given = {"nt_samples": n, "stdevs": s, "abs": False}
    error = (tunnel.attribute(x, "smoothgrad", **given) - x @ a).abs()
    assert (error < 5 * (variance / n).sqrt()).all() and error.max() > 0
    error = (tunnel.attribute(x, "vargrad", **given) / variance - 1).abs()
    assert (error < 5 * (2 / n) ** 0.5).all()
    mean = x @ a
    spread = (2 * variance**2 + 4 * variance * mean**2).div(n).sqrt()
    assert ((tunnel.attribute(x, "smoothgrad_sq", **given) - mean**2 - variance).abs() < 5 * spread).all()


@pytest.mark.parametrize("nt_type", TYPES)
def test_equals_captum_in_distribution(nt_type):
    model, n = net(), 600
    x = normal(2, 3, 9, 9)
    given = {"stdevs": 0.5, "target": [1, 4], "abs": False}
    ours = NoiseTunnel(attr.Saliency(model))
    found = ours.attribute(x, nt_type, n, **given)
    samples = torch.stack(
        [attr.Saliency(model).attribute(s, [1, 4], False) for s in noisy_samples(x, 200, stdevs=0.5)]
    )
    values = samples**2 if nt_type == "smoothgrad_sq" else samples
    if nt_type == "vargrad":
        values = (samples - samples.mean(0)) ** 2
    error = values.std(0) / n**0.5
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = captum.attr.NoiseTunnel(captum.attr.Saliency(model)).attribute(x, nt_type, n, 50, **given)
    # Two independent means of n: their differences, in standard errors, are about normal with variance 2.
    scores = (found - theirs) / error
    assert scores.abs().mean() < 1.6 and scores.abs().max() < 10  # 1.13 expected
    assert scores.pow(2).mean().sqrt() > 0.7  # they are independent indeed


def test_the_variance_does_not_cancel():
    """Attributions of 10000 with a deviation of 0.01: float32's mean square less the squared mean has no digit."""
    tunnel = NoiseTunnel(Echo())
    x = torch.full((2, 50), 1e4)
    expected = together(noisy_samples(x, 30, stdevs=0.05), "vargrad")
    found = tunnel.attribute(x, "vargrad", 30, stdevs=0.05)
    assert found.dtype == torch.float32 and (found >= 0).all()
    assert ((found - expected).abs() <= 0.02 * expected).all() and (expected > 1e-4).all()


@settings(max_examples=15)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    n=st.integers(1, 6),
    size=st.none() | st.integers(1, 7),
)
def test_variances_are_positive_and_right_for_any_shape(shape, n, size):
    x = normal(*shape)
    found = NoiseTunnel(Echo()).attribute(x, "vargrad", n, size, stdevs=0.4)
    assert found.shape == x.shape and (found >= 0).all()
    torch.testing.assert_close(
        found.double(), together(noisy_samples(x, n, stdevs=0.4), "vargrad"), rtol=1e-4, atol=1e-6
    )


def test_the_random_state_is_neither_read_nor_changed(images):
    tunnel = NoiseTunnel(attr.Saliency(net()))
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    found = tunnel.attribute(images, target=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(8)
    assert torch.equal(tunnel.attribute(images, target=1), found)


# ------------------------------------------------------------------------- what belongs to the examples


@pytest.mark.parametrize(
    "target", [2, [0, 5, 1], torch.tensor([0, 5, 1]), np.array([0, 5, 1]), (3,), [(0,), (5,), (1,)]], ids=repr
)
def test_targets_go_with_their_examples(images, target):
    method = attr.Saliency(net(torch.float64))
    x = images.double()
    expected = together([method.attribute(s, target) for s in noisy_samples(x, 5)], "smoothgrad")
    for size in (2, 5):
        assert_equal_to(
            NoiseTunnel(method).attribute(x, nt_samples=5, nt_samples_batch_size=size, target=target),
            expected,
            1e-12,
        )


def test_arguments_and_baselines_go_with_their_examples(images):
    model = net(torch.float64)
    method = IntegratedGradients(lambda x, scale, power, offset: (model(x) * scale).pow(power) + offset)
    x = images.double()
    extra = (torch.tensor([[1.0], [2.0], [-3.0]], dtype=torch.float64), 2, normal(7, dtype=torch.float64))
    for baseline in (0.5, normal(1, 3, 13, 11, dtype=torch.float64), x.flip(0), (x.flip(0),)):
        given = {"baselines": baseline, "additional_forward_args": extra, "target": 1, "n_steps": 4}
        expected = together([method.attribute(s, **given) for s in noisy_samples(x, 4)], "smoothgrad")
        for size in (1, 3, 4):
            found = NoiseTunnel(method).attribute(x, nt_samples=4, nt_samples_batch_size=size, **given)
            assert_equal_to(found, expected, 1e-12)
    echo = Echo()
    mask = torch.arange(6).view(2, 3)
    NoiseTunnel(echo).attribute(normal(2, 3), nt_samples=3, feature_mask=mask, additional_forward_args=None)
    assert torch.equal(echo.calls[0][1]["feature_mask"], torch.cat([mask] * 3))
    assert echo.calls[0][1]["additional_forward_args"] is None and set(echo.calls[0][1]) == {
        "feature_mask", "additional_forward_args"
    }  # fmt: skip


def test_baselines_are_drawn():
    rows = torch.arange(5.0)[:, None].expand(5, 4)
    drawn = {}
    for size in (1, 3, 40):
        echo = Echo()
        NoiseTunnel(echo).attribute(
            (normal(6, 4), normal(6, 2)),
            "smoothgrad",
            40,
            size,
            draw_baseline_from_distrib=True,
            baselines=(rows, 0.5),
        )
        assert all(kwargs["baselines"][1] == 0.5 for _, kwargs in echo.calls)
        drawn[size] = torch.cat([kwargs["baselines"][0] for _, kwargs in echo.calls])
        assert drawn[size].shape == (240, 4)
    assert torch.equal(drawn[1], drawn[3]) and torch.equal(drawn[1], drawn[40])
    assert torch.equal(drawn[1], drawn[1][:, :1].expand(240, 4))
    counts = torch.bincount(drawn[1][:, 0].long(), minlength=5)
    assert len(counts) == 5 and ((counts - 48.0) ** 2 / 48).sum() < 20  # chi-squared, 4 degrees of freedom
    assert (
        len({tuple(one) for one in drawn[1][:, 0].view(40, 6).tolist()}) > 35
    )  # not one row for a whole batch
    with pytest.raises(AssertionError, match=r"\(5, 3\)"):
        NoiseTunnel(Echo()).attribute(
            normal(6, 4), draw_baseline_from_distrib=True, baselines=torch.zeros(5, 3)
        )


def test_several_inputs_have_deviations_of_their_own():
    inputs = (normal(3, 3, 13, 11, dtype=torch.float64), normal(3, 5, seed=6, dtype=torch.float64))
    samples = noisy_samples(inputs, 6, stdevs=(0.0, 2.0))
    assert all(torch.equal(a, inputs[0]) and (b - inputs[1]).abs().min() > 0 for a, b in samples)
    model = Two().double()
    method = attr.Saliency(model)
    expected = [method.attribute(sample, 1) for sample in samples]
    found = NoiseTunnel(method).attribute(inputs, "vargrad", 6, 4, (0.0, 2.0), target=1)
    assert_equal_to(found, tuple(together([e[i] for e in expected], "vargrad") for i in (0, 1)), 1e-10)
    (twice,) = noisy_samples((torch.zeros(2, 3), torch.zeros(2, 3)), 1)
    assert (twice[0] - twice[1]).abs().min() > 0
    assert isinstance(NoiseTunnel(attr.Saliency(net())).attribute((normal(1, 3, 13, 11),), target=1), tuple)


# ---------------------------------------------------------------------------------- deltas, many targets


def test_deltas_of_all_samples_in_captums_order(images):
    method = IntegratedGradients(net(torch.float64))
    tunnel, x = NoiseTunnel(method), images.double()
    assert tunnel.has_convergence_delta() and not NoiseTunnel(attr.Saliency(net())).has_convergence_delta()
    given = {"target": 1, "n_steps": 3, "return_convergence_delta": True}
    each = [method.attribute(s, **given) for s in noisy_samples(x, 5)]
    expected = torch.stack(
        [delta for _, delta in each], 1
    ).flatten()  # an example's samples follow each other
    for size in (None, 1, 2):
        found, delta = tunnel.attribute(x, "smoothgrad", 5, size, **given)
        assert_equal_to(found, together([a for a, _ in each], "smoothgrad"), 1e-12)
        torch.testing.assert_close(delta, expected, rtol=0, atol=1e-12)
    with pytest.raises(TypeError):
        NoiseTunnel(attr.Saliency(net())).attribute(images, target=1, return_convergence_delta=True)


@pytest.mark.parametrize("nt_type", TYPES)
def test_many_targets_pass_under_the_same_noise(images, nt_type):
    method, x = IntegratedGradients(net(torch.float64)), images.double()
    tunnel, targets = NoiseTunnel(method), [3, [0, 1, 6], torch.tensor([5, 5, 0]), (2,)]
    given = {"n_steps": 3, "baselines": x.flip(0), "return_convergence_delta": True}
    found, delta = tunnel.attribute_many(x, targets, nt_type, 5, 2, **given)
    assert found.shape == (4, *x.shape) and delta.shape == (4, 15)
    for k, target in enumerate(targets):
        expected, expected_delta = tunnel.attribute(x, nt_type, 5, target=target, **given)
        assert_equal_to(found[k], expected, 1e-11)
        torch.testing.assert_close(delta[k], expected_delta, rtol=0, atol=1e-12)
    neurons = NoiseTunnel(attr.NeuronGuidedBackprop(net(), "4"))
    found = neurons.attribute_many(images, [(1, 2, 2), (3, slice(0, 2), 1)], nt_type)
    for k, selector in enumerate([(1, 2, 2), (3, slice(0, 2), 1)]):
        assert_equal_to(found[k], neurons.attribute(images, nt_type, neuron_selector=selector), 1e-5)


# ------------------------------------------------------------------------------- what must work, and stay


def test_several_scores_of_an_example_stay_together():
    """Occlusion without a target gives a row for each score: rows of one example's samples must not mix."""
    model = nn.Linear(4, 3)
    method = attr.Occlusion(model)
    x = normal(2, 4)
    expected = together([method.attribute(s, (2,), 2) for s in noisy_samples(x, 4)], "smoothgrad").float()
    found = NoiseTunnel(method).attribute(x, nt_samples=4, sliding_window_shapes=(2,), strides=2)
    assert found.shape == (6, 4)
    assert_equal_to(found, expected, 1e-5)


def test_one_score_for_the_whole_batch_under_noise():
    method = attr.Occlusion(lambda x: x.pow(2).sum())
    given = {"sliding_window_shapes": (1,), "nt_samples": 3}
    with pytest.raises(AssertionError, match="nt_samples_batch_size=1"):
        NoiseTunnel(method).attribute(normal(2, 4), **given)
    found = NoiseTunnel(method).attribute(normal(2, 4), nt_samples_batch_size=1, **given)
    expected = together([(s**2).sum(0, keepdim=True) for s in noisy_samples(normal(2, 4), 3)], "smoothgrad")
    assert_equal_to(found, expected.float(), 1e-5)


def test_reduced_precision_layouts_integers_and_empty_batches(images):
    low = images.bfloat16()
    samples = noisy_samples(low, 200, stdevs=0.5)
    assert samples[0].dtype == torch.bfloat16
    found = NoiseTunnel(Echo()).attribute(low, nt_samples=200, stdevs=0.5)
    assert found.dtype == torch.bfloat16
    # A sum of 200 in bfloat16 would be wrong by far more than one rounding of the result.
    torch.testing.assert_close(found.double(), together(samples, "smoothgrad"), rtol=2**-8, atol=1e-6)
    turned = images.contiguous(memory_format=torch.channels_last)
    tunnel = NoiseTunnel(attr.Saliency(net()))
    found = tunnel.attribute(turned, target=1)
    assert found.is_contiguous(memory_format=torch.channels_last) and not found.is_contiguous()
    assert_equal_to(found, tunnel.attribute(images, target=1), 1e-5)
    assert noisy_samples(torch.tensor([[1, 2]]), 1)[0].dtype == torch.float32
    assert tunnel.attribute(images[:0], target=1).shape == (0, 3, 13, 11)


def test_a_tunnel_in_a_tunnel_draws_its_own_noise() -> None:
    x = torch.zeros(2, 3, 64, 64)
    for samples in (1, 4):
        found = NoiseTunnel(NoiseTunnel(Echo())).attribute(x, nt_samples=samples)
        # The inner tunnel has its 5 samples of deviation 1 for each of the outer one's.
        assert float(found.std()) == pytest.approx((1 / samples + 1 / (5 * samples)) ** 0.5, rel=0.02)
    again = NoiseTunnel(NoiseTunnel(Echo())).attribute(x, nt_samples=4)
    assert torch.equal(found, again)


def test_a_method_that_takes_a_seed_gets_the_tunnels(images: Tensor) -> None:
    rise = attr.RISE(net())
    options = {"nt_samples": 1, "stdevs": 0.0, "n_masks": 30}
    first, same, other = (
        NoiseTunnel(rise).attribute(images, target=1, seed=seed, **options) for seed in (-1, -1, 2)
    )
    assert torch.equal(first, same) and not torch.allclose(first, other)
    many = NoiseTunnel(rise).attribute_many(images, [1, 2], seed=2, **options)
    assert_equal_to(many[0], other)
    assert_equal_to(NoiseTunnel(attr.Saliency(net())).attribute(images, target=1, seed=3, stdevs=0.0),
                    attr.Saliency(net()).attribute(images, 1))  # fmt: skip


def test_inputs_stay_as_they_were(images):
    x = images.clone().requires_grad_()
    tunnel = NoiseTunnel(attr.Saliency(net()))
    with torch.no_grad():
        found = tunnel.attribute(x, target=1)
    assert torch.equal(x, images) and x.grad is None and x.requires_grad and not found.requires_grad
    with pytest.raises(IndexError):
        tunnel.attribute(x, target=7)
    assert torch.equal(x, images) and torch.is_grad_enabled()
    assert NoiseTunnel(attr.InputXGradient(net())).multiplies_by_inputs and not tunnel.multiplies_by_inputs
    assert tunnel.forward_func is tunnel.attribution_method.forward_func


def test_progress_counts_the_samples(images, capsys):
    NoiseTunnel(attr.Saliency(net())).attribute(images, nt_samples=9, target=1, show_progress=True)
    assert "noise tunnel: 9/9 samples" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        ({"nt_type": "grad"}, AssertionError, "'grad'"),
        ({"nt_samples": 0}, ValueError, "nt_samples"),
        ({"nt_samples": None}, ValueError, "nt_samples must be an int of at least 1, but it is None"),
        ({"nt_samples": 2.0}, ValueError, "2.0"),
        ({"nt_samples_batch_size": 0}, ValueError, "nt_samples_batch_size"),
        ({"stdevs": -0.5}, ValueError, "-0.5"),
        ({"stdevs": float("nan")}, ValueError, "nan"),
        ({"stdevs": (1.0, 1.0)}, AssertionError, r"\(1.0, 1.0\)"),
        ({"stdevs": "1"}, TypeError, "'1'"),
        ({"seed": 0.5}, TypeError, "0.5"),
        ({"target": 7}, IndexError, "7"),
    ],
)
def test_wrong_arguments_of_the_tunnel(images, wrong, error, words):
    with pytest.raises(error, match=words):
        NoiseTunnel(attr.Saliency(net())).attribute(images, **{"target": 1, **wrong})


def test_the_tunnel_needs_a_method():
    with pytest.raises(TypeError, match="Linear"):
        NoiseTunnel(nn.Linear(2, 2))


def test_numbers_that_are_not_real() -> None:
    x = torch.ones(2, 3, dtype=torch.complex64)
    for method in (IntegratedGradients(lambda x: x.sum(1)), NoiseTunnel(attr.Saliency(lambda x: x.sum(1)))):
        with pytest.raises(TypeError, match="must hold real numbers, but its dtype is torch.complex64"):
            method.attribute(x)
    with pytest.raises(TypeError, match="The baseline of input 0 must hold real numbers"):
        IntegratedGradients(lambda x: x.sum(1)).attribute(torch.ones(2, 3), baselines=x)
