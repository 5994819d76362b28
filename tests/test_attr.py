"""The gradient methods: equality with Captum where it is right, its targets and errors, and what it lacks."""

from __future__ import annotations

import contextlib
import copy
import random
import threading
import warnings

import captum.attr
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import convviz_cuda as cv
from convviz_cuda import attr
from convviz_cuda.models import zfnet

METHODS = ("Saliency", "InputXGradient", "GuidedBackprop", "Deconvolution")
NEURON_METHODS = ("NeuronGuidedBackprop", "NeuronDeconvolution")


def net(inplace: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace), nn.MaxPool2d(3, 2),
        nn.Conv2d(8, 12, 3), nn.ReLU(inplace), nn.MaxPool2d(2), nn.Conv2d(12, 9, 2), nn.ReLU(inplace),
        nn.Flatten(), nn.Linear(9 * 3 * 2, 7),
    ).eval()  # fmt: skip


@pytest.fixture
def images():
    return torch.randn(4, 3, 21, 18, generator=torch.Generator().manual_seed(1))


@contextlib.contextmanager
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def by_captum(name: str, model: nn.Module, *args, where=None, **kwargs):
    with quiet():
        arguments = () if where is None else (where,)
        return getattr(captum.attr, name)(model, *arguments).attribute(*args, **kwargs)


