"""First and second derivatives of the ops; the ops under vmap, batched autograd, torch.compile, opcheck."""

from __future__ import annotations

import math

import pytest
import torch
from op_case import DTYPES, F32, F64, SPECIAL, TIES, drawing
from op_cases import ARRANGEMENTS, CASES, OVERLOADS, TYPICAL, typical
from op_truth import Band, assert_all_same, assert_same
from torch._dynamo.testing import CompileCounterWithBackend

from convviz_cuda import ops

# ------------------------------------------------------------------------------------ PyTorch, autograd


# PyTorch's gradient reads out of bounds for a window without a valid position.
TWINS = [
    case
    for case in CASES
    if case.pytorch and not case.label.startswith(("no-", "window-without")) and case.dtypes == DTYPES
]


@pytest.mark.parametrize("case", TWINS, ids=str)
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_value_and_gradient_equal_pytorchs(case, dtype):
    (x,) = case.inputs(drawing(dtype, TIES))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = case(ours)[0], case.pytorch(theirs, **case.options)
    assert_same(out, expected.detach(), signed=False)
    signal = drawing(dtype, SPECIAL, 1)(*out.shape)
    (pulled,) = torch.autograd.grad(out, ours, signal)
    assert_same(pulled, torch.autograd.grad(expected, theirs, signal)[0], signed=False)


