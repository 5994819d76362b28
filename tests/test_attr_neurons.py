"""The gradient methods of neurons: Captum's, the deconvnet written out, layers that run several times."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from attribution_cases import assert_threads_agree
from gradient_cases import NEURON_METHODS, assert_equal_to, by_captum, net
from torch import nn

import convviz_cuda as cv
from convviz_cuda import attr


@pytest.fixture
def images():
    return torch.randn(4, 3, 21, 18, generator=torch.Generator().manual_seed(1))


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


def test_neurons_in_two_threads_share_a_layer(images):
    model = net()
    method = attr.NeuronDeconvolution(model, "4")
    assert_threads_agree(lambda channel: method.attribute(images, (channel, 1, 1)), 20)
    assert not model[4]._forward_hooks


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
