"""What excitation backprop refuses and warns of, the callers' modes it bears, and what it leaves alone."""

from __future__ import annotations

import copy
import gc
import threading
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from excitation_cases import NETS, Inception, Residual, below, net, normal, uniform
from torch import nn

import convviz_cuda as cv
from convviz_cuda import attr, rules
from convviz_cuda.models import zfnet_mini

# What would hide a fault: warnings of unknown operations. The tests that expect one say so.
pytestmark = pytest.mark.filterwarnings("error:The rule 'excitation':UserWarning")


# ----------------------------------------------------------------------------------------------- errors and warnings


@pytest.mark.parametrize(
    ("target", "error", "text"),
    [
        (None, AssertionError, "Target not provided when necessary"),
        (5, IndexError, "out of"),
        ([0], AssertionError, "Target list length does not match output!"),
        ([0, 9], IndexError, "out of"),
        ((1, 2), AssertionError, "Cannot choose target column"),
        (1.0, AssertionError, "not valid"),
    ],
)
def test_bad_targets(target, error, text):
    x = uniform(2, 3, 12, 12)
    for layer in (None, "pool"):
        method = attr.ExcitationBackprop(net(Residual), layer)
        with pytest.raises(error, match=text):
            method.attribute(x, target)
        with pytest.raises(error):
            method.attribute_many(x, [0, target])


def test_bad_models_and_layers():
    model, x = net(Residual), uniform(1, 3, 12, 12)
    with pytest.raises(AssertionError, match=r"instance of torch\.nn\.Module"):
        attr.ExcitationBackprop(lambda x: x)
    with pytest.raises(ValueError, match="'conv9'"):
        attr.ExcitationBackprop(model, "conv9")
    with pytest.raises(AssertionError, match="did not run"):
        attr.ExcitationBackprop(model, nn.ReLU()).attribute(x, 0)
    with pytest.raises(ValueError, match="'conv9'"):
        attr.ExcitationBackprop(model).attribute(x, 0, contrastive=True, contrast_layer="conv9")
    with pytest.raises(AssertionError, match="did not run"):
        attr.ExcitationBackprop(model).attribute(x, 0, contrastive=True, contrast_layer=nn.Linear(2, 2))
    with pytest.raises(ValueError, match="contrastive is False"):
        attr.ExcitationBackprop(model).attribute(x, 0, contrast_layer="head")
    flat = nn.Sequential(nn.ReLU(), nn.Flatten())
    with pytest.raises(AssertionError, match="there is none in this forward"):
        attr.ExcitationBackprop(flat).attribute(x, 0, contrastive=True)
    with pytest.raises(AssertionError, match="must return a tensor"):
        attr.ExcitationBackprop(type("Two", (nn.Module,), {"forward": lambda s, x: (x, x)})()).attribute(x, 0)

    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair, self.constant = nn.Identity(), nn.Identity()

        def forward(self, x):
            self.constant(torch.ones(2))
            return self.pair((x, x))[0].flatten(1)

    with pytest.raises(AssertionError, match="no single map"):
        attr.ExcitationBackprop(Parts(), "pair").attribute(x, 0)
    with pytest.raises(AssertionError, match="does not depend on the inputs"):
        attr.ExcitationBackprop(Parts(), "constant").attribute(x, 0)


def test_an_unknown_operation_is_warned_about_once_where_the_signal_meets_it():
    x = uniform(2, 3, 4)

    def unknown(h):
        return torch.exp(torch.cumsum(h, 2))

    with pytest.warns(UserWarning, match="does not know ExpBackward0") as caught:
        found, above = below(unknown, x)
    assert len([w for w in caught if "does not know" in str(w.message)]) == 1
    h = x.clone().requires_grad_()
    torch.testing.assert_close(found, torch.autograd.grad(unknown(h), h, above)[0])
    below(lambda h: (unknown(h), h * 1.0)[1], x)  # no signal there: no warning


def test_a_scripted_model_is_warned_about():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
        )
    with pytest.warns(UserWarning, match="The rule 'excitation' does not know"):
        attr.ExcitationBackprop(scripted).attribute(torch.rand(1, 3, 6, 6), 1)


def test_options_that_keep_no_sums_are_refused():
    for options in ({"overlap": "overwrite"}, {"norm": "gradient"}):
        with pytest.raises(ValueError, match="shares probabilities out"):
            cv.backward_rule("excitation", **options)