def assert_equal_to(found: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    """Within ``tolerance`` of the reference's largest value: maps have no absolute scale."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    scale = expected.abs().max().item()
    assert scale > 0
    assert (found - expected).abs().max().item() <= tolerance * scale


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


@pytest.mark.parametrize("layer", ["3", "4", "5", "8"])
@pytest.mark.parametrize("of_input", [False, True])
@pytest.mark.parametrize("name", NEURON_METHODS)
def test_neurons_equal_captum(images, name, layer, of_input):
    model = net()
    for selector in ((2, 1, 1), (slice(0, 3), 1, slice(None)), lambda out: out.amax((1, 2, 3))):
        expected = by_captum(
            name, model, images.clone(), selector, where=model[int(layer)], attribute_to_neuron_input=of_input
        )
        for where in (layer, model[int(layer)]):
            found = getattr(attr, name)(model, where).attribute(
                images, selector, attribute_to_neuron_input=of_input
            )
            assert_equal_to(found, expected)


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
    model, wrong, barrier = net(), [], threading.Barrier(2)
    expected = {t: getattr(attr, name)(model).attribute(images, t) for t in (1, 2)}

    def work(target):
        for _ in range(20):
            barrier.wait()
            if not torch.equal(getattr(attr, name)(model).attribute(images, target), expected[target]):
                wrong.append(target)

    threads = [threading.Thread(target=work, args=(t,)) for t in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_neurons_in_two_threads_share_a_layer(images):
    model, wrong, barrier = net(), [], threading.Barrier(2)
    method = attr.NeuronDeconvolution(model, "4")
    expected = {c: method.attribute(images, (c, 1, 1)) for c in (1, 2)}

    def work(channel):
        for _ in range(20):
            barrier.wait()
            if not torch.equal(method.attribute(images, (channel, 1, 1)), expected[channel]):
                wrong.append(channel)

    threads = [threading.Thread(target=work, args=(c,)) for c in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not model[4]._forward_hooks


# -------------------------------------------------------------------------------- the deconvnet, explicitly


@pytest.mark.parametrize(("kernel", "stride"), [(2, 2), (3, 2)])
def test_neuron_deconvolution_is_the_papers_deconvnet(kernel, stride):
    """Unpool through the switches, rectify, filter with the transposed weights; down to the pixels."""
    torch.manual_seed(0)
    conv1, conv2 = nn.Conv2d(3, 5, 5, stride=2, padding=1).double(), nn.Conv2d(5, 4, 3, padding=1).double()
    model = nn.Sequential(conv1, nn.ReLU(), nn.MaxPool2d(kernel, stride), conv2, nn.ReLU())
    x = torch.randn(2, 3, 29, 27, dtype=torch.float64)

    h1 = F.relu(conv1(x))
    pooled, switches = F.max_pool2d(h1, kernel, stride, return_indices=True)
    top = F.relu(conv2(pooled))
    channel, row, column = 1, 2, 3
    signal = torch.zeros_like(top)
    signal[:, channel, row, column] = 1.0
    signal = F.conv_transpose2d(F.relu(signal), conv2.weight, padding=1)
    # Windows may share a maximum: their signals are summed, as scatter_add does.
    unpooled = (
        torch.zeros_like(h1).flatten(2).scatter_add(2, switches.flatten(2), signal.flatten(2)).view(h1.shape)
    )
    rows = (x.shape[2] + 2 - 5) % 2, (x.shape[3] + 2 - 5) % 2
    expected = F.conv_transpose2d(F.relu(unpooled), conv1.weight, stride=2, padding=1, output_padding=rows)

    found = attr.NeuronDeconvolution(model, model[4]).attribute(x, (channel, row, column))
    torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=1e-12)


def test_the_forward_stops_at_the_layer(images):
    class Bomb(nn.Module):
        def forward(self, x):
            raise AssertionError("the forward went on behind the layer")

    whole = net()
    model = nn.Sequential(nn.Sequential(*whole[:3]), nn.Sequential(*whole[3:5], Bomb()), *whole[5:]).eval()
    for of_input in (False, True):
        expected = attr.NeuronGuidedBackprop(whole, whole[4]).attribute(
            images, (0, 1, 1), attribute_to_neuron_input=of_input
        )
        found = attr.NeuronGuidedBackprop(model, "1.1").attribute(
            images, (0, 1, 1), attribute_to_neuron_input=of_input
        )
        assert torch.equal(found, expected)


class Loop(nn.Module):
    """Runs its convolution a number of times: ``runs``, or by the data three times or once."""

    def __init__(self, runs: int | None):
        super().__init__()
        torch.manual_seed(0)
        self.runs, self.conv = runs, nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        for _ in range(self.runs or (3 if x.detach().mean() > 0 else 1)):
            x = self.conv(x)
        return x.mean((2, 3))


@pytest.mark.parametrize("name", NEURON_METHODS)
def test_the_last_run_counts_whatever_it_depends_on(images, name):
    def thrice(model, x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(model.conv(model.conv(model.conv(x)))[:, 0, 3, 3].sum(), x)[0]

    model = Loop(1).eval()
    method = getattr(attr, name)(model, "conv")
    method.attribute(images, (0, 3, 3))
    model.runs = 3
    assert_equal_to(method.attribute(images, (0, 3, 3)), thrice(model, images))
    by_data = Loop(None).eval()
    x = torch.cat([images[:1] - 9, images[1:] + 20])
    assert_equal_to(getattr(attr, name)(by_data, "conv").attribute(x, (0, 3, 3)), thrice(by_data, x))


@pytest.mark.parametrize("name", NEURON_METHODS)
def test_forwards_stop_at_the_layer_once_its_last_run_is_known(images, name):
    behind = []
    model = Loop(2).eval()
    head = nn.Linear(3, 2)
    head.register_forward_hook(lambda *_: behind.append(1))
    model.forward = lambda x: head(Loop.forward(model, x))
    method = getattr(attr, name)(model, "conv")
    first = method.attribute(images, (0, 3, 3))
    assert len(behind) == 1
    for changed, runs in ((images, 1), (-images, 1), (images[:2], 2), (images[:2], 2)):
        found = method.attribute(changed, (0, 3, 3))
        assert_equal_to(found, getattr(attr, name)(Loop(2).eval(), "conv").attribute(changed, (0, 3, 3)))
        assert len(behind) == runs
    model.runs = 1  # another network
    assert not torch.allclose(method.attribute(images, (0, 3, 3)), first) and len(behind) == 3
    method.attribute(images, (0, 3, 3))
    assert len(behind) == 3


@pytest.mark.parametrize(
    "look",
    [
        lambda x: bool(x.mean() > 0), lambda x: x.mean().item() > 0, lambda x: x.detach().mean().numpy() > 0,
        lambda x: x.mean().tolist() > 0, lambda x: float(x.mean()) > 0, lambda x: not torch.equal(x, -x.abs()),
        lambda x: 1.0 in (x > 0).float(),
    ],
)  # fmt: skip
def test_forwards_never_stop_early_where_code_looks_at_values(images, look):
    behind = []
    model = Loop(1).eval()

    def forward(x):
        model.runs = 3 if look(x) else 1
        behind.append(model.runs)
        x = Loop.forward(model, x)
        behind.append("end")
        return x

    model.forward = forward
    method = attr.NeuronGuidedBackprop(model, "conv")
    for x in (-images.abs() - 1, images.abs() + 1, -images.abs() - 1, images.abs() + 1):
        model.runs = 1
        found = method.attribute(x, (0, 3, 3))
        fresh = attr.NeuronGuidedBackprop(Loop(3 if x.mean() > 0 else 1).eval(), "conv")
        assert_equal_to(found, fresh.attribute(x, (0, 3, 3)))
    assert behind == [1, "end", 3, "end", 1, "end", 3, "end"]


def test_a_layer_in_two_places_of_a_sequential(images):
    conv = nn.Conv2d(3, 3, 3)
    model = nn.Sequential(conv, nn.ReLU(), nn.Sequential(nn.Identity(), conv), nn.Softplus()).eval()
    x = images.clone().requires_grad_()
    expected = torch.autograd.grad(conv(conv(x).relu())[:, 1, 2, 2].sum(), x)[0]
    rule = cv.backward_rule("gradient")
    method = attr.NeuronGuidedBackprop(model, conv)
    method._context = lambda: rule
    assert_equal_to(method.attribute(images, (1, 2, 2)), expected)


def test_hooks_see_one_forward_of_the_whole_batch(images):
    sizes = []
    model = Loop(2).eval()
    model.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    attr.NeuronGuidedBackprop(model, "conv").attribute(images, (0, 1, 1))
    assert sizes == [4]


def test_of_a_layer_used_twice_the_last_run_counts(images):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.shared, self.relu = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.ReLU()

        def last(self, x, layer):
            x = self.shared(self.relu(self.shared(self.relu(self.first(x)))))
            return self.relu(x) if layer is self.relu else x

        def forward(self, x):
            return self.last(x, self.relu).mean((2, 3))

    torch.manual_seed(0)
    model = Twice().eval()
    for layer in (model.shared, model.relu):
        for name in NEURON_METHODS:
            x = images.clone().requires_grad_()
            with cv.backward_rule(getattr(attr, name).rule):
                expected = torch.autograd.grad(model.last(x, layer)[:, 1, 2:6, 2:6].sum(), x)[0]
            found = getattr(attr, name)(model, layer).attribute(images, (1, slice(2, 6), slice(2, 6)))
            assert_equal_to(found, expected)


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


# -------------------------------------------------------------------------------------- modes and cleanliness


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", METHODS)
def test_results_look_like_the_inputs(images, name, dtype, layout):
    x = images.to(dtype).contiguous(memory_format=layout)
    found = getattr(attr, name)(net().to(dtype)).attribute(x, 1)
    assert (found.shape, found.dtype, found.stride()) == (x.shape, x.dtype, x.stride())
    assert not found.requires_grad


@pytest.mark.parametrize("name", METHODS)
def test_callers_modes(images, name):
    model = net()
    expected = getattr(attr, name)(model).attribute(images, 1)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        assert torch.equal(getattr(attr, name)(model).attribute(images, 1), expected)
    with torch.inference_mode():
        made_inside = images.clone()
        with pytest.raises(RuntimeError, match="inference_mode"):
            getattr(attr, name)(model).attribute(images, 1)
    assert torch.equal(getattr(attr, name)(model).attribute(made_inside, 1), expected)
    with torch.autocast("cpu", torch.bfloat16):
        low = getattr(attr, name)(model).attribute(images, 1)
    assert low.dtype == torch.float32
    assert F.cosine_similarity(low.flatten(), expected.flatten(), 0) > 0.95


@pytest.mark.parametrize("name", METHODS)
def test_a_model_that_views(images, name):
    """LeNet's ``x.view(n, -1)`` must survive that images are turned to channels_last inside."""

    class Viewing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = net()

        def forward(self, x):
            x = self.layers[:9](x)
            return self.layers[10](x.view(x.size(0), -1))

    assert_equal_to(
        getattr(attr, name)(Viewing()).attribute(images, 1),
        getattr(attr, name)(net()).attribute(images, 1),
        1e-6,
    )


@pytest.mark.parametrize("name", METHODS)
def test_nothing_is_left_behind(images, name):
    model = net()
    before = copy.deepcopy(model.state_dict())
    x = images.clone()
    getattr(attr, name)(model).attribute(x, 1)

    class Broken(nn.Module):
        def forward(self, x):
            F.relu(x)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        getattr(attr, name)(Broken()).attribute(x, 1)
    assert torch.equal(x, images) and not x.requires_grad and x.grad is None
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._backward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not torch.overrides._get_current_function_mode_stack()


def test_no_warnings_without_a_reason(images):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in METHODS:
            getattr(attr, name)(net()).attribute(images, 1)
        attr.NeuronGuidedBackprop(net(), "0").attribute(images, (0, 1, 1))


def test_a_scripted_model_is_warned_about(images):
    with quiet():
        scripted = torch.jit.script(net())
    with pytest.warns(UserWarning, match="does not act on a ReLU"):
        attr.GuidedBackprop(scripted).attribute(images, 1)


def test_empty_batches(images):
    for name in METHODS:
        assert getattr(attr, name)(net()).attribute(images[:0], 1).shape == (0, 3, 21, 18)


def test_facts_that_captums_users_read():
    assert attr.InputXGradient(net()).multiplies_by_inputs
    assert not attr.Saliency(net()).multiplies_by_inputs
    assert not attr.GuidedBackprop(net()).has_convergence_delta()


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


def test_additional_arguments_may_change_how_often_a_layer_runs(images):
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(inplace=True)

        def forward(self, x, times):
            for _ in range(times):
                x = self.relu(self.conv(x))
            return x

    torch.manual_seed(0)
    model = Loop().eval()
    method = attr.NeuronGuidedBackprop(model, "conv")
    for times in (1, 3, 1):
        fresh = attr.NeuronGuidedBackprop(model, "conv").attribute(
            images, (1, slice(4, 9), slice(4, 9)), times
        )
        assert torch.equal(method.attribute(images, (1, slice(4, 9), slice(4, 9)), times), fresh)


@pytest.mark.parametrize("name", NEURON_METHODS)
def test_an_in_place_relu_behind_the_layer_changes_no_neuron(images, name):
    model = nn.Sequential(*[m for m in net(inplace=True) if not isinstance(m, nn.BatchNorm2d)])
    expected = getattr(attr, name)(model.eval(), "3").attribute(images, lambda out: out.flatten(1).sum(1))
    found = getattr(attr, name)(model.train(), "3").attribute(images, lambda out: out.flatten(1).sum(1))
    assert_equal_to(found, expected)
    assert (model[3](F.max_pool2d(model[0](images).relu(), 3, 2)) < 0).any()


def test_an_in_place_relu_on_the_input(images):
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(3 * 21 * 18, 2))
    for x in (images.clone(), images.clone().contiguous(memory_format=torch.channels_last), images.double()):
        before = x.clone()
        model.to(x.dtype)
        found = attr.GuidedBackprop(model).attribute(x, 1)
        assert torch.equal(x, before)
        expected = model[2].weight[1].view(3, 21, 18).clamp(min=0) * (x > 0)
        assert_equal_to(found, expected.detach())


