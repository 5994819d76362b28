"""Integrated gradients: equal to Captum's, to closed forms and to sums written out."""

from __future__ import annotations

import copy
from typing import Any

import captum.attr
import numpy as np
import pytest
import torch
from attribution_cases import assert_threads_agree
from hypothesis import given, settings
from hypothesis import strategies as st
from path_cases import Two, Watched, assert_equal_to, net, normal, quiet
from torch import Tensor, nn

from convviz_cuda.attr import IntegratedGradients
from convviz_cuda.attr.integrated_gradients import METHODS


@pytest.fixture
def images() -> Tensor:
    return normal(3, 3, 13, 11)


def by_captum(function: Any, *args: Any, multiply_by_inputs: bool = True, **kwargs: Any) -> Any:
    with quiet():
        return captum.attr.IntegratedGradients(function, multiply_by_inputs).attribute(*args, **kwargs)


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


def test_the_methods_are_captums():
    assert set(METHODS) == set(RULES)
    assert sorted(METHODS) == sorted(captum.attr._utils.approximation_methods.SUPPORTED_METHODS)


def written_out(model, x: Tensor, baseline: Tensor, columns: list[int], method: str, n: int) -> Tensor:
    """The mean gradient in float64 by plain autograd, one point at a time, times the difference."""
    model, x, baseline = copy.deepcopy(model).double(), x.double(), baseline.double()
    total = torch.zeros_like(x)
    for alpha, weight in zip(*RULES[method](n), strict=True):
        point = (baseline + alpha * (x - baseline)).requires_grad_()
        score = model(point)[range(len(x)), columns].sum()
        total += weight * torch.autograd.grad(score, point)[0]
    return total * (x - baseline)


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
    method = IntegratedGradients(net())
    assert_threads_agree(lambda target: method.attribute(images, target=target, n_steps=4), 10)


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