def test_the_rule_cannot_change_kind():
    assert rules.BACKWARD_RULES == ("gradient", "deconvnet", "guided")
    with cv.backward_rule("excitation") as session:
        F.conv2d(uniform(1, 1, 4, 4).requires_grad_(), normal(1, 1, 3, 3))
        for rule in rules.BACKWARD_RULES:
            with pytest.raises(ValueError, match="records other nodes"):
                session.rule = rule
        session.rule = "excitation"
    with cv.backward_rule("guided") as session:
        F.relu(uniform(1, 1, 4, 4).requires_grad_())
        with pytest.raises(ValueError, match="records other nodes"):
            session.rule = "excitation"
        assert session.rule == "guided"


def test_kinds_of_rules_leave_each_others_graphs_alone():
    model, x = net(Residual), uniform(1, 3, 12, 12)

    def run(outer, inner):
        leaf = x.clone().requires_grad_()
        with cv.backward_rule(outer):
            y = model(leaf)[:, 1].sum()
        with cv.backward_rule(inner) as session:
            session.expects_rectifier = False
            return torch.autograd.grad(y, leaf)[0]

    assert torch.equal(run("excitation", "guided"), run("excitation", "excitation"))
    assert torch.equal(run("guided", "excitation"), run("guided", "guided"))
    with cv.backward_rule("excitation"):  # what a backward computes is no forward of the outer context
        assert torch.equal(run("excitation", "guided"), run("excitation", "excitation"))
    expected = attr.ExcitationBackprop(model).attribute(x, 1, sum_channels=False)
    torch.testing.assert_close(run("excitation", "gradient"), expected)


def test_torch_func_and_second_differentiation_are_refused():
    x = uniform(1, 2, 4, 4)
    with cv.backward_rule("excitation"), pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(lambda v: F.relu(v).sum())(x)
    with cv.backward_rule("excitation"):
        leaf = x.clone().requires_grad_()
        y = F.conv2d(leaf, normal(1, 2, 2, 2))
        seed = torch.ones_like(y).requires_grad_()
        first = torch.autograd.grad(y, leaf, seed, create_graph=True)[0]
        with pytest.raises(RuntimeError, match="differentiate twice"):
            first.sum().backward()


def test_a_leaf_in_place_is_refused_untouched():
    x = normal(2, 3, 4)
    for change in (lambda v: F.relu(v, inplace=True), lambda v: v.add_(1), lambda v: v.mul_(2)):
        leaf = x.clone().requires_grad_()
        with cv.backward_rule("excitation"), pytest.raises(RuntimeError, match="leaf"):
            change(leaf)
        assert torch.equal(leaf, x)


# ------------------------------------------------------------------------------------------- modes and cleanliness


@pytest.mark.parametrize("layer", [None, "pool", "norm2"])
def test_callers_modes(layer):
    model, x = net(Residual).float(), uniform(2, 3, 12, 12).float()
    method = attr.ExcitationBackprop(model, layer)
    expected = method.attribute(x, 1)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        assert torch.equal(method.attribute(x, 1), expected)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        method.attribute(x, 1)
    last = method.attribute(x.contiguous(memory_format=torch.channels_last), 1)
    torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-6)
    double = attr.ExcitationBackprop(copy.deepcopy(model).double(), layer).attribute(x.double(), 1)
    torch.testing.assert_close(expected.double(), double, rtol=1e-3, atol=1e-5)
    if layer is not None:  # at the image, sums with signs are ill-conditioned
        with torch.autocast("cpu", torch.bfloat16):
            low = method.attribute(x, 1)
        assert F.cosine_similarity(low.flatten().float(), expected.flatten(), 0) > 0.99
    assert not expected.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_keeps_the_sums(dtype):
    model, x = net(Residual), uniform(2, 3, 12, 12)
    exact = attr.ExcitationBackprop(model, "pool").attribute(x, [1, 4])
    found = attr.ExcitationBackprop(copy.deepcopy(model).to(dtype), "pool").attribute(x.to(dtype), [1, 4])
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.double().flatten(1).sum(1), torch.ones(2, dtype=x.dtype), atol=2e-3, rtol=0
    )
    assert F.cosine_similarity(found.double().flatten(), exact.flatten(), 0) > 0.99