def distinct(*shape, offset=0.37):
    """Values that are apart from each other and from zero, so that derivatives exist."""
    count = math.prod(shape)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(count))
    return ((order - count // 2 + offset) / 4).double().view(shape)


def _unpooled(rule, repeats):
    def function(signal):
        _, switches = ops.relu_max_pool2d(distinct(1, 2, 5, 5), 3, 2, 1, relu=rule != "identity")
        return ops.switch_unpool2d(signal, switches, (5, 5), 3, 2, 1, rule=rule)

    return function, (distinct(repeats, 2, 3, 3),)


def _gated(signal):
    out, mask = ops.relu(distinct(2, 3))
    return ops.relu_backward(signal, mask, out.shape, out.stride())


DIFFERENTIABLE = {
    "relu": (lambda x: ops.relu(x, -1.0, 2.0)[0], (distinct(3, 5),)),
    "relu-scalar": (lambda x: ops.relu(x)[0], (torch.tensor(1.5, dtype=F64),)),
    "relu_backward": (_gated, (distinct(4, 3),)),
    "relu_max_pool2d": (lambda x: ops.relu_max_pool2d(x, 3, 2, 1)[0], (distinct(2, 2, 5, 4),)),
    "max_pool2d": (lambda x: ops.relu_max_pool2d(x, 3, 2, 1, relu=False)[0], (distinct(1, 2, 5, 4),)),
    "switch_unpool2d": _unpooled("gradient", 2),
    "switch_unpool2d-identity": _unpooled("identity", 1),
    "conv2d_input_grad": (
        lambda g, w: ops.conv2d_input_grad(g, w, (3, 4), (2, 1), 1, (1, 2)),
        (distinct(2, 2, 2, 4), distinct(2, 2, 3, 2)),
    ),
    "max_abs_channels": (ops.max_abs_channels, (distinct(2, 3, 2, 2),)),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradcheck(name):
    function, inputs = DIFFERENTIABLE[name]
    inputs = tuple(x.clone().requires_grad_() for x in inputs)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)
    out = function(*inputs)  # gradgradcheck passes over a first derivative that is cut off from the graph
    signal = torch.ones_like(out, requires_grad=True)
    assert all(grad.requires_grad for grad in torch.autograd.grad(out, inputs, signal, create_graph=True))


@pytest.mark.parametrize("rule", ["deconvnet", "guided"])
def test_other_rules_have_no_double_backward(rule):
    signal = torch.ones(1, 1, 2, 2, requires_grad=True)
    out, mask = ops.relu(torch.ones(1, 1, 2, 2))
    _, switches = ops.relu_max_pool2d(torch.ones(1, 1, 4, 4), 2)
    for result in (
        ops.relu_backward(signal, mask, out.shape, out.stride(), rule),
        ops.switch_unpool2d(signal, switches, (4, 4), 2, rule=rule),
    ):
        with pytest.raises(
            RuntimeError, match=f"Double backward through the {rule} rule is not defined: .*'gradient'"
        ):
            result.sum().backward()


def test_overwrite_has_no_double_backward():
    signal = torch.ones(1, 1, 2, 2, requires_grad=True)
    _, switches = ops.relu_max_pool2d(torch.ones(1, 1, 4, 4), 2)
    result = ops.switch_unpool2d(signal, switches, (4, 4), 2, overlap="overwrite")
    with pytest.raises(RuntimeError, match="overlap='sum' only"):
        result.sum().backward()


BATCHABLE = [
    case for case in CASES if not case.in_place and case.dtypes == DTYPES and "no-" not in case.label
]


@pytest.mark.parametrize("case", BATCHABLE, ids=str)
def test_vmap_equals_a_loop(case):
    first, *rest = case.inputs(drawing(F32))
    signals = [first, -first, first * 2]
    expected = [torch.stack(column) for column in zip(*(case(x, *rest) for x in signals), strict=True)]
    doubled = torch.stack([x for x in signals for _ in range(2)])
    for stacked, dim in (
        (torch.stack(signals), 0),
        (torch.stack(signals, -1), first.dim()),
        (doubled[::2], 0),  # with gaps between the signals
    ):
        results = torch.func.vmap(lambda x: case(x, *rest), in_dims=dim)(stacked)
        assert_close_as(case, results, expected)


def assert_close_as(case, results, expected):
    """Exactly, but for a convolution, which may sum in another order."""
    if case.op == "conv2d_input_grad":
        expected = [Band(x.double(), 1e-5 * x.double().abs().max().expand(x.shape)) for x in expected]
    assert_all_same(results, expected, signed=case.signed)


@pytest.mark.parametrize("case", [case for case in TYPICAL if not case.in_place], ids=str)
def test_vmap_over_every_argument_equals_a_loop(case):
    inputs = case.inputs(drawing(F32))
    stacked = [torch.stack([x, x.flip(0)]) for x in inputs]
    expected = [
        torch.stack(column) for column in zip(*(case(*x) for x in zip(*stacked, strict=True)), strict=True)
    ]
    assert_close_as(case, torch.func.vmap(lambda *tensors: case(*tensors))(*stacked), expected)
    if len(inputs) > 1:  # the other argument alone
        expected = [
            torch.stack(column)
            for column in zip(*(case(inputs[0], x, *inputs[2:]) for x in stacked[1]), strict=True)
        ]
        results = torch.func.vmap(lambda x: case(inputs[0], x, *inputs[2:]))(stacked[1])
        assert_close_as(case, results, expected)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_batched_gradients_equal_a_loop(name, layout):
    function, inputs = DIFFERENTIABLE[name]
    inputs = tuple(x.clone().requires_grad_() for x in inputs)
    out = function(*(ARRANGEMENTS[layout](x) for x in inputs))
    signals = drawing(F64, ())(3, *out.shape)
    results = torch.autograd.grad(out, inputs, signals, retain_graph=True, is_grads_batched=True)
    loop = [torch.autograd.grad(out, inputs, signal, retain_graph=True) for signal in signals]
    torch.testing.assert_close(results, tuple(torch.stack(column) for column in zip(*loop, strict=True)))


@typical
def test_opcheck(case, monkeypatch):
    op, calls = getattr(torch.ops.convviz, case.op).default, []
    monkeypatch.setattr(*OVERLOADS[case.op], lambda *args: calls.append(args) or op(*args))
    case(*case.inputs(drawing(F32, ())))
    case(*(ARRANGEMENTS["channels_last"](x) for x in case.inputs(drawing(case.dtypes[0], ()))))
    monkeypatch.undo()
    once_only = case.in_place or case.options.get("rule") in ("deconvnet", "guided")
    for first, *rest in calls:
        first = first.clone().requires_grad_(case.differentiable and not once_only)
        torch.library.opcheck(op, (first, *rest))


@pytest.mark.parametrize("case", [case for case in CASES if case.dtypes == DTYPES], ids=str)
def test_shapes_and_strides_are_known_without_data(case):
    for arrangement in ("contiguous", "channels_last"):
        inputs = [ARRANGEMENTS[arrangement](x) for x in case.inputs(drawing(case.dtypes[0]))]
        for fake, result in zip(case(*(x.to("meta") for x in inputs)), case(*inputs), strict=True):
            assert (fake.shape, fake.dtype) == (result.shape, result.dtype)
            if result.numel():
                strides = zip(result.shape, fake.stride(), result.stride(), strict=True)
                assert all(size == 1 or expected == actual for size, expected, actual in strides)


@typical
def test_compiles_without_graph_breaks(case):
    torch.compiler.reset()
    for arrangement in ("contiguous", "channels_last", "transposed"):
        inputs = [ARRANGEMENTS[arrangement](x) for x in case.inputs(drawing(F32))]
        compiled = torch.compile(case.__call__, fullgraph=True, backend="aot_eager")
        assert_close_as(case, compiled(*(x.clone() for x in inputs)), case(*(x.clone() for x in inputs)))


def test_compiles_with_gradients_and_symbolic_sizes():
    def function(x, weight):
        signal, mask = ops.relu(x)
        pooled, switches = ops.relu_max_pool2d(signal, 3, 2, 1)
        back = ops.switch_unpool2d(pooled, switches, x.shape[2:], 3, 2, 1)
        back = ops.relu_backward(back, mask, signal.shape, signal.stride())
        return ops.max_abs_channels(ops.conv2d_input_grad(back, weight, [n + 2 for n in x.shape[2:]])).sum()

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=True)
    shapes = (2, 4, 9, 8), (3, 4, 7, 11), (4, 4, 8, 6), (5, 4, 11, 9), (6, 4, 6, 10)
    for shape in shapes:
        x, weight = drawing(F64, ())(*shape).requires_grad_(), drawing(F64, (), 1)(4, 3, 3, 3)
        expected = function(x, weight)
        torch.testing.assert_close(compiled(x, weight), expected)
        torch.testing.assert_close(
            torch.autograd.grad(compiled(x, weight), x), torch.autograd.grad(expected, x)
        )
    assert counter.frame_count < len(shapes)  # not one graph for each shape


@pytest.mark.slow
def test_inductor_compiles_the_ops():
    def function(x):
        pooled, switches = ops.relu_max_pool2d(x * 2, 2)
        return ops.switch_unpool2d(pooled + 1, switches, (8, 8), 2, rule="guided") * 3

    x = drawing(F32, ())(2, 3, 8, 8)
    torch.testing.assert_close(torch.compile(function, fullgraph=True)(x), function(x))
