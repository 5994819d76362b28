"""The backward engine against autograd and a per-operation float64 model of the rules."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import os
import re
import subprocess
import sys
import threading
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

import convviz_cuda as cv
from convviz_cuda import ops, rules

RULES = rules.BACKWARD_RULES


class Rectify(torch.autograd.Function):
    """The rules as written in the papers, one operation at a time: the oracle of this file."""

    @staticmethod
    def forward(ctx, x, rule):
        ctx.rule = rule
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, signal):
        (x,) = ctx.saved_tensors
        forward_open = (x > 0) if ctx.rule in ("gradient", "guided") else torch.ones_like(x, dtype=torch.bool)
        backward_open = (signal > 0) if ctx.rule in ("deconvnet", "guided") else torch.ones_like(forward_open)
        return torch.where(forward_open & backward_open, signal, torch.zeros_like(signal)), None


def by_oracle(net, x, rule):
    x = x.clone().requires_grad_()
    y = net(x, lambda t: Rectify.apply(t, rule))
    return torch.autograd.grad(y.sum(), x)[0]


def by_engine(net, relu, x, rule):
    x = x.clone().requires_grad_()
    with cv.backward_rule(rule):
        return torch.autograd.grad(net(x, relu).sum(), x)[0]


def weights(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


W1, W2, W3 = weights(6, 3, 3, 3), weights(5, 6, 3, 3, seed=1), weights(6, 6, 1, 1, seed=2)
MODULE, INPLACE_MODULE = nn.ReLU(), nn.ReLU(inplace=True)

SPELLINGS = {
    "module": MODULE,
    "module in place": INPLACE_MODULE,
    "F.relu": F.relu,
    "F.relu in place": lambda x: F.relu(x, inplace=True),
    "torch.relu": torch.relu,
    "torch.relu_": torch.relu_,
    "method": Tensor.relu,
    "method in place": Tensor.relu_,
    "aten": torch.ops.aten.relu.default,
}


def chain(x, relu):
    return F.conv2d(relu(F.conv2d(x, W1)), W2)


def reused(x, relu):
    return F.conv2d(relu(F.conv2d(relu(F.conv2d(x, W1)), W3)), W2)


def parallel(x, relu):
    h = F.conv2d(x, W1)
    return F.conv2d(relu(h + 0), W2).sum() + (relu(h * 1) * W3[:, 0]).sum()


def skip(x, relu):
    """A tensor read by a ReLU and by something else: the rule acts on the ReLU's branch only."""
    h = F.conv2d(x, W1)
    return F.conv2d(relu(h.clone()), W2).sum() + (h * W3[:, 0]).sum()


def pooled(x, relu):
    return F.conv2d(F.max_pool2d(relu(F.conv2d(x, W1)), 3, 2), W2)


def pooled_and_read(x, relu):
    """The ReLU's output feeds a pooling and a convolution: the parts must be added before the gate."""
    h = relu(F.conv2d(x, W1))
    return F.conv2d(F.max_pool2d(h, 2), W2).sum() + F.conv2d(h, W2).sum()


def pooled_twice(x, relu):
    h = relu(F.conv2d(x, W1))
    return F.conv2d(F.max_pool2d(h, 2), W2).sum() + F.conv2d(F.max_pool2d(h, 3, 2, 1), W2).sum()


def cat_and_pool(x, relu):
    h = F.conv2d(x, W1)
    return F.conv2d(F.max_pool2d(torch.cat([relu(h.clone()), relu(-h)], 1), 3, 1)[:, 3:9], W2)


def sliced(x, relu):
    """A part of the channels is rectified; the others pass."""
    h = F.conv2d(x, W1)
    return F.conv2d(torch.cat([relu(h[:, :3].clone()), h[:, 3:]], 1), W2)


NETS = (chain, reused, parallel, skip, pooled, pooled_and_read, pooled_twice, cat_and_pool, sliced)


@pytest.fixture
def images():
    return weights(2, 3, 14, 13, seed=7)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("net", NETS, ids=lambda net: net.__name__)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_wiring_of_a_relu(images, net, spelling, rule):
    found, expected = by_engine(net, SPELLINGS[spelling], images, rule), by_oracle(net, images, rule)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert expected.abs().max() > 0


