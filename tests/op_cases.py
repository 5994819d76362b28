"""The ops' case table. A new op is a row in :data:`CASES`: every test that fits runs over all rows."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from direct_conv_cases import DIRECT_CASES
from mask_cases import MASK_CASES
from op_case import F16, F32, SPECIAL, Case, drawing
from op_truth import (
    Band,
    conv_truth,
    in_place_truth,
    max_abs_truth,
    pool_truth,
    relu_backward_truth,
    relu_truth,
    unpool_truth,
)
from ranked_cases import RANKED_CASES
from torch import Tensor
from window_cases import WINDOW_CASES
from winograd_cases import WINOGRAD_CASES

import convviz_cuda
from convviz_cuda import (
    direct_conv,
    mask_ops,
    mask_reference,
    ops,
    reference,
    window_ops,
    window_reference,
    winograd,
)
from convviz_cuda._register import op_names

RULES = ("gradient", "identity", "deconvnet", "guided")


def _gaps(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, -1)[..., ::2] if x.dim() else x


def _shifted(x: Tensor) -> Tensor:
    """At an address that no vector load may start from."""
    store = x.new_empty(x.numel() + 1)[1:]
    return store.as_strided(x.shape, x.contiguous().stride(), 1).copy_(x)


# The same values (one row of them, for "expanded") in other strides.
ARRANGEMENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x,
    "shifted": _shifted,
    "shifted_channels_last": lambda x: _shifted(x.transpose(1, 3)).transpose(1, 3) if x.dim() == 4 else x,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() > 1 else x,
    "gaps": _gaps,
    "expanded": lambda x: x[..., :1].expand(x.shape) if x.dim() and x.is_floating_point() else x,
}


# ------------------------------------------------------------------------------------------------ rows


def torch_relu(x, lower=0.0, upper=None):
    return F.threshold(x, lower, lower) if upper is None else F.hardtanh(x, lower, upper)


def torch_pool(x, *args, relu=True, **options):
    return F.max_pool2d(F.relu(x) if relu else x, *args, **options)


def dense_stride(size, order) -> list[int]:
    """Strides of a dense tensor whose dims lie in memory in this order, outermost first."""
    stride, step = [0] * len(size), 1
    for dim in reversed(order):
        stride[dim], step = step, step * max(size[dim], 1)
    return stride


# Sizes around the mask's bytes and the vectors' tails; ranks 0, 1, 2, 4 and 5; nothing at all.
RELU_SIZES = [
    (2, 3, 5, 7),
    (),
    (0,),
    (1,),
    (7,),
    (8,),
    (9,),
    (65,),
    (515,),
    (5, 0, 2),
    (3, 5),
    (2, 1, 3, 2, 4),
]
RELU_BOUNDS = [
    {},
    {"upper": 1.0},
    {"lower": -1.0, "upper": 1.0},
    {"lower": 1.0},
    {"lower": -0.7, "upper": 1 / 3},  # which 16-bit values are on either side of
]

# Forward's size, memory order of its dims, K.
SIGNALS = [
    ((2, 16, 2, 2), (0, 2, 3, 1), 2),
    ((), (), 1),
    ((0, 3), (0, 1), 2),
    ((9,), (0,), 1),
    ((3,), (0,), 3),
    ((2, 1), (0, 1), 3),
    ((1, 3, 2), (2, 1, 0), 2),
    ((2, 5, 3, 3), (0, 1, 2, 3), 1),
    ((2, 5, 3, 3), (0, 2, 3, 1), 3),
    ((3, 4, 2, 5), (3, 1, 0, 2), 1),
    ((3, 3), (1, 0), 1),
    ((2, 3, 1, 2, 3), (0, 2, 4, 3, 1), 2),
]

# Input's shape and the pooling: the usual ones, then each argument in turn, then all of them, then the edges.
POOLS: dict[str, tuple[tuple[int, int, int, int], dict[str, Any]]] = {
    "3x3/2-pad": ((2, 3, 7, 8), {"kernel_size": 3, "stride": 2, "padding": 1}),
    "2x2": ((2, 3, 6, 8), {"kernel_size": 2}),
    "3x3/2": ((2, 19, 9, 9), {"kernel_size": 3, "stride": 2}),
    "3x3/1": ((1, 2, 5, 6), {"kernel_size": 3, "stride": 1}),
    "3x3/2-ceil": ((1, 3, 8, 6), {"kernel_size": 3, "stride": 2, "ceil_mode": True}),
    "ceil-drops-last": ((1, 2, 3, 5), {"kernel_size": 2, "stride": 2, "padding": 1, "ceil_mode": True}),
    "dilated": ((1, 2, 9, 8), {"kernel_size": 3, "stride": 1, "dilation": 2}),
    "leaves-gaps": ((2, 2, 9, 7), {"kernel_size": 2, "stride": 3}),
    "all": (
        (2, 2, 9, 11),
        {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 1), "dilation": (1, 2), "ceil_mode": True},
    ),
    "1x1": ((2, 3, 3, 4), {"kernel_size": 1}),
    "row": ((1, 17, 1, 9), {"kernel_size": (1, 3), "stride": (1, 2)}),
    "window-without-positions": ((1, 2, 2, 4), {"kernel_size": 2, "stride": 1, "padding": 1, "dilation": 3}),
    "no-images": ((0, 3, 4, 4), {"kernel_size": 2}),
    "no-channels": ((2, 0, 4, 4), {"kernel_size": 2}),
    "127-positions": ((1, 1, 128, 2), {"kernel_size": (127, 1), "stride": 1}),
    "128-positions": ((1, 2, 17, 9), {"kernel_size": (16, 8), "stride": 1}),
}
WIDEST = ((1, 1, 1, 32769), {"kernel_size": (1, 32768), "stride": 1})

# Input's shape, output channels, kernel, geometry.
CONVS: dict[str, tuple[tuple[int, int, int, int], int, tuple[int, int], dict[str, Any]]] = {
    "3x3-pad": ((2, 3, 6, 7), 20, (3, 3), {"padding": 1}),
    "3x3": ((2, 3, 6, 7), 5, (3, 3), {}),
    "7x7/2": ((1, 3, 15, 14), 9, (7, 7), {"stride": 2, "padding": 3}),
    "11x11/4": ((1, 3, 23, 25), 4, (11, 11), {"stride": 4, "padding": 2}),
    "1x1": ((2, 4, 3, 3), 6, (1, 1), {}),
    "stride-skips": ((1, 2, 8, 8), 3, (2, 2), {"stride": 3}),
    "all": ((2, 1, 9, 12), 3, (3, 2), {"stride": (2, 1), "padding": (0, 3), "dilation": (2, 3)}),
    "no-images": ((0, 3, 5, 5), 2, (3, 3), {}),
}


def _signal_case(number: int, size, order, repeats: int, rule: str) -> Case:
    count, stride = int(np.prod(size)), dense_stride(size, order)
    shape = (repeats * size[0], *size[1:]) if size else ()

    def inputs(draw):
        alive = np.random.default_rng(number).random(count) < 0.5
        return draw(*shape), torch.from_numpy(np.packbits(alive, bitorder="little"))

    options = {"size": list(size), "stride": stride, "rule": rule}
    return Case("relu_backward", f"{number}-K{repeats}-{rule}", inputs, relu_backward_truth, options)


def _pool_case(label: str, shape, options, relu: bool, **extra) -> Case:
    name = f"{label}{'' if relu else '-no_relu'}"
    options = {**options, "relu": relu}
    return Case(
        "relu_max_pool2d", name, lambda draw: (draw(*shape),), pool_truth, options, 0, torch_pool, **extra
    )


def _unpool_case(label: str, shape, options, repeats: int, rule: str, overlap: str, **extra) -> Case:
    def inputs(draw):
        # Finite: the special values are the signal's. Without a ReLU in front no window is dead.
        x = drawing(F32, seed=1)(*shape)
        switches = pool_truth(x, **options, relu=rule != "identity")[1]
        return draw(repeats * shape[0], *switches.shape[1:]), switches

    geometry = {key: value for key, value in options.items() if key != "ceil_mode"}
    options_ = {"size": shape[2:], **geometry, "rule": rule, "overlap": overlap}
    name = f"{label}-K{repeats}-{rule}-{overlap}"
    return Case("switch_unpool2d", name, inputs, unpool_truth, options_, 1, signed=False, **extra)


def _conv_case(label: str, shape, outputs: int, kernel, geometry) -> Case:
    def inputs(draw):
        weight = draw(outputs, shape[1], *kernel)
        mapped = F.conv2d(
            torch.empty(shape, device="meta"), weight.float().to("meta"), None, **geometry
        ).shape
        return draw(*mapped), weight

    return Case(
        "conv2d_input_grad", label, inputs, conv_truth, {"size": shape[2:], **geometry}, 0, special=False
    )


CASES: list[Case] = [
    *(
        Case("relu", f"{i}-{j}", lambda draw, size=size: (draw(*size),), relu_truth, bounds, None, torch_relu)
        for (i, size), (j, bounds) in itertools.product(enumerate(RELU_SIZES), enumerate(RELU_BOUNDS))
        if j < 2 or size == (515,)
    ),
    *(
        Case("relu_", f"{i}", lambda draw, size=size: (draw(*size),), in_place_truth, {"upper": 1.0})
        for i, size in enumerate(RELU_SIZES)
    ),
    *(_signal_case(i, *row, rule) for i, row in enumerate(SIGNALS) for rule in RULES),
    *(_pool_case(label, *row, relu) for label, row in POOLS.items() for relu in (True, False)),
    *(
        _unpool_case(label, *row, 1 + (i + j + 1) % 3, rule, overlap)
        for i, (label, row) in enumerate(POOLS.items())
        for j, (rule, overlap) in enumerate(itertools.product(RULES, ("sum", "overwrite")))
        if label in ("2x2", "3x3/2", "3x3/2-pad", "all") or (i + j) % 4 == 0
    ),
    _pool_case("32768-positions", *WIDEST, True, dtypes=(F16,), special=False),
    _unpool_case("32768-positions", *WIDEST, 1, "gradient", "sum", dtypes=(F16,)),
    *(_conv_case(label, *row) for label, row in CONVS.items()),
    *(
        Case(
            "max_abs_channels",
            "x".join(map(str, shape)),
            lambda draw, shape=shape: (draw(*shape),),
            max_abs_truth,
        )
        for shape in [(2, 3, 4, 5), (1, 1, 3, 3), (2, 37, 2, 3), (3, 4, 1, 70), (0, 3, 2, 2), (2, 3, 0, 4)]
    ),
    *WINDOW_CASES,
    *WINOGRAD_CASES,
    *MASK_CASES,
    *RANKED_CASES,
    *DIRECT_CASES,
]


# --------------------------------------------------------------------------------------------- harness

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SERVED = convviz_cuda.info()["ops"]
# The module and the attribute in it by which the public functions call each op.
OVERLOADS = {
    value.name().removeprefix("convviz::"): (module, name)
    for module in (ops, window_ops, winograd, direct_conv, mask_ops)
    for name, value in vars(module).items()
    if isinstance(value, torch._ops.OpOverload) and value.namespace == "convviz"
}
REFERENCES = {
    ops: vars(reference),
    window_ops: vars(window_reference),
    winograd: winograd.REFERENCES,
    direct_conv: direct_conv.REFERENCES,
    mask_ops: vars(mask_reference),
}
BY_OP = {name: [case for case in CASES if case.op == name] for name in op_names()}
# The first row of each op is a full one (overlapping windows, padding, tails, K > 1), for the slower tests.
TYPICAL = [cases[0] for cases in BY_OP.values() if cases]
typical = pytest.mark.parametrize("case", TYPICAL, ids=str)


def subjects(op: str) -> list[str]:
    """What can serve an op here: the dispatcher on each device, and the reference where that is another."""
    return [*DEVICES, *(["reference"] if SERVED[op]["cpu"] != "reference" else [])]


@contextlib.contextmanager
def serving(subject: str):
    """The public functions call the dispatched ops, or the references; yields the device."""
    with pytest.MonkeyPatch.context() as patch:
        if subject == "reference":
            for name, (module, attribute) in OVERLOADS.items():
                patch.setattr(module, attribute, REFERENCES[module][name])
        yield "cpu" if subject == "reference" else subject


@functools.cache
def prepared(case: Case, dtype: torch.dtype, arrangement: str):
    """A row's inputs and the truth about them."""
    draw = drawing(dtype, SPECIAL if case.special else ())
    inputs = tuple(ARRANGEMENTS[arrangement](x) for x in case.inputs(draw))
    expected = case.apply(case.truth, inputs)
    return inputs, expected if isinstance(expected, tuple) and not isinstance(expected, Band) else (expected,)


def on(device: str, tensors, arrangement: str):
    """Copies with the strides, offsets and overlaps that the arrangement gives."""
    return tuple(ARRANGEMENTS[arrangement](x.contiguous().clone().to(device)) for x in tensors)
