"""Excitation backprop of whole networks against the paper's formula in loops: its sums, its contrast, many targets."""

from __future__ import annotations

import copy

import excitation_truth as truth
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from excitation_cases import NETS, Residual, check, net, normal, uniform
from squeezenet import squeezenet1_0
from torch import Tensor, nn

import convviz_cuda as cv
from convviz_cuda import attr, excitation, scenes
from convviz_cuda.models import preprocess, zfnet_mini

# What would hide a fault: warnings of unknown operations. The tests that expect one say so.
pytestmark = pytest.mark.filterwarnings("error:The rule 'excitation':UserWarning")


# ------------------------------------------------------------------------------------------------ whole networks


def test_a_network_by_the_formula():
    """Convolution of an image with signs, norm, ReLU, overlapping pools, two branches, their sum, average, linear."""
    model = net(Residual, positive=False)
    x, target = normal(1, 3, 6, 6), 2
    maps = {}
    h = model.stem(x)
    maps["pool"] = model.pool(F.relu(model.norm(h)))
    maps["norm1"] = F.relu(model.norm1(model.conv1(maps["pool"])))
    maps["norm2"] = model.norm2(model.conv2(maps["norm1"]))
    maps["relu"] = F.relu(maps["norm2"] + maps["pool"])
    maps["norm3"], maps["shortcut"] = model.norm3(model.conv3(maps["relu"])), model.shortcut(maps["relu"])
    maps["sum"] = F.relu(maps["norm3"] + maps["shortcut"])
    v = {name: value[0].detach().numpy() for name, value in maps.items()}
    first = F.relu(model.norm(h))[0].detach().numpy()

    def conv(layer, norm, size):
        weight = (layer.weight * norm.weight.sign().view(-1, 1, 1, 1)).detach().numpy()
        return truth.conv_matrix(weight, size, layer.stride, layer.padding, (1, 1), 1)[0]

    seed = np.zeros(5)
    seed[target] = 1
    averages = v["sum"].mean((1, 2))
    p = truth.share(model.head.weight.detach().numpy(), averages, seed)
    p = truth.share(truth.windows_matrix(8, (2, 2), [[range(2)], [range(2)]])[0], v["sum"], p)
    expected = {"sum": p}
    long, short = truth.add_down(v["norm3"], v["shortcut"], p)
    expected["norm3"], expected["shortcut"] = long, short
    p = truth.share(conv(model.conv3, model.norm3, (3, 3)), v["relu"], long)
    p += truth.share(conv(model.shortcut[0], model.shortcut[1], (3, 3)), v["relu"], short)
    long, skip = truth.add_down(v["norm2"], v["pool"], p)
    expected["norm2"] = long
    expected["norm1"] = truth.share(conv(model.conv2, model.norm2, (3, 3)), v["norm1"], long)
    p = skip + truth.share(conv(model.conv1, model.norm1, (3, 3)), v["pool"], expected["norm1"])
    expected["pool"] = p
    padded = np.pad(first, ((0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    expected["norm"] = truth.max_pool_down(padded, p, 3, 2)[:, 1:-1, 1:-1]
    expected["stem"] = expected["norm"]
    image = truth.share(conv(model.stem, model.norm, (6, 6)), x[0].numpy(), expected["norm"], signed=True)

    for name, value in expected.items():
        found = attr.ExcitationBackprop(model, name).attribute(x, target, sum_channels=False)
        check(found[0], value)
        summed = attr.ExcitationBackprop(model, name).attribute(x, target)
        check(summed[0, 0], value.sum(0))
    check(attr.ExcitationBackprop(model).attribute(x, target, sum_channels=False)[0], image)
    assert 0 < expected["shortcut"].sum() < expected["sum"].sum()


@pytest.mark.parametrize("kind", NETS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("contrastive", [False, True])
def test_sums_are_preserved(kind, contrastive):
    model = net(kind)
    x = uniform(3, 3, 20, 18)
    for layer in (None, *NETS[kind]):
        found = attr.ExcitationBackprop(model, layer).attribute(x, [0, 3, 4], contrastive=contrastive)
        total = found.flatten(1).sum(1)
        torch.testing.assert_close(
            total, torch.full((3,), 0.0 if contrastive else 1.0, dtype=x.dtype), atol=1e-9, rtol=0
        )
        if contrastive:
            every = attr.ExcitationBackprop(model, layer).attribute(
                x, [0, 3, 4], contrastive=True, sum_channels=False
            )
            assert every.amin((1, 2, 3)).max() < -1e-4 and every.amax((1, 2, 3)).min() > 1e-4
        else:
            assert found.min() >= 0


@pytest.fixture(scope="module")
def scene() -> Tensor:
    return preprocess(scenes.batch(3, seed=3)[0])


@pytest.mark.parametrize("contrastive", [False, True])
def test_sums_are_preserved_in_zfnet_mini(scene, contrastive):
    model = zfnet_mini()
    target = model(scene).argmax(1).tolist()
    for layer in (None, "conv1", "pool1", "norm1", "conv3", "pool5", "fc6", "relu7"):
        found = attr.ExcitationBackprop(model, layer).attribute(scene, target, contrastive=contrastive)
        wanted = torch.full((len(scene),), 0.0 if contrastive else 1.0)
        torch.testing.assert_close(found.flatten(1).sum(1), wanted, atol=1e-4, rtol=0)
    assert (attr.ExcitationBackprop(model, "pool1").attribute(scene, target) >= 0).all()


def test_squeezenets_class_whose_map_is_dead_has_no_share():
    torch.manual_seed(0)
    model, x = squeezenet1_0(), normal(2, 3, 64, 64, dtype=torch.float32)
    scores = model(x)
    dead, best = int(scores.sum(0).argmin()), int(scores.amin(0).argmax())
    assert (scores[:, dead] == 0).all() and (scores[:, best] > 0).all()
    method = attr.ExcitationBackprop(model, "features.5")
    assert method.attribute(x, dead).abs().max() == 0
    # Biases of the random network lift a few units that nothing excites.
    torch.testing.assert_close(method.attribute(x, best).flatten(1).sum(1), torch.ones(2), atol=1e-2, rtol=0)


def test_several_inputs_and_additional_arguments():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.one, self.two, self.head = nn.Conv2d(3, 4, 3), nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, image, vector, scale, flag=False):
            a = F.relu(self.one(image)).mean((2, 3))
            return self.head((a * scale) + F.relu(self.two(vector)) if flag else a)

    model, image, vector = Two().double(), uniform(2, 3, 5, 5), uniform(2, 5, seed=1)
    found = attr.ExcitationBackprop(model).attribute((image, vector), 2, additional_forward_args=(0.5, True))
    assert isinstance(found, tuple) and [f.shape for f in found] == [(2, 1, 5, 5), (2, 5)]
    torch.testing.assert_close(sum(f.flatten(1).sum(1) for f in found), torch.ones(2, dtype=torch.float64))
    assert all(f.abs().max() > 0 for f in found)
    many = attr.ExcitationBackprop(model).attribute_many((image, vector), [0, 2], (0.5, True))
    assert [m.shape for m in many] == [(2, 2, 1, 5, 5), (2, 2, 5)]
    torch.testing.assert_close(many[0][1], found[0])


def test_of_a_layer_used_twice_the_last_run_counts():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.shared, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 3)

        def forward(self, x):
            x = F.relu(self.shared(F.relu(self.first(x))))
            return self.head(F.relu(self.shared(x)).mean((2, 3)))

    model, x = Twice().double(), uniform(2, 3, 10, 10)
    with torch.no_grad():  # no class without excitation
        model.head.weight.abs_()
    found = attr.ExcitationBackprop(model, "shared").attribute(x, 1)
    assert (
        found.shape == (2, 1, 4, 4) and attr.ExcitationBackprop(model, "first").attribute(x, 1).shape[-1] == 8
    )
    torch.testing.assert_close(found.flatten(1).sum(1), torch.ones(2, dtype=torch.float64))


def test_a_layer_in_front_of_all_reads_the_image():
    model, x = nn.Sequential(nn.Identity(), net(Residual)), normal(2, 3, 12, 12)
    torch.testing.assert_close(
        attr.ExcitationBackprop(model, "0").attribute(x, 1), attr.ExcitationBackprop(model[1]).attribute(x, 1)
    )


def test_auto_is_the_last_layer_with_maps() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    ).double()
    x = torch.rand(2, 3, 6, 6, dtype=torch.float64)
    found = attr.ExcitationBackprop(model, "auto").attribute(x, 1)
    assert torch.equal(found, attr.ExcitationBackprop(model, "1").attribute(x, 1)) and found.shape == (
        2,
        1,
        4,
        4,
    )


# ---------------------------------------------------------------------------------------------------- contrast


@pytest.mark.parametrize("kind", NETS, ids=lambda kind: kind.__name__)
def test_contrast_is_the_difference_of_two_passes(kind):
    model, x = net(kind), uniform(2, 3, 14, 14)
    dual = copy.deepcopy(model)
    with torch.no_grad():
        dual.head.weight.neg_()
    for layer in (None, *NETS[kind]):
        one, other = (
            attr.ExcitationBackprop(m, layer).attribute(x, [1, 4], sum_channels=False) for m in (model, dual)
        )
        for contrast_layer in (None, "head", model.head):
            found = attr.ExcitationBackprop(model, layer).attribute(
                x, [1, 4], contrastive=True, contrast_layer=contrast_layer, sum_channels=False
            )
            torch.testing.assert_close(found, one - other, rtol=1e-9, atol=1e-12)
            assert found.abs().max() > 1e-3


def test_contrast_below_a_linear_layer_by_hand():
    head = nn.Linear(4, 3).double()
    model = nn.Sequential(nn.Conv2d(3, 4, 1).double(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    x = uniform(1, 3, 5, 5)
    a, w = model[:4](x)[0].detach(), head.weight[1].detach()
    expected = (
        a * w.clamp(min=0) / (a * w.clamp(min=0)).sum() - a * w.clamp(max=0) / (a * w.clamp(max=0)).sum()
    )
    found = attr.ExcitationBackprop(model, "3").attribute(x, 1, contrastive=True)
    torch.testing.assert_close(found[0], expected)
    assert found.shape == (1, 4)


def test_a_contrast_layer_in_the_middle():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Sequential(nn.Conv2d(6, 6, 3), nn.ReLU(inplace=True)), nn.Flatten(),
        nn.Linear(6 * 16, 4),
    ).double()  # fmt: skip
    x, dual = uniform(2, 3, 8, 8), copy.deepcopy(model)
    with torch.no_grad():
        dual[2][0].weight.neg_()
    # The negated weights change no value above but in the copy: P there is handed to it.
    above = attr.ExcitationBackprop(model, "2").attribute(x, 1, sum_channels=False)
    passes = []
    for m in (model, dual):
        with cv.backward_rule("excitation"):
            leaf = x.clone().requires_grad_()
            h = m[0](leaf)
            passes.append(torch.autograd.grad(m[2][0](F.relu(h)), h, above)[0].sum(1, keepdim=True))
    found = attr.ExcitationBackprop(model, "0").attribute(x, 1, contrastive=True, contrast_layer="2")
    torch.testing.assert_close(found, passes[0] - passes[1])
    last = attr.ExcitationBackprop(model, "0").attribute(x, 1, contrastive=True)
    assert (found - last).abs().max() > 1e-4


def test_auto_of_a_contrastive_pass_is_below_the_negated_weights() -> None:
    torch.manual_seed(0)
    linear = nn.Sequential(
        nn.Conv2d(3, 9, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, 3)
    ).double()
    squeeze = nn.Sequential(  # as SqueezeNet ends: below the 1x1 convolution all is 0, down to the 3x3 one
        nn.Conv2d(3, 9, 3), nn.ReLU(), nn.Conv2d(9, 9, 3), nn.ReLU(), nn.Dropout(), nn.Conv2d(9, 3, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    ).double().eval()  # fmt: skip
    x = uniform(2, 3, 9, 9)
    with torch.no_grad():
        for model in (linear, squeeze):  # units that have both kinds of weights, and are excited
            for layer in model:
                if isinstance(layer, nn.Conv2d | nn.Linear):
                    layer.weight.add_(0.1)
                    layer.bias.zero_()
    for model, name in ((linear, "1"), (squeeze, "1")):
        auto = attr.ExcitationBackprop(model, "auto")
        found = auto.attribute(x, 1, contrastive=True)
        assert torch.equal(found, attr.ExcitationBackprop(model, name).attribute(x, 1, contrastive=True))
        torch.testing.assert_close(found.sum((1, 2, 3)), torch.zeros(2).double(), atol=1e-12, rtol=0)
        assert found.flatten(1).abs().amax(1).min() > 1e-3
        many = auto.attribute_many(x, [0, 1], contrastive=True)
        torch.testing.assert_close(many[1], found)
    for name in ("3", "4"):
        zero = attr.ExcitationBackprop(squeeze, name).attribute(x, 1, contrastive=True)
        assert zero.abs().max() < 1e-12
    # A layer above: below its own weights.
    found = attr.ExcitationBackprop(squeeze, "auto").attribute(x, 1, contrastive=True, contrast_layer="2")
    same = attr.ExcitationBackprop(squeeze, "1").attribute(x, 1, contrastive=True, contrast_layer="2")
    assert torch.equal(found, same)
    with pytest.raises(ValueError, match="finds no layer that gives maps .* below the weights"):
        attr.ExcitationBackprop(squeeze, "auto").attribute(x, 1, contrastive=True, contrast_layer="0")


def test_a_contrast_that_cannot_show_is_refused() -> None:
    """Above the negated weights both passes are one: nothing would be subtracted."""
    model, x = net(Residual), uniform(2, 3, 14, 14)
    names = [name for name, _ in model.named_modules() if name]
    assert "head" in names
    with pytest.raises(AssertionError, match="none between the output and .*: read a layer further down"):
        attr.ExcitationBackprop(model, "head").attribute(x, 1, contrastive=True)
    with pytest.raises(AssertionError, match="none between the output and"):
        attr.ExcitationBackprop(model, "pool").attribute(x, 1, contrastive=True, contrast_layer="stem")

    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.aside = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.aside(x)
            return self.fc(F.relu(self.conv(x)).mean((2, 3)))

    with pytest.raises(AssertionError, match="there is none in Conv2d"):
        attr.ExcitationBackprop(Aside().double()).attribute(x, 1, contrastive=True, contrast_layer="aside")


# ------------------------------------------------------------------------------------------------- many targets


@pytest.mark.parametrize("contrastive", [False, True])
@pytest.mark.parametrize("layer", [None, "norm1", "pool"])
def test_many_targets_equal_single_calls(layer, contrastive):
    model, x = net(Residual), uniform(2, 3, 12, 12)
    targets = [0, -1, [2, 3], (1,), torch.tensor([4, 4])]
    method = attr.ExcitationBackprop(model, layer)
    expected = torch.stack([method.attribute(x, t, contrastive=contrastive) for t in targets])
    for at_once in (None, 1, 2, 100):
        found = method.attribute_many(x, targets, contrastive=contrastive, targets_per_pass=at_once)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    every = method.attribute_many(x, torch.tensor([0, 4]), contrastive=contrastive, sum_channels=False)
    torch.testing.assert_close(every.sum(2, keepdim=True), expected[:2], rtol=1e-9, atol=1e-12)
    assert method.attribute_many(x, []).shape == (0, *expected.shape[1:])


@pytest.mark.parametrize("kind", NETS, ids=lambda kind: kind.__name__)
def test_many_targets_run_in_one_backward(kind, monkeypatch):
    model, x, passes = net(kind), uniform(2, 3, 14, 14), []
    original = excitation._share

    def counted(values, weights, stack, conduct):
        passes.append(len(stack))
        return original(values, weights, stack, conduct)

    monkeypatch.setattr(excitation, "_share", counted)
    attr.ExcitationBackprop(model).attribute(x, 0)
    layers = len(passes)
    attr.ExcitationBackprop(model).attribute_many(x, [0, 1, 2, 3])
    assert layers > 3 and passes == [1] * layers + [4] * layers


def test_bad_many_arguments():
    method = attr.ExcitationBackprop(net(Residual))
    with pytest.raises(ValueError, match="targets_per_pass must be an int"):
        method.attribute_many(uniform(1, 3, 12, 12), [1], targets_per_pass=0)
    with pytest.raises(TypeError, match="targets must be a list"):
        method.attribute_many(uniform(1, 3, 12, 12), 3)