@pytest.mark.parametrize("rule", RULES)
def test_in_place_on_a_view_of_a_part(images, rule):
    def in_place(x, relu):
        h = F.conv2d(x, W1) * 1
        relu(h[:, :3])
        return F.conv2d(h, W2)

    found = by_engine(in_place, torch.relu_, images, rule)
    torch.testing.assert_close(found, by_oracle(sliced, images, rule), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_relu6_and_hardtanh(images, rule):
    class Clip(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, lower, upper):
            ctx.save_for_backward((x > lower) & (x < upper))
            return x.clamp(lower, upper)

        @staticmethod
        def backward(ctx, signal):
            (inside,) = ctx.saved_tensors
            keep = inside | (rule == "deconvnet")
            keep = keep & ((signal > 0) | (rule == "gradient"))
            return torch.where(keep, signal, torch.zeros_like(signal)), None, None

    for relu, bounds in (
        (F.relu6, (0, 6)),
        (nn.ReLU6(), (0, 6)),
        (nn.Hardtanh(-0.5, 2.0), (-0.5, 2.0)),
        (lambda x: F.hardtanh(x, -0.5, 2.0, inplace=True), (-0.5, 2.0)),
        (lambda x: F.hardtanh_(x, -0.5, 2.0), (-0.5, 2.0)),
    ):
        x = images.clone().requires_grad_()
        expected = torch.autograd.grad(chain(x, lambda t, b=bounds: Clip.apply(t, *b)).sum(), x)[0]
        torch.testing.assert_close(by_engine(chain, relu, images, rule), expected, rtol=1e-12, atol=1e-12)


class Subclass(Tensor):
    """As MONAI's and fastai's images are: PyTorch's own behaviour, and views of what operations give."""


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_subclass_of_tensor(images, spelling, rule):
    relu = SPELLINGS[spelling]
    for net in (chain, pooled, pooled_and_read):
        found = by_engine(
            lambda x, relu, net=net: net(x.as_subclass(Subclass), relu), relu, images, rule
        ).as_subclass(Tensor)
        torch.testing.assert_close(found, by_oracle(net, images, rule), rtol=1e-12, atol=1e-12)
    with cv.backward_rule(rule):
        h = (images.clone().requires_grad_() * 1).as_subclass(Subclass)
        changed = relu(h)
        assert (changed is h) == ("in place" in spelling or spelling == "torch.relu_") and torch.equal(
            changed, images.relu()
        )


# ------------------------------------------------------------------------------------ pooling and its gate


@pytest.fixture
def gates(monkeypatch):
    """Counts the separate gating passes: none where unpooling and gating are one."""
    calls = []
    original = ops.relu_backward_op

    def counted(*args):
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(ops, "relu_backward_op", counted)
    return calls


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "pool", [(2, 2, 0, 1, False), (3, 2, 0, 1, True), (3, 2, 1, 1, False), (2, 1, 1, 2, False)]
)
def test_unpooling_gates_in_the_same_pass(images, gates, rule, pool):
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True), nn.MaxPool2d(*pool[:4], ceil_mode=pool[4]))
    net = net.append(nn.Conv2d(6, 4, 2)).double()

    def explicit(x, relu):
        return net[3](F.max_pool2d(relu(net[0](x)), *pool))

    found = by_engine(lambda x, _: net(x), None, images, rule)
    assert not gates
    torch.testing.assert_close(found, by_oracle(explicit, images, rule), rtol=1e-12, atol=1e-12)


def test_several_readers_gate_after_the_sum(images, gates):
    by_engine(pooled_and_read, F.relu, images, "guided")
    assert len(gates) == 1


@pytest.mark.parametrize("how", ["hook", "retain_grad", "kept", "asked inside", "asked outside"])
def test_gradient_at_the_relus_output(images, how):
    """Whoever looks at the ReLU's output sees the signal above it, ungated."""
    seen = {}

    def net(x, relu):
        h = relu(F.conv2d(x, W1))
        if how == "hook":
            h.register_hook(lambda signal: seen.update(signal=signal.clone()))
        elif how == "retain_grad":
            h.retain_grad()
        seen["h"] = h
        return F.conv2d(F.max_pool2d(h, 3, 2), W2)

    def run(relu, rule, context):
        x = images.clone().requires_grad_()
        with context:
            y = net(x, relu).sum()
            if how == "hook":
                seen.pop("h")
            if how == "asked inside":
                return torch.autograd.grad(y, (seen["h"], x))
            if how != "asked outside":
                gradient = torch.autograd.grad(y, x)[0] if how != "retain_grad" else None
        if how == "asked outside":
            return torch.autograd.grad(y, (seen["h"], x))
        if how == "retain_grad":
            y.backward()
            return seen["h"].grad, x.grad
        return (seen["signal"] if how == "hook" else gradient), gradient

    found = run(F.relu, "guided", cv.backward_rule("guided"))
    expected = run(lambda t: Rectify.apply(t, "guided"), "guided", contextlib.nullcontext())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_a_reader_out_of_sight(images, rule):
    """A custom Function reads the ReLU's output without the mode seeing it: still gated after the sum."""

    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * -3.0

        @staticmethod
        def backward(ctx, signal):
            return signal * -3.0

    def net(x, relu):
        h = relu(F.conv2d(x, W1))
        return F.conv2d(F.max_pool2d(h, 3, 2), W2).sum() + Hidden.apply(h).sum()

    torch.testing.assert_close(
        by_engine(net, F.relu, images, rule), by_oracle(net, images, rule), rtol=1e-12, atol=1e-12
    )


