"""What the public op functions refuse: which exception, a sentence with the value, and nothing changed."""

from __future__ import annotations

import re

import pytest
import torch

from convviz_cuda import info, ops

X = torch.linspace(-2, 2, 32).view(1, 2, 4, 4)
OUT, MASK = ops.relu(X)
POOLED, SWITCHES = ops.relu_max_pool2d(X, 2)
WEIGHT = torch.ones(2, 3, 3, 3)


def pool(**options):
    return ops.relu_max_pool2d(**{"x": X, "kernel_size": 2} | options)


def unpool(**options):
    return ops.switch_unpool2d(
        **{"grad": POOLED, "switches": SWITCHES, "size": (4, 4), "kernel_size": 2} | options
    )


def gated(**options):
    return ops.relu_backward(**{"grad": X, "mask": MASK, "size": OUT.shape, "stride": OUT.stride()} | options)


def conv(**options):
    return ops.conv2d_input_grad(**{"grad": X, "weight": WEIGHT, "size": (6, 6)} | options)


# The call, its wrong argument, the exception, words of its sentence.
REFUSED = [
    *(
        (call, {name: value}, TypeError, words)
        for call, name in (
            (ops.relu, "x"),
            (ops.relu_, "x"),
            (gated, "grad"),
            (pool, "x"),
            (unpool, "grad"),
            (conv, "grad"),
            (conv, "weight"),
            (ops.max_abs_channels, "x"),
        )
        for value, words in (
            (None, f"{name} must be a tensor, but it is a NoneType."),
            (X.int(), f"{name} must be float64, float32, bfloat16 or float16, but it is torch.int32."),
            (X.to(torch.complex64), "torch.complex64"),
        )
    ),
    *(
        (
            call,
            {name: X[0]},
            ValueError,
            f"{name} must have the shape (N, C, H, W), but it has the shape (2, 4, 4).",
        )
        for call, name in (
            (pool, "x"),
            (unpool, "grad"),
            (conv, "grad"),
            (conv, "weight"),
            (ops.max_abs_channels, "x"),
        )
    ),
    *(
        (call, {name: value}, error, words)
        for call, names in (
            (pool, ("kernel_size", "stride", "padding", "dilation")),
            (unpool, ("kernel_size", "stride", "padding", "dilation", "size")),
            (conv, ("stride", "padding", "dilation", "size")),
        )
        for name in names
        for value, error, words in (
            ((1, 2, 3), TypeError, f"{name} must be an int or a pair of ints, but it is (1, 2, 3)."),
            ("2", TypeError, f"{name} must be an int or a pair of ints, but it is '2'."),
            (2.0, TypeError, "2.0"),
            (True, TypeError, "True"),
            ((2, None), TypeError, "(2, None)"),
            (
                (2, -1),
                ValueError,
                f"{name} must be at least {int(name not in ('padding', 'size'))}, but it is (2, -1).",
            ),
        )
    ),
    *(
        (call, wrong, ValueError, "fewer than 2**31 positions, and stride and dilation must be below 2**31")
        for call in (pool, unpool)
        for wrong in (
            {"kernel_size": 70000, "stride": 70000, "padding": 35000},
            {"kernel_size": 2**33},
            {"kernel_size": (1, 2**31)},
            {"stride": 2**31},
            {"dilation": (1, 2**40)},
        )
    ),
    *(
        (gated, {name: value}, error, words)
        for name in ("size", "stride")
        for value, error, words in (
            (384, TypeError, f"{name} must be a sequence of ints, but it is 384."),
            ("1244", TypeError, f"{name} must be a sequence of ints, but it is '1244'."),
            ((1.0, 2, 4, 4), TypeError, f"{name} must hold ints, but it is (1.0, 2, 4, 4)."),
            ((True, 2, 4, 4), TypeError, f"{name} must hold ints"),
            ((-1, 2, 4, 4), ValueError, f"{name} must hold no negative numbers, but it is (-1, 2, 4, 4)."),
        )
    ),
    *(
        (
            call,
            {"x": X.to_sparse()},
            TypeError,
            "x must be a dense tensor, but its layout is torch.sparse_coo.",
        )
        for call in (ops.relu, ops.relu_, pool, ops.max_abs_channels)
    ),
    *(
        (call, {name: 0}, ValueError, f"{name} must be at least 1, but it is 0.")
        for call in (pool, unpool, conv)
        for name in ("stride", "dilation", "kernel_size")
        if (call, name) != (conv, "kernel_size")
    ),
    *(
        (
            call,
            {"kernel_size": kernel, "padding": (0, 2), "dilation": dilation},
            ValueError,
            "at most half of",
        )
        for call in (pool, unpool)
        for kernel, dilation in ((2, 1), (3, 1), (2, 3))  # the dilation does not count, as in PyTorch
    ),
    *(
        (
            call,
            {"rule": rule},
            ValueError,
            f"rule must be one of 'identity', 'gradient', 'deconvnet', 'guided', but it is {rule!r}.",
        )
        for call in (gated, unpool)
        for rule in ("Guided", 3, None, ["guided"])
    ),
    *(
        (call, {"x": X, "lower": lower, "upper": upper}, error, words)
        for call in (ops.relu, ops.relu_)
        for lower, upper, error, words in (
            (1.0, 0.5, ValueError, "upper must be at least lower, but lower is 1.0 and upper is 0.5."),
            (0.0, float("nan"), ValueError, "upper is nan"),
            (float("nan"), None, ValueError, "lower is nan"),
            ("0", None, TypeError, "lower must be a number, but it is '0'."),
            (None, None, TypeError, "lower must be a number, but it is None."),
            (0.0, X, TypeError, "upper must be a number"),
        )
    ),
    (
        ops.relu_,
        {"x": X[..., ::2]},
        ValueError,
        "relu_ needs a dense tensor, but x has the shape (1, 2, 4, 2)",
    ),
    (ops.relu_, {"x": X[..., :1].expand(X.shape)}, ValueError, "strides (32, 16, 4, 0)"),
    (
        ops.relu_,
        {"x": X.clone().requires_grad_()},
        ValueError,
        "relu_ is not differentiable, but x requires a gradient",
    ),
    (
        gated,
        {"grad": X[:, :1]},
        ValueError,
        "grad must have the shape (K * 1, *(2, 4, 4)), but it has the shape (1, 1, 4, 4)",
    ),
    (gated, {"grad": X[0]}, ValueError, "but it has the shape (2, 4, 4)"),
    (gated, {"mask": None}, TypeError, "mask must be a tensor, but it is a NoneType."),
    (
        gated,
        {"mask": MASK[:-1]},
        ValueError,
        "mask must be uint8 of 4 bytes on cpu, but it is torch.uint8 of the shape (3,)",
    ),
    (gated, {"mask": MASK.int()}, ValueError, "but it is torch.int32 of the shape (4,)"),
    (gated, {"mask": MASK.view(2, 2)}, ValueError, "of the shape (2, 2)"),
    (gated, {"mask": MASK.to("meta")}, ValueError, "on meta"),
    (gated, {"stride": (32, 16, 4)}, ValueError, "size and stride must have the same length"),
    (gated, {"stride": (64, 32, 8, 2)}, ValueError, "size and stride must be those of a dense tensor"),
    (gated, {"stride": (0, 0, 0, 0)}, ValueError, "[0, 0, 0, 0]"),
    (
        ops.relu_backward,
        {"grad": X.view(8, 4), "mask": MASK[:2], "size": (4, 4), "stride": (1, 4)},
        ValueError,
        "need its first dim outermost in memory, not [1, 4]",
    ),
    (
        ops.relu_backward,
        {"grad": X.view(8, 4), "mask": MASK[:3], "size": (5, 4), "stride": (4, 1)},
        ValueError,
        "grad must have a multiple of the forward's 5 examples in its first dimension, but it has 8.",
    ),
    (
        pool,
        {"kernel_size": 5},
        ValueError,
        "The input of (4, 4) is too small for kernel_size 5: the output would have the size (0, 0)",
    ),
    (pool, {"x": X[:, :, :0]}, ValueError, "(1, 2, 0, 4)"),
    (unpool, {"overlap": "max"}, ValueError, "overlap must be 'sum' or 'overwrite', but it is 'max'."),
    (unpool, {"switches": None}, TypeError, "switches must be a tensor, but it is a NoneType."),
    (unpool, {"switches": SWITCHES[:, :1]}, ValueError, "but they have the shape (1, 1, 2, 2) on cpu"),
    (unpool, {"switches": SWITCHES[0]}, ValueError, "but they have the shape (2, 2, 2) on cpu"),
    (unpool, {"switches": SWITCHES.to("meta")}, ValueError, "on meta"),
    (
        unpool,
        {"switches": SWITCHES.short()},
        TypeError,
        "switches of 2 windows are torch.int8, but these are torch.int16.",
    ),
    (unpool, {"switches": POOLED}, TypeError, "but these are torch.float32."),
    (
        unpool,
        {"grad": POOLED.repeat(3, 1, 1, 1), "switches": SWITCHES.repeat(2, 1, 1, 1)},
        ValueError,
        "grad must have a multiple of the forward's 2 examples in its first dimension, but it has 3.",
    ),
    (
        unpool,
        {"size": (4, 7)},
        ValueError,
        "Pooling an input of (4, 7) gives maps of (2, 3) (ceil_mode: (2, 4)), but grad has maps of (2, 2).",
    ),
    (
        conv,
        {"weight": WEIGHT.double()},
        TypeError,
        "weight must be torch.float32 on cpu as grad is, but it is torch.float64 on cpu.",
    ),
    (conv, {"weight": WEIGHT.to("meta")}, TypeError, "on meta"),
    (
        conv,
        {"weight": WEIGHT[:1]},
        ValueError,
        "weight must have 2 output channels and no empty dim, but its shape is (1, 3, 3, 3).",
    ),
    (conv, {"weight": WEIGHT[:, :0]}, ValueError, "(2, 0, 3, 3)"),
    (
        conv,
        {"weight": torch.ones(2, 5, 3, 3)},
        ValueError,
        "weight must have at most 4 input channels, but it has 5.",
    ),
    (
        conv,
        {"size": (6, 7)},
        ValueError,
        "A convolution of a (6, 7) input gives maps of (4, 5), but grad has maps of (4, 4).",
    ),
    (
        ops.max_abs_channels,
        {"x": X[:, :0]},
        ValueError,
        "x must have at least one channel, but it has the shape (1, 0, 4, 4).",
    ),
]


