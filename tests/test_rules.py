"""The backward engine against autograd and a per-operation float64 model of the rules: ReLUs and their pools."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
import torch.nn.functional as F
from rules_cases import RULES, W1, W2, W3, Rectify, by_engine, by_oracle, chain, pooled, weights
from torch import Tensor, nn

import convviz_cuda as cv
from convviz_cuda import ops

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


def reused(x, relu):
    return F.conv2d(relu(F.conv2d(relu(F.conv2d(x, W1)), W3)), W2)


def parallel(x, relu):
    h = F.conv2d(x, W1)
    return F.conv2d(relu(h + 0), W2).sum() + (relu(h * 1) * W3[:, 0]).sum()


def skip(x, relu):
    """A tensor read by a ReLU and by something else: the rule acts on the ReLU's branch only."""
    h = F.conv2d(x, W1)
    return F.conv2d(relu(h.clone()), W2).sum() + (h * W3[:, 0]).sum()


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