def test_max_pool_spellings(images):
    for pool in (
        nn.MaxPool2d(3, 2),
        lambda x: torch.max_pool2d(x, 3, 2),
        lambda x: F.max_pool2d(x, 3, stride=2, return_indices=True)[0],
        lambda x: torch.stack([F.max_pool2d(one, (3, 3), [2]) for one in x]),
    ):
        net = lambda x, relu, p=pool: F.conv2d(p(relu(F.conv2d(x, W1))), W2)  # noqa: E731
        for rule in RULES:
            torch.testing.assert_close(
                by_engine(net, F.relu, images, rule), by_oracle(net, images, rule), rtol=1e-12, atol=1e-12
            )


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(3, 2),
        nn.MaxPool2d(3, 2, return_indices=True),
        lambda x: F.max_pool2d_with_indices(x, 3, 2),
        lambda x: torch.ops.aten.max_pool2d_with_indices.default(x, [3, 3], [2, 2]),
        lambda x: torch._C._nn.max_pool2d_with_indices(x, [3, 3], [2, 2]),
    ],
)
def test_the_largest_of_overlapping_signals_wins(pool):
    """One maximum in four windows, whose signals are 1, 2, 3 and 4."""
    x = torch.zeros(1, 1, 5, 5, dtype=torch.float64)
    x[0, 0, 2, 2] = 1.0
    signal = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]], dtype=torch.float64)
    for overlap, expected in (("sum", 10.0), ("overwrite", 4.0)):
        leaf = x.clone().requires_grad_()
        with cv.backward_rule("deconvnet", overlap=overlap):
            out = pool(F.relu(leaf))
            if isinstance(out, tuple):
                assert torch.equal(out[1], torch.full((1, 1, 2, 2), 12))
                out = out[0]
            assert torch.equal(out.detach(), torch.ones(1, 1, 2, 2, dtype=torch.float64))
            assert torch.equal(torch.autograd.grad(out, leaf, signal)[0], x * expected)


