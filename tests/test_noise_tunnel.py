"""The noise tunnel: equal to loops over the same noise, to closed forms and, in distribution, to Captum's."""

from __future__ import annotations

from typing import Any

import captum.attr
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from path_cases import Two, Watched, assert_equal_to, net, normal, quiet
from torch import Tensor, nn

from convviz_cuda import attr
from convviz_cuda.attr import IntegratedGradients, NoiseTunnel


@pytest.fixture
def images() -> Tensor:
    return normal(3, 3, 13, 11)


TYPES = ("smoothgrad", "smoothgrad_sq", "vargrad")


@pytest.mark.parametrize("nt_type", TYPES)
def test_without_noise_it_is_the_method(images, nt_type):
    method = attr.Saliency(net())
    once = method.attribute(images, 2, abs=False)
    found = NoiseTunnel(method).attribute(images, nt_type, 4, stdevs=0.0, target=2, abs=False)
    if nt_type == "vargrad":
        assert found.abs().max() <= 1e-10 * once.pow(2).max()
    else:
        assert_equal_to(found, once if nt_type == "smoothgrad" else once**2, 1e-6)


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
