"""The gradient methods: equality with Captum where it is right, many targets, targets and inputs."""

from __future__ import annotations

import captum.attr
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attribution_cases import assert_threads_agree
from gradient_cases import METHODS, NEURON_METHODS, assert_equal_to, by_captum, net
from torch import Tensor, nn

import convviz_cuda as cv
from convviz_cuda import attr
from convviz_cuda.models import zfnet


@pytest.fixture
def images():
    return torch.randn(4, 3, 21, 18, generator=torch.Generator().manual_seed(1))


TARGETS = {
    "int": 3,
    "negative": -2,
    "numpy": np.int64(3),
    "scalar tensor": torch.tensor(4),
    "one element": torch.tensor([4]),
    "list": [0, 1, 2, 6],
    "tensor": torch.tensor([5, 1, 0, 6]),
    "tuple": (3,),
    "list of tuples": [(0,), (1,), (2,), (6,)],
}


# ---------------------------------------------------------------------------------------- equal to Captum


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", METHODS)
def test_equals_captum(images, name, target, inplace):
    model, target = net(inplace), TARGETS[target]
    plain = int(target) if isinstance(target, np.integer) else target
    assert_equal_to(
        getattr(attr, name)(model).attribute(images, target),
        by_captum(name, net(False), images.clone(), target=plain).detach(),
    )


@pytest.mark.parametrize("name", METHODS)
def test_equals_captum_in_float64(images, name):
    model, images = net().double(), images.double()
    expected = by_captum(name, model, images.clone(), target=2).detach()
    assert_equal_to(getattr(attr, name)(model).attribute(images, 2), expected, 1e-13)


def test_saliency_abs_is_the_third_argument(images):
    method = attr.Saliency(net())
    signed = method.attribute(images, 1, False)
    assert (signed < 0).any()
    assert torch.equal(method.attribute(images, 1), signed.abs())
    assert_equal_to(signed, by_captum("Saliency", net(), images.clone(), target=1, abs=False))


def test_the_context_equals_the_class(images):
    x = images.clone().requires_grad_()
    with cv.backward_rule("guided"):
        gradient = torch.autograd.grad(net()(x)[:, 1].sum(), x)[0]
    assert_equal_to(attr.GuidedBackprop(net()).attribute(images, 1), gradient)


def test_zfnet_at_full_size():
    """The network of Zeiler & Fergus 2013: contrast normalisation and overlapping pools."""

    torch.manual_seed(0)
    model = zfnet(10).eval()
    x = torch.randn(1, 3, 224, 224)
    assert_equal_to(
        attr.GuidedBackprop(model).attribute(x, 1),
        by_captum("GuidedBackprop", model, x.clone(), target=1),
        1e-5,
    )


# ------------------------------------------------------------------------------- where Captum is wrong