@pytest.mark.parametrize(
    ("layer", "settings", "text"),
    [
        (nn.AdaptiveMaxPool2d(4), {"overlap": "overwrite"}, "overlap='overwrite' .* adaptive max pooling"),
        (nn.MaxPool3d(3, 2), {"overlap": "overwrite"}, "overlap='overwrite' .* other than max_pool2d"),
        (nn.FractionalMaxPool2d(2, 5), {"overlap": "overwrite"}, "overlap='overwrite' .* fractional"),
        (nn.CrossMapLRN2d(3, alpha=1.0), {}, "norm='identity' .* nn.CrossMapLRN2d"),
    ],
)
def test_what_the_settings_do_not_act_on_is_warned_about(images, layer, settings, text):
    def gradient(rule, **options):
        x = images.clone().requires_grad_()
        with cv.backward_rule(rule, **options):
            out = layer(F.conv2d(F.relu(x), W1))
            return torch.autograd.grad(out.sum(), x)[0]

    with pytest.warns(UserWarning, match=text):
        gradient("deconvnet", **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradient("guided")


@pytest.mark.parametrize("kernel", [46341, 70000])
def test_a_window_of_more_positions_than_a_switch_holds_is_pytorchs(kernel):
    x = weights(1, 2, 3, 3).requires_grad_()

    def gradient():
        out = F.max_pool2d(x * 1, kernel, kernel, kernel // 2)
        return torch.autograd.grad(out.sum(), x)[0]

    with cv.backward_rule("gradient"):
        found = gradient()
    assert torch.equal(found, gradient()) and found.sum() == 2


def test_too_large_a_window_raises_pytorchs_error(images):
    with pytest.raises(RuntimeError, match="too small"), cv.backward_rule("guided"):
        F.max_pool2d(F.relu(images.requires_grad_()), 40)


# ------------------------------------------------------------------------------------------ linear layers

LAYERS = {
    "conv": nn.Conv2d(6, 4, 3, stride=2, padding=1, dilation=2),
    "conv groups": nn.Conv2d(6, 4, (3, 2), groups=2, bias=False),
    "conv same": nn.Conv2d(6, 4, 3, padding="same"),
    "conv reflect": nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"),
    "conv transposed": nn.ConvTranspose2d(6, 4, 3, stride=2),
    "batch norm": nn.BatchNorm2d(6),
    "batch norm plain": nn.BatchNorm2d(6, affine=False),
    "avg pool": nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
    "adaptive": nn.AdaptiveAvgPool2d((3, 5)),
    "adaptive one dim": nn.AdaptiveAvgPool2d((None, 4)),
    "lrn": nn.LocalResponseNorm(5, alpha=0.3, beta=0.6, k=2.0),
    "lrn even": nn.LocalResponseNorm(4, alpha=0.3),
    "linear": nn.Linear(9, 7),
    "gelu": nn.GELU(),
    "silu": nn.SiLU(),
    "softmax": nn.Softmax(1),
    "dropout": nn.Dropout(0.5),
}


def ready(layer: nn.Module) -> nn.Module:
    layer = copy.deepcopy(layer).double().eval()
    generator = torch.Generator().manual_seed(3)
    for buffer in layer.buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return layer


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", LAYERS)
def test_other_layers_pass_the_ordinary_gradient(name, layout):
    layer = ready(LAYERS[name])
    x = weights(3, 6, 8, 9, seed=4).contiguous(memory_format=layout)

    def gradient(context):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        with context:
            y = layer(F.softplus(leaf))
            return torch.autograd.grad(y, leaf, weights(*y.shape, seed=5), create_graph=True)[0]

    expected, found = gradient(contextlib.nullcontext()), gradient(cv.backward_rule("gradient"))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert found.stride() == expected.stride()


def test_lrn_is_the_identity_of_the_deconvnet():
    layer = ready(LAYERS["lrn"])
    x = weights(2, 6, 5, 5).requires_grad_()
    signal = weights(2, 6, 5, 5, seed=9)
    with cv.backward_rule("deconvnet") as session:
        session.expects_rectifier = False
        y = layer(x)
        assert torch.equal(y, layer(x.detach()))
        assert torch.equal(torch.autograd.grad(y, x, signal, retain_graph=True)[0], signal)
        session.rule = "guided"
        guided = torch.autograd.grad(y, x, signal)[0]
    torch.testing.assert_close(guided, torch.autograd.grad(layer(x), x, signal)[0])


def test_weights_are_constants_and_get_no_grad(images):
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 12 * 11, 4)
    )
    net = net.double().eval()
    x = images.requires_grad_()
    with cv.backward_rule("gradient"):
        net(x).sum().backward()
    assert x.grad is not None and all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize(
    "layer",
    [nn.GroupNorm(2, 6), nn.InstanceNorm2d(6, affine=True), nn.LayerNorm(11), nn.RMSNorm(11), nn.PReLU(6)],
    ids=lambda layer: type(layer).__name__,
)
def test_parameters_of_other_layers_are_constants(images, layer):
    layer = copy.deepcopy(layer).double()
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -1, 1)

    def gradient(context):
        x = images.clone().requires_grad_()
        with context:
            layer(F.conv2d(x, W1)).square().sum().backward()
        return x.grad

    found = gradient(cv.backward_rule("gradient"))
    assert all(p.grad is None and p.requires_grad for p in layer.parameters())
    torch.testing.assert_close(found, gradient(contextlib.nullcontext()), rtol=1e-12, atol=1e-12)
    assert all(p.grad is not None for p in layer.parameters())


def test_parameters_of_embeddings_are_constants():
    embedding, bilinear = nn.Embedding(5, 4).double(), nn.Bilinear(4, 3, 2).double()
    x = weights(2, 3).requires_grad_()
    with cv.backward_rule("gradient"):
        bilinear(embedding(torch.tensor([1, 3])), x).sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in (*embedding.parameters(), *bilinear.parameters()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_follows_autograd(dtype):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(8, 4, 3)
    )
    net = net.to(dtype).eval()
    x = torch.randn(2, 3, 17, 15).to(dtype).requires_grad_()
    with cv.backward_rule("gradient"):
        found = torch.autograd.grad(net(x).sum(), x)[0]
    double = copy.deepcopy(net).double()
    x64 = x.detach().double().requires_grad_()
    exact = torch.autograd.grad(double(x64).sum(), x64)[0]
    plain = torch.autograd.grad(net(x).sum(), x)[0]
    assert found.dtype == dtype
    # As close to the truth as PyTorch's own backward in this dtype; a factor for different rounding.
    error = lambda g: (g.double() - exact).norm() / exact.norm()  # noqa: E731
    assert error(found) <= 1.5 * error(plain) + 1e-7


