"""The contexts of backward rules: nested, in threads, broken off, and what they warn of and refuse."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import subprocess
import sys
import threading
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from rules_cases import RULES, W1, W2, by_engine, by_oracle, chain, pooled, weights
from torch import nn

import convviz_cuda as cv
from convviz_cuda import rules


@pytest.fixture
def images():
    return weights(2, 3, 14, 13, seed=7)


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