class Functional(nn.Module):
    """Functional ReLUs, as in inception_v3 and googlenet: hooks on modules miss them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.layers = model

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.relu(x) if isinstance(layer, nn.ReLU) else layer(x)
        return x


@pytest.mark.parametrize("name", ["GuidedBackprop", "Deconvolution"])
def test_functional_relus_are_seen(images, name):
    found = getattr(attr, name)(Functional(net())).attribute(images, 2)
    assert_equal_to(found, by_captum(name, net(), images.clone(), target=2))
    gradient = attr.Saliency(net()).attribute(images, 2, abs=False)
    assert (found - gradient).abs().max() > 0.1 * gradient.abs().max()


@pytest.mark.parametrize("name", ["GuidedBackprop", "Deconvolution"])
def test_two_threads_share_a_model(images, name):
    model = net()
    assert_threads_agree(lambda target: getattr(attr, name)(model).attribute(images, target), 20)


# ----------------------------------------------------------------------------------------- attribute_many


@pytest.mark.parametrize("name", METHODS)
def test_many_targets_equal_single_calls(images, name):
    method = getattr(attr, name)(net())
    targets = [3, -1, [0, 1, 2, 6], (5,), torch.tensor([6, 5, 4, 3])]
    expected = torch.stack([method.attribute(images, t) for t in targets])
    for at_once in (None, 1, 2, 5, 100):
        assert_equal_to(method.attribute_many(images, targets, targets_per_pass=at_once), expected)
    assert_equal_to(method.attribute_many(images, torch.tensor([3, 6])), expected[:2])
    assert_equal_to(
        method.attribute_many(images, torch.tensor([[0, 1, 2, 6], [6, 5, 4, 3]])), expected[[2, 4]]
    )
    assert method.attribute_many(images, []).shape == (0, *images.shape)


@pytest.mark.parametrize("name", NEURON_METHODS)
def test_many_neurons_equal_single_calls(images, name):
    method = getattr(attr, name)(net(), "7")
    selectors = [(0, 1, 1), (slice(None), 0, 0), lambda out: out[:, 2].amax((1, 2))]
    expected = torch.stack([method.attribute(images, s) for s in selectors])
    assert_equal_to(method.attribute_many(images, selectors), expected)


def test_many_targets_make_one_forward(images):
    model, runs = net(), []
    handle = model.register_forward_hook(lambda *_: runs.append(1))
    attr.GuidedBackprop(model).attribute_many(images, range(7))
    handle.remove()
    assert len(runs) == 1


def test_many_targets_where_nothing_can_be_batched(images):
    """A custom Function without a batching rule of its own: the passes run one by one, with the same numbers."""

    class Odd(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, signal):
            return signal * (2 if signal.sum().item() == signal.sum().item() else 0)

    model = net()
    method = attr.GuidedBackprop(
        nn.Sequential(model, type("Double", (nn.Module,), {"forward": lambda s, x: Odd.apply(x)})())
    )
    expected = torch.stack([method.attribute(images, t) for t in (1, 4)])
    assert_equal_to(method.attribute_many(images, [1, 4]), expected)


def test_bad_many_arguments(images):
    method = attr.GuidedBackprop(net())
    for bad in (0, -1, 1.5):
        with pytest.raises(ValueError, match="targets_per_pass must be an int"):
            method.attribute_many(images, [1, 2], targets_per_pass=bad)
    for bad in (3, "12", None):
        with pytest.raises(TypeError, match="targets must be a list"):
            method.attribute_many(images, bad)


def test_targets_of_many_are_integers_in_order(images):
    method = attr.Saliency(net())
    assert torch.equal(
        method.attribute(images, np.array([0, 1, 2, 6])), method.attribute(images, [0, 1, 2, 6])
    )
    assert method.attribute_many(images, np.array([[0, 1, 2, 6], [6, 5, 4, 3]])).shape[0] == 2
    for bad in (torch.tensor([1.7, 2.2]), torch.tensor([True, False])):
        with pytest.raises(AssertionError, match="integers"):
            method.attribute_many(images, bad)
    for bad in ({1, 2}, {1: 2}.keys()):
        with pytest.raises(TypeError, match="targets must be a list"):
            method.attribute_many(images, bad)
    with pytest.raises(AssertionError, match="at least one"):
        method.attribute((), 1)
    with pytest.raises(AssertionError, match="must return a tensor"):
        attr.Saliency(lambda x: (x, x)).attribute_many(images, [1])


# ---------------------------------------------------------------------------------------- targets and inputs


class Segments(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 3)
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.head(self.relu(self.conv(x)))


def test_tuple_targets_of_a_segmentation(images):
    for target in ((1, 2, 3), [(0, 1, 1), (1, 2, 2), (2, 3, 3), (4, 5, 5)]):
        for name in METHODS:
            expected = by_captum(name, Segments(), images.clone(), target=target)
            assert_equal_to(getattr(attr, name)(Segments()).attribute(images, target), expected.detach())


def test_no_target_where_each_example_has_one_score(images):
    for forward in (lambda x: net()(x).amax(1), lambda x: net()(x)[:, :1], lambda x: net()(x).sum()):
        expected = images.clone().requires_grad_()
        expected = torch.autograd.grad(forward(expected).sum(), expected)[0]
        assert_equal_to(attr.Saliency(forward).attribute(images, abs=False), expected)


@pytest.mark.parametrize(
    ("target", "error", "text"),
    [
        (None, AssertionError, "Target not provided when necessary"),
        (7, IndexError, "out of"),
        (-8, IndexError, "out of"),
        ([0, 1], AssertionError, "Target list length does not match output!"),
        ([0, 1, 2, 7], IndexError, "out of"),
        (torch.tensor([0, 1]), AssertionError, "not valid"),
        (torch.tensor([[0, 1], [0, 1]]), AssertionError, "not valid"),
        (torch.tensor([0.0, 1, 2, 3]), AssertionError, "integers"),
        ((1, 2), AssertionError, "Cannot choose target column"),
        (1.0, AssertionError, "not valid"),
        ("1", AssertionError, "not valid"),
        (True, AssertionError, "not valid"),
        ([1.0, 2.0, 3.0, 4.0], AssertionError, "ints or tuples"),
    ],
)
@pytest.mark.parametrize("name", METHODS)
def test_bad_targets(images, name, target, error, text):
    model = net()
    with pytest.raises(error, match=text):
        getattr(attr, name)(model).attribute(images, target)
    with pytest.raises(error):
        getattr(attr, name)(model).attribute_many(images, [0, target])
    assert not images.requires_grad


@pytest.mark.parametrize(
    ("selector", "error"),
    [
        ((0, 50, 0), IndexError),
        ((0, 1, 1, 1), AssertionError),
        ("0", AssertionError),
        (0, AssertionError),
        (1.5, AssertionError),
        ((1.0, 2, 2), AssertionError),
        ((torch.tensor(1.5), 2, 2), AssertionError),
        ((True, 2, 2), AssertionError),
    ],
)
def test_bad_selectors(images, selector, error):
    with pytest.raises(error):
        attr.NeuronDeconvolution(net(), "4").attribute(images, selector)


def test_bad_models_layers_and_inputs(images):
    model = net()
    for name in ("GuidedBackprop", "Deconvolution"):
        with pytest.raises(AssertionError, match=r"instance of torch\.nn\.Module"):
            getattr(attr, name)(lambda x: x)
    with pytest.raises(TypeError, match="forward_func must be callable"):
        attr.Saliency(None)
    with pytest.raises(ValueError, match="'conv9'"):
        attr.NeuronDeconvolution(model, "conv9")
    with pytest.raises(AssertionError, match="did not run"):
        attr.NeuronDeconvolution(model, nn.ReLU()).attribute(images, 0)
    with pytest.raises(AssertionError, match="`inputs` must be"):
        attr.Saliency(model).attribute(images.numpy(), 0)
    with pytest.raises(AssertionError, match="`inputs` must be"):
        attr.Saliency(model).attribute([images], 0)
    with pytest.raises(TypeError, match=r"torch\.int64"):
        attr.Saliency(model).attribute(images.long(), 0)


def test_several_inputs_and_additional_arguments(images):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu = nn.ReLU()

        def forward(self, a, b, scale, flag=False):
            return self.relu(a.flatten(1)[:, :5] * scale + (b if flag else -b)).cumsum(1)

    torch.manual_seed(0)
    b, scale = torch.randn(4, 5), torch.rand(4, 1)
    for name in METHODS:
        expected = by_captum(
            name, Two(), (images.clone(), b.clone()), target=2, additional_forward_args=(scale, True)
        )
        found = getattr(attr, name)(Two()).attribute((images, b), 2, additional_forward_args=(scale, True))
        assert isinstance(found, tuple)
        for one, other in zip(found, expected, strict=True):
            assert_equal_to(one, other.detach())
        many = getattr(attr, name)(Two()).attribute_many(
            (images, b), [1, 2], additional_forward_args=(scale, True)
        )
        assert [m.shape for m in many] == [(2, *images.shape), (2, *b.shape)]
        assert_equal_to(many[1][1], expected[1].detach())


def test_facts_that_captums_users_read():
    assert attr.InputXGradient(net()).multiplies_by_inputs
    assert not attr.Saliency(net()).multiplies_by_inputs
    assert not attr.GuidedBackprop(net()).has_convergence_delta()


def test_names_are_captums():
    shared = [name for name in attr.__all__ if hasattr(getattr(captum.attr, name, None), "get_name")]
    assert len(shared) >= 14
    for name in shared:
        assert getattr(attr, name).get_name() == getattr(captum.attr, name).get_name()
    assert attr.NoiseTunnel(attr.Saliency(sum)).get_name() == "Noise Tunnel"