def test_autocast(images):
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 4, 3))
    x = images.float().requires_grad_()

    def gradient(context):
        with torch.autocast("cpu", torch.bfloat16), context:
            y = net(x)
        assert y.dtype == torch.bfloat16
        return torch.autograd.grad(y.sum(), x)[0]

    found, expected = gradient(cv.backward_rule("gradient")), gradient(contextlib.nullcontext())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())


# ------------------------------------------------------------------------------------ sessions and safety


def test_one_forward_serves_three_rules(images):
    x = images.clone().requires_grad_()
    with cv.backward_rule("gradient") as session:
        y = pooled(x, F.relu).sum()
        for rule in RULES:
            session.rule = rule
            found = torch.autograd.grad(y, x, retain_graph=True)[0]
            torch.testing.assert_close(found, by_oracle(pooled, images, rule), rtol=1e-12, atol=1e-12)


def test_the_innermost_rule_rules_and_the_recorded_one_outside(images):
    x = images.clone().requires_grad_()
    with cv.backward_rule("guided"):
        y = pooled(x, F.relu).sum()
        with cv.backward_rule("deconvnet"):
            inner = torch.autograd.grad(y, x, retain_graph=True)[0]
    outside = torch.autograd.grad(y, x)[0]
    torch.testing.assert_close(inner, by_oracle(pooled, images, "deconvnet"), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(outside, by_oracle(pooled, images, "guided"), rtol=1e-12, atol=1e-12)


def clean() -> bool:
    return not torch.overrides._get_current_function_mode_stack() and rules._innermost() is None


def test_nothing_is_left_behind(images):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ZeroDivisionError), cv.backward_rule("guided"):
        model(images.requires_grad_()).sum().backward()
        raise ZeroDivisionError
    assert clean()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any(m._forward_hooks or m._backward_hooks or m._forward_pre_hooks for m in model.modules())