@pytest.mark.parametrize("name", METHODS)
def test_a_subclass_of_tensor(images, name):
    class Subclass(torch.Tensor):
        pass

    model = net(inplace=True)
    expected = getattr(attr, name)(model).attribute(images, 1)
    found = getattr(attr, name)(model).attribute(images.as_subclass(Subclass), 1)
    assert_equal_to(found.as_subclass(torch.Tensor), expected)


def test_models_that_read_the_memory_layout(images):
    class Strided(nn.Module):
        def forward(self, x):
            return F.softplus(x.as_strided((4, 1134), (1134, 1)) * torch.arange(1134) * 0.01)[:, :400].cumsum(
                1
            )

    class EditedView(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            y = self.conv(x)
            y.view(4, -1).mul_(3)
            return F.softplus(y).flatten(1).view_as(torch.empty(4, 4 * 19 * 16))

    for model in (Strided(), EditedView()):
        x = images.clone().requires_grad_()
        expected = torch.autograd.grad(model(x)[:, 300].sum(), x)[0]
        method = attr.Saliency(model)
        for _ in range(2):
            assert_equal_to(method.attribute(images, 300, abs=False), expected)


def test_a_forward_that_fails_in_our_layout_leaves_nothing(images):
    """The second run draws the same numbers and finds the arguments and buffers that the first one found."""

    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3 * 21 * 18, 5)
            self.register_buffer("runs", torch.zeros(()))
            self.register_buffer("assigned", torch.zeros(()))

        def forward(self, x, factor):
            self.runs += 1
            self.assigned = self.assigned + 1
            factor += 1
            noisy = F.relu(x + torch.randn_like(x) + self.runs + self.assigned)
            return self.linear(noisy.view(len(x), -1)) * factor

    torch.manual_seed(0)
    model = Changing().eval()
    factor = torch.ones(4, 1)
    torch.manual_seed(5)
    noise = torch.randn_like(images)
    after = torch.get_rng_state()
    method = attr.Saliency(model)
    for run in (1, 2):
        torch.manual_seed(5)
        found = method.attribute(images, 1, False, factor)
        assert torch.equal(torch.get_rng_state(), after)
        weight = model.linear.weight[1].detach().view(3, 21, 18)
        assert_equal_to(found, 2 * weight * (images + noise + 2 * run > 0))
        assert model.runs == run and model.assigned == run and torch.equal(factor, torch.ones(4, 1))