@pytest.mark.parametrize("backward", ["autocast", "autograd.backward", "Tensor.backward"])
def test_a_backward_computes_alike_wherever_it_is_called(backward):
    """Under the caller's autocast, and inside of the context by any way to call it."""
    model, x = net(Inception).float(), uniform(2, 3, 14, 14).float()
    expected = attr.ExcitationBackprop(model).attribute(x, 1, sum_channels=False)
    leaf = x.clone().requires_grad_()
    with cv.backward_rule("excitation"):
        score = model(leaf)[:, 1].sum()
        if backward == "autograd.backward":
            torch.autograd.backward(score)
        elif backward == "Tensor.backward":
            score.backward()
    if backward == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            score.backward()
    assert F.cosine_similarity(leaf.grad.flatten(), expected.flatten(), 0) > 1 - 1e-5
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-2, atol=1e-4)
    assert all(p.grad is None for p in model.parameters())


def test_channels_last_is_kept_where_channels_are():
    x = uniform(2, 3, 12, 12).contiguous(memory_format=torch.channels_last)
    found = attr.ExcitationBackprop(net(Residual)).attribute(x, 1, sum_channels=False)
    assert found.shape == x.shape and found.stride() == x.stride()


def test_training_mode_is_warned_about_and_left_alone():
    model, x = net(Inception).train(), uniform(2, 3, 12, 12)
    with pytest.warns(UserWarning, match=r"Dropout \(p=0.5\) runs in training mode"):
        found = attr.ExcitationBackprop(model, "joint").attribute(x, 1)
    assert model.training and found.shape == (2, 1, 5, 5)


def test_empty_batches():
    for layer, shape in ((None, (0, 1, 12, 12)), ("pool", (0, 1, 6, 6)), ("head", (0, 5))):
        method = attr.ExcitationBackprop(net(Residual), layer)
        assert method.attribute(uniform(0, 3, 12, 12), 1).shape == shape
        assert method.attribute_many(uniform(0, 3, 12, 12), [1, 2]).shape == (2, *shape)


def test_two_threads_share_a_model():
    model, x, wrong, barrier = net(Residual), uniform(2, 3, 12, 12), [], threading.Barrier(3)
    cases = [("pool", 1, False), ("pool", 2, True), (None, 3, False)]
    expected = [attr.ExcitationBackprop(model, lay).attribute(x, t, contrastive=c) for lay, t, c in cases]

    def work(place):
        layer, target, contrastive = cases[place]
        for _ in range(10):
            barrier.wait()
            found = attr.ExcitationBackprop(model, layer).attribute(x, target, contrastive=contrastive)
            if not torch.equal(found, expected[place]):
                wrong.append(place)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_nothing_is_left_behind():
    model, x = net(Residual), uniform(2, 3, 12, 12)
    before, kept = copy.deepcopy(model.state_dict()), x.clone()
    method = attr.ExcitationBackprop(model, "norm1")
    nodes = []
    handle = model.conv1.register_forward_hook(lambda _, given, gave: nodes.append(weakref.ref(gave.grad_fn)))
    method.attribute(x, 1, contrastive=True)
    handle.remove()
    with pytest.raises(IndexError):
        method.attribute(x, 99)

    class Broken(nn.Module):
        def forward(self, x):
            F.relu(x)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        attr.ExcitationBackprop(Broken()).attribute(x, 1)
    gc.collect()
    assert nodes and all(node() is None for node in nodes)
    assert torch.equal(x, kept) and not x.requires_grad and x.grad is None
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._backward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not torch.overrides._get_current_function_mode_stack() and rules._innermost() is None


def test_no_warnings_without_a_reason():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in NETS:
            attr.ExcitationBackprop(net(kind)).attribute(uniform(1, 3, 14, 14), 1)
        attr.ExcitationBackprop(zfnet_mini(), "pool2").attribute(torch.rand(1, 3, 96, 96), 1)


def test_an_exported_graph_is_seen():
    model, x = net(Residual), uniform(2, 3, 12, 12)
    exported = torch.export.export(model, (x,)).module()
    found = attr.ExcitationBackprop(exported).attribute(x, 1)
    torch.testing.assert_close(found, attr.ExcitationBackprop(model).attribute(x, 1), rtol=1e-8, atol=1e-10)