def test_two_threads_do_not_meet(images):
    wrong, barrier = [], threading.Barrier(3)
    expected = {rule: by_oracle(pooled, images, rule) for rule in RULES}
    relu = nn.ReLU()

    def work(rule):
        for _ in range(20):
            barrier.wait()
            found = by_engine(pooled, relu, images, rule)
            if not torch.allclose(found, expected[rule], rtol=1e-12, atol=1e-12):
                wrong.append(rule)

    threads = [threading.Thread(target=work, args=(rule,)) for rule in RULES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and clean()


def test_one_session_in_two_threads(images):
    """Each thread gets back the context that it was in, whatever the order in which they leave."""
    session, inside, left = cv.backward_rule("guided"), threading.Event(), threading.Event()
    found = {}

    def gradient_recorded_before():
        x = images.clone().requires_grad_()
        with cv.backward_rule("gradient"):
            return pooled(x, F.relu).sum(), x

    def first():
        y, x = gradient_recorded_before()
        with session:
            session.expects_rectifier = False
            inside.wait(60)
        found["first"] = torch.autograd.grad(y, x)[0]
        left.set()

    def second():
        y, x = gradient_recorded_before()
        with cv.backward_rule("deconvnet"):
            with session:
                inside.set()
                left.wait(60)
            found["second"] = torch.autograd.grad(y, x)[0]

    threads = [threading.Thread(target=work) for work in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, rule in (("first", "gradient"), ("second", "deconvnet")):
        torch.testing.assert_close(found[name], by_oracle(pooled, images, rule), rtol=1e-12, atol=1e-12)


def test_a_thread_without_the_context_sees_plain_pytorch(images):
    found = []

    def work():
        x = images.clone().requires_grad_()
        found.append(torch.autograd.grad(chain(x, F.relu).sum(), x)[0])

    with cv.backward_rule("guided") as session:
        session.expects_rectifier = False
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    torch.testing.assert_close(found[0], by_oracle(chain, images, "gradient"))


def test_double_backward(images):
    def smooth(x):
        h = F.local_response_norm(F.conv2d(x, W1), 3)
        h = F.avg_pool2d(F.max_pool2d(F.relu(h), 3, 2), 2)
        return (F.adaptive_avg_pool2d(h**2, 1) ** 2).sum()

    def hessian_vector(context):
        x = images.clone().requires_grad_()
        with context:
            first = torch.autograd.grad(smooth(x), x, create_graph=True)[0]
            return torch.autograd.grad((first * weights(*x.shape, seed=8)).sum(), x)[0]

    torch.testing.assert_close(
        hessian_vector(cv.backward_rule("gradient")),
        hessian_vector(contextlib.nullcontext()),
        rtol=1e-10,
        atol=1e-10,
    )
    for rule in ("guided", "deconvnet"):
        with pytest.raises(RuntimeError, match=f"Double backward through the {rule} rule"):
            hessian_vector(cv.backward_rule(rule))
        x = images.clone().requires_grad_()
        with cv.backward_rule(rule):
            first = torch.autograd.grad(pooled(x, F.relu).sum(), x, create_graph=True)[0]
            with pytest.raises(RuntimeError, match=f"taken under the rule '{rule}': double backward is not"):
                torch.autograd.grad(first.sum(), x)


@pytest.mark.parametrize("rule", RULES)
def test_batched_signals_equal_a_loop(images, rule):
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(True), nn.LocalResponseNorm(3, alpha=0.2), nn.MaxPool2d(3, 2),
        nn.Conv2d(6, 7, 2), nn.ReLU6(), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(28, 5),
    ).double().eval()  # fmt: skip
    for layout in (torch.contiguous_format, torch.channels_last):
        x = (
            images.contiguous(memory_format=layout)
            .clone(memory_format=torch.preserve_format)
            .requires_grad_()
        )
        seeds = weights(4, 2, 5, seed=6)
        with cv.backward_rule(rule):
            y = model(x)
            loop = torch.stack([torch.autograd.grad(y, x, seed, retain_graph=True)[0] for seed in seeds])
            old = torch.autograd.grad(y, x, seeds, is_grads_batched=True, retain_graph=True)[0]
            back = functools.partial(torch.autograd.grad, y, x, retain_graph=True)
            new = torch.func.vmap(lambda seed, back=back: back(seed)[0])(seeds)
        torch.testing.assert_close(old, loop, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(new, loop, rtol=1e-12, atol=1e-12)


def test_what_is_kept_between_forward_and_backward(images):
    """1 bit an element of a ReLU, 1 byte a window of a pooling; nothing of a convolution but its weight."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.ReLU()
    )
    kept = []
    x = torch.randn(2, 3, 16, 16).requires_grad_()
    parameters = {p.data_ptr() for p in net.parameters()}

    def note(tensor):
        if tensor.data_ptr() not in parameters:
            kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), cv.backward_rule("guided"):
        net(x)
    assert sorted(kept) == sorted([2 * 8 * 16 * 16 // 8, 2 * 8 * 8 * 8, 2 * 8 * 6 * 6 // 8])


# ------------------------------------------------------------------------------------------------ warnings


def test_unknown_rules_are_refused():
    for bad in ("Guided", "identity", "", None, 3):
        with pytest.raises(ValueError, match="rule must be one of"):
            cv.backward_rule(bad)
    with cv.backward_rule("guided") as session, pytest.raises(ValueError, match="'nonsense'"):
        session.rule = "nonsense"


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (nn.BatchNorm2d(6), "Batch norm runs in training"),
        (nn.BatchNorm2d(6, track_running_stats=False), "Batch norm without running statistics"),
        (nn.Dropout(0.3), r"Dropout \(p=0.3\)"),
    ],
)
def test_training_mode_is_warned_about(images, layer, text):
    with pytest.warns(UserWarning, match=text), cv.backward_rule("guided"):
        layer.double().train()(F.relu(F.conv2d(images.requires_grad_(), W1)))


def test_a_forward_without_a_relu_is_warned_about(images):
    with pytest.warns(UserWarning, match="No ReLU was seen"), cv.backward_rule("guided"):
        F.conv2d(images.requires_grad_(), W1).clamp(min=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with cv.backward_rule("gradient"):
            F.conv2d(images, W1)
        with cv.backward_rule("guided"):
            F.relu(F.conv2d(images, W1))


@pytest.mark.parametrize("spelling", ["scripted", "traced", "a part scripted"])
def test_what_is_compiled_is_warned_about(images, spelling):
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU6()).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's of torch.jit's age
        if spelling == "traced":
            hidden = torch.jit.trace(net, images)
        elif spelling == "scripted":
            hidden = torch.jit.script(net)
        else:
            hidden = nn.Sequential(net[:2], torch.jit.script(net[2:]))
    for _ in range(3):  # the first runs record PyTorch's nodes, later ones a node of the compiled graph
        with pytest.warns(UserWarning, match="The rule 'guided' does not act on a"):
            by_engine(lambda x, _: hidden(x), None, images, "guided")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            by_engine(lambda x, _: hidden(x), None, images, "gradient")


def test_a_forward_of_another_thread_is_warned_about(images):
    def elsewhere(x, relu):
        made = []
        thread = threading.Thread(target=lambda: made.append(chain(x, relu)))
        thread.start()
        thread.join()
        return made[0]

    with pytest.warns(UserWarning, match="does not act on a ReLU in this graph"):
        by_engine(elsewhere, F.relu, images, "deconvnet")
    with pytest.warns(UserWarning, match="does not act on a ReLU in this graph"):
        by_engine(lambda x, relu: pooled(elsewhere(x, relu)[:, :3], relu), F.relu, images, "guided")


@pytest.mark.parametrize(
    ("hidden", "what"),
    [
        (lambda x: x.clamp(min=0), r"clamp\(min=0\)"),
        (lambda x: torch.clamp_min(x, 0.0), r"clamp\(min=0\)"),
        (lambda x: F.threshold(x, 0.0, 0.0), "F.threshold"),
        (nn.RNN(13, 4, nonlinearity="relu", batch_first=True).double(), "a ReLU"),
    ],
)
def test_what_stands_for_a_relu_beside_others_is_warned_about(images, hidden, what):
    def net(x, relu):
        out = hidden(relu(F.conv2d(x, W1, padding=1))[:, 0])
        return out[0] if isinstance(out, tuple) else out

    with pytest.warns(UserWarning, match=f"does not act on {what} in this graph"):
        by_engine(net, F.relu, images, "guided")


def test_what_stands_for_no_relu_is_not_warned_about(images):
    def net(x, relu):
        h = F.threshold(relu(F.conv2d(x, W1)).clamp(1e-6, 3), 0.1, 0.1)
        return h.clamp(max=0.5) + F.softplus(h)

    x = images.clone().requires_grad_()
    below = F.relu(F.conv2d(x, W1))  # outside of the context, but below what is differentiated by
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        by_engine(net, F.relu, images, "guided")
        with cv.backward_rule("guided"):
            torch.autograd.grad(F.relu(F.conv2d(below, W2)).sum(), below)


@pytest.mark.parametrize("call", ["method", "function"])
def test_a_reentrant_checkpoint_is_warned_about(images, call):
    x = images.clone().requires_grad_()
    with pytest.warns(UserWarning, match="does not act on a checkpoint"), cv.backward_rule("guided"):
        h = torch.utils.checkpoint.checkpoint(lambda v: F.relu(F.conv2d(v, W1)), x, use_reentrant=True)
        y = F.conv2d(F.relu(h), W2).sum()
        y.backward() if call == "method" else torch.autograd.backward([y])
    assert x.grad is not None


def test_another_checkpoint_is_refused_with_a_sentence(images):
    x = images.clone().requires_grad_()
    with cv.backward_rule("guided"):
        y = torch.utils.checkpoint.checkpoint(lambda v: F.relu(F.conv2d(v, W1)), x, use_reentrant=False)
        with pytest.raises(RuntimeError, match=r"call the model without torch\.utils\.checkpoint"):
            torch.autograd.grad(y.sum(), x)


def test_a_session_entered_again_warns_again(images):
    session = cv.backward_rule("guided")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with session:
            F.relu(F.conv2d(images, W1))
    for _ in range(2):
        with pytest.warns(UserWarning, match="No ReLU was seen"), session:
            F.conv2d(images, W1)


def test_an_exported_graph_is_seen(images):
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(6, 4, 2)).double().eval()
    exported = torch.export.export(net, (images,)).module()
    for rule in RULES:
        found = by_engine(lambda x, _: exported(x), None, images, rule)
        torch.testing.assert_close(found, by_engine(lambda x, _: net(x), None, images, rule))


# -------------------------------------------------------------------- what the mode must not take for a constant


def test_weights_that_depend_on_the_input(images):
    def dynamic(v):
        y = F.conv2d(v, v[:1, :, :2, :2], v[0, 0, 0, :1])
        y = F.batch_norm(
            y, torch.zeros(1).double(), torch.ones(1).double(), y.mean((0, 2, 3)), y.amax((0, 2, 3))
        )
        return F.linear(y.flatten(1)[:, :4], torch.tanh(v[0, 0, :3, :4]))

    plain = images.clone().requires_grad_()
    expected = torch.autograd.grad(dynamic(plain).sum(), plain)[0]
    torch.testing.assert_close(by_engine(lambda x, _: dynamic(x), None, images, "gradient"), expected)


def test_the_gate_follows_the_relus_context_not_the_pools(images):
    def run(keep):
        v = images.clone().requires_grad_()
        with cv.backward_rule("guided"):
            y = F.relu(v * 1)
        with cv.backward_rule("gradient"):
            p = F.max_pool2d(y, 2)
        held = y if keep else None
        del y
        return torch.autograd.grad(p, v, weights(*p.shape, seed=4))[0], held

    torch.testing.assert_close(run(keep=False)[0], run(keep=True)[0])


def test_a_relus_output_edited_before_the_pool(images):
    def net(x):
        h = F.relu(F.conv2d(x, W1))
        with torch.no_grad():
            h[:, 0] = -5.0
        return F.max_pool2d(h, 2)

    x = images.clone().requires_grad_()
    with cv.backward_rule("gradient"):
        found = net(x)
    assert torch.equal(found, net(images)) and (found[:, 0] == -5).all()


def test_a_broken_off_backward_leaves_no_cycle(images):
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, signal):
            raise ZeroDivisionError

    x = images.clone().requires_grad_()
    with cv.backward_rule("guided"):
        h = F.relu(F.conv2d(Broken.apply(x), W1))
        node = weakref.ref(h.grad_fn)
        y = F.max_pool2d(h, 2)
        del h
        with pytest.raises(ZeroDivisionError):
            torch.autograd.grad(y.sum(), x)
    del y
    gc.collect()
    assert node() is None


def test_an_infinite_signal_beside_a_reader_out_of_sight(images):
    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, signal):
            return signal

    def net(x, relu):
        h = relu(F.conv2d(x, W1))
        return F.max_pool2d(h, 2)[0, 0, 0, 0] * float("inf") + Hidden.apply(h).sum()

    found = by_engine(net, F.relu, images, "gradient")
    expected = by_oracle(net, images, "gradient")
    assert torch.equal(found.isnan(), expected.isnan())


def test_a_leaf_in_place_is_refused_untouched(images):
    x = images.clone().requires_grad_()
    with cv.backward_rule("guided"), pytest.raises(RuntimeError, match="leaf"):
        F.relu(x, inplace=True)
    assert torch.equal(x, images)


def test_torch_func_inside_is_refused(images):
    with cv.backward_rule("guided"), pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(lambda v: F.relu(v).sum())(images)
    with cv.backward_rule("gradient"):
        found = torch.func.grad(lambda v: F.relu(v).sum())(images)
    assert torch.equal(found, (images > 0).double())


def test_a_wrong_size_of_adaptive_pooling_raises_pytorchs_error(images):
    for size in ((1,), (1, 2, 3)):
        with pytest.raises(Exception) as plain:
            F.adaptive_avg_pool2d(images, size)
        with pytest.raises(plain.type, match=re.escape(str(plain.value))), cv.backward_rule("gradient"):
            F.adaptive_avg_pool2d(images.requires_grad_(), size)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.bfloat16, 0.7), (torch.bfloat16, 1 / 3), (torch.float16, 1 / 3)]
)
def test_hardtanh_at_a_bound_that_the_dtype_rounds(dtype, bound):
    x = torch.tensor([bound, -bound, 0.0], dtype=dtype)

    def gradient(context):
        leaf = x.clone().requires_grad_()
        with context:
            out = F.hardtanh(leaf, -bound, bound)
            return out.detach(), torch.autograd.grad(out.sum(), leaf)[0]

    found, expected = gradient(cv.backward_rule("gradient")), gradient(contextlib.nullcontext())
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert expected[1].tolist() == [float(float(x[0]) < bound)] * 2 + [1.0]


def test_zero_is_a_size_of_adaptive_pooling(images):
    with cv.backward_rule("gradient"):
        assert F.adaptive_avg_pool2d(images.requires_grad_(), 0).shape == (2, 3, 0, 0)


def test_scale_of_a_16_bit_batch_norm_is_wide():
    norm = nn.BatchNorm2d(3, eps=1e-8).half().eval()
    norm.running_var.zero_()
    x = torch.ones(1, 3, 2, 2, dtype=torch.float16).requires_grad_()
    with cv.backward_rule("gradient"):
        found = torch.autograd.grad(norm(x), x, torch.ones_like(x))[0]
    assert torch.equal(found, torch.full_like(found, 1e4))


def test_threads_that_used_the_engine_do_not_abort_the_process_at_its_end():
    """PyTorch empties a thread's slots after Python has let go of the thread, perhaps of itself."""
    program = """
import threading, torch, convviz_cuda
model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU())
x = torch.randn(1, 3, 8, 8, requires_grad=True)
def work():
    with convviz_cuda.backward_rule("guided"):
        torch.autograd.grad(model(x).sum(), x)
    assert not torch._C._is_key_in_tls("convviz_cuda.backward_rule")
threads = [threading.Thread(target=work) for _ in range(4)]
[t.start() for t in threads]; [t.join() for t in threads]
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""}
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0 and not done.stderr, done.stderr