class Reading(nn.Module):
    """Draws, then views its input as the caller's layout alone allows."""

    def __init__(self, draw):
        super().__init__()
        self.draw = draw
        self.linear = nn.Linear(3 * 21 * 18, 5)

    def forward(self, x):
        return self.linear((x + self.draw()).relu().view(len(x), -1))


def test_a_second_run_draws_pythons_numbers_again(images):
    model = Reading(random.random).eval()
    random.seed(3)
    noise, after = random.random(), random.getstate()
    random.seed(3)
    found = attr.Saliency(model).attribute(images, 1, False)
    assert random.getstate() == after
    weight = model.linear.weight[1].detach().view(3, 21, 18)
    assert_equal_to(found, weight * (images + noise > 0))


def test_a_second_run_draws_a_gpus_numbers_again(images, monkeypatch):
    """The model holds a parameter on a GPU, which is counted on where there is none: draws so far are its state."""
    drawn = {torch.device("cuda", 1): 0, torch.device("cuda", 0): 0}

    def draw():
        for device in drawn:
            drawn[device] += 1
        return drawn[torch.device("cuda", 1)]

    model = Reading(draw).eval()
    with FakeTensorMode():
        model.scale = nn.Parameter(torch.empty(3, device="cuda:1"))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_rng_state", drawn.__getitem__)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: drawn.update({device: state}))
    found = attr.Saliency(model).attribute(images, 1, False)
    assert list(drawn.values()) == [1, 2]  # a GPU on which the model has nothing is left alone
    weight = model.linear.weight[1].detach().view(3, 21, 18)
    assert_equal_to(found, weight * (images + 1 > 0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_second_run_draws_the_numbers_of_a_real_gpu_again(images):
    model = Reading(lambda: torch.rand((), device="cuda").cpu()).eval()
    model.register_buffer("place", torch.zeros(1, device="cuda"))
    torch.cuda.manual_seed(3)
    noise, after = torch.rand((), device="cuda").cpu(), torch.cuda.get_rng_state()
    torch.cuda.manual_seed(3)
    found = attr.Saliency(model).attribute(images, 1, False)
    assert torch.equal(torch.cuda.get_rng_state(), after)
    weight = model.linear.weight[1].detach().view(3, 21, 18)
    assert_equal_to(found, weight * (images + noise > 0))


def test_buffers_that_have_no_shape_yet(images):
    model = nn.Sequential(nn.LazyBatchNorm2d(), nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten()).eval()
    found = attr.Saliency(model).attribute(images, 5, False)
    x = images.clone().requires_grad_()
    assert_equal_to(found, torch.autograd.grad(model(x)[:, 5].sum(), x)[0])


def test_additional_arguments_stay_as_they_were(images):
    class Adding(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x, more):
            return (self.conv(x).relu() * more["factor"].add_(1)).mean((2, 3))

    model = Adding().eval()
    more = {"factor": torch.ones(4, 1, 1, 1)}
    for method in (
        attr.Saliency(model),
        attr.NeuronGuidedBackprop(model, "conv"),
        attr.LayerGradCam(model, "conv"),
        attr.LayerActivation(model, "conv"),
        attr.GuidedGradCam(model, "conv"),
    ):
        options = {} if isinstance(method, attr.LayerActivation) else {"neuron_selector": (1, 2, 3)}
        if not isinstance(method, attr.LayerActivation | attr.NeuronGuidedBackprop):
            options = {"target": 1}
        for x in (images, images.double()):
            model.to(x.dtype)
            method.attribute(x, additional_forward_args=more, **options)
            assert torch.equal(more["factor"], torch.ones(4, 1, 1, 1))


def test_results_are_the_callers_own(images):
    kept = []
    model = net()
    model[0].register_full_backward_hook(lambda module, below, above: kept.append(below[0]))
    x = images.double()
    model.double()
    attr.Saliency(model).attribute(x, 1)
    assert (kept[0] < 0).any()
    one, other = attr.Saliency(lambda a, b: (a + b).flatten(1)).attribute((x, x.clone()), 1, abs=False)
    one.zero_()
    assert other.abs().sum() > 0


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


def test_a_scripted_part_is_warned_about(images):
    model = net()
    with quiet():
        model[4] = torch.jit.script(nn.Sequential(model[4], nn.ReLU()))
    with pytest.warns(UserWarning, match="does not act on a ReLU"):
        attr.GuidedBackprop(model).attribute(images, 1)


def test_names_are_captums():
    shared = [name for name in attr.__all__ if hasattr(getattr(captum.attr, name, None), "get_name")]
    assert len(shared) >= 14
    for name in shared:
        assert getattr(attr, name).get_name() == getattr(captum.attr, name).get_name()
    assert attr.NoiseTunnel(attr.Saliency(sum)).get_name() == "Noise Tunnel"
