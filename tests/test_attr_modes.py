"""The gradient methods bear callers' modes and models' habits, and leave everything as it was."""

from __future__ import annotations

import copy
import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from gradient_cases import METHODS, assert_equal_to, net, quiet
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from convviz_cuda import attr


@pytest.fixture
def images():
    return torch.randn(4, 3, 21, 18, generator=torch.Generator().manual_seed(1))


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


def test_a_scripted_part_is_warned_about(images):
    model = net()
    with quiet():
        model[4] = torch.jit.script(nn.Sequential(model[4], nn.ReLU()))
    with pytest.warns(UserWarning, match="does not act on a ReLU"):
        attr.GuidedBackprop(model).attribute(images, 1)