@pytest.mark.parametrize(
    ("call", "wrong", "error", "words"),
    REFUSED,
    ids=[f"{call.__name__}-{'-'.join(wrong)}-{i}" for i, (call, wrong, _, _) in enumerate(REFUSED)],
)
def test_bad_arguments(call, wrong, error, words):
    before = [x.detach().clone() for x in (X, MASK, POOLED, SWITCHES, WEIGHT)]
    with pytest.raises(error, match=re.escape(words)) as caught:
        call(**wrong)
    assert str(caught.value).endswith(".")
    assert all(torch.equal(x, y) for x, y in zip((X, MASK, POOLED, SWITCHES, WEIGHT), before, strict=True))


@pytest.mark.parametrize("kernel", [2**33, 2**17, (1, 2**31)])
def test_kernels_refuse_what_no_switch_can_hold(kernel):
    """Called past the checks of the functions."""
    if info()["ops"]["relu_max_pool2d"]["cpu"] == "reference":
        pytest.skip("this build has no kernels")
    k = list(kernel) if isinstance(kernel, tuple) else [kernel] * 2
    half = [n // 2 for n in k]
    with pytest.raises(RuntimeError, match=r"2\^31"):
        torch.ops.convviz.relu_max_pool2d(X, k, k, half, [1, 1], False, True)
    with pytest.raises(RuntimeError, match=r"2\^31"):
        torch.ops.convviz.switch_unpool2d(X, SWITCHES.int(), [4, 4], k, k, half, [1, 1], 1, False)


def test_an_upper_bound_may_equal_the_lower():
    out, mask = ops.relu(X, 1.0, 1.0)
    assert (out == 1).all() and (mask == 0).all()


@pytest.mark.parametrize("value", [[2], [2, 2], (2,), torch.Size([2, 2])])
def test_one_number_or_two(value):
    assert torch.equal(pool(kernel_size=value)[1], SWITCHES)
    assert torch.equal(pool(kernel_size=2, stride=value)[1], SWITCHES)


@pytest.mark.parametrize("stride", [None, [], ()])
def test_the_stride_is_the_kernel_size_by_default(stride):
    assert torch.equal(pool(kernel_size=(2, 1), stride=stride)[1], pool(kernel_size=(2, 1), stride=(2, 1))[1])
