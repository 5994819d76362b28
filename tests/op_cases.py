"""The ops' case table. A new op is a row in :data:`CASES`: every test that fits runs over all rows."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
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
from torch import Tensor
from window_truth import (
    add_truth,
    gather_into_truth,
    gather_truth,
    occlude_truth,
    window_mean_truth,
    window_pool_truth,
    window_sum_truth,
)

import convviz_cuda
from convviz_cuda import ops, reference, window_ops, window_reference
from convviz_cuda._register import op_names

F64, F32, BF16, F16 = DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
RULES = ("gradient", "identity", "deconvnet", "guided")


@dataclass(frozen=True, eq=False)
class Case:
    """One call: ``inputs(draw)`` makes the tensors, ``options`` are the other arguments."""

    op: str
    label: str
    inputs: Callable[[Callable[..., Tensor]], tuple[Tensor, ...]]
    truth: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)
    like: int | None = None  # the input whose layout the results have
    pytorch: Callable[..., Tensor] | None = None  # the same function in PyTorch, differentiable
    special: bool = True  # defined for NaN and infinities, number by number
    signed: bool = True  # the sign of a zero is defined too
    dtypes: tuple[torch.dtype, ...] = DTYPES
    last: str | None = None  # the name by which the last tensor is given

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        result = self.apply(getattr(ops, self.op), tensors)
        results = result if isinstance(result, tuple) else () if result is None else (result,)
        return (tensors[0], *results) if self.in_place else results

    def apply(self, function: Callable[..., Any], tensors: tuple[Tensor, ...]) -> Any:
        if self.last is None:
            return function(*tensors, **self.options)
        return function(*tensors[:-1], **{self.last: tensors[-1]}, **self.options)

    @property
    def differentiable(self) -> bool:
        return OVERLOADS[self.op][0] is ops

    @property
    def in_place(self) -> bool:
        return self.op.endswith("_")

    def __str__(self) -> str:
        return f"{self.op}-{self.label}"


# --------------------------------------------------------------------------------------------- inputs

# Few values, so that windows and channels tie, and zeros of both signs; all sums of them are exact.
TIES = (-2.0, -1.0, -0.0, 0.0, 0.0, 1.0, 1.0, 3.0)
# Fractions, whose sums depend on the order; what is not finite is rare, as it drowns the rest.
SPECIAL = (*TIES * 2, 0.1, -0.7, 1 / 3, 33.3, -33.2, float("nan"), float("inf"), float("-inf"))


def drawing(dtype: torch.dtype, values: tuple[float, ...] = TIES, seed: int = 0) -> Callable[..., Tensor]:
    """A function from a shape to a tensor with these values, or normal ones where there are none."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        if not values:
            return torch.randn(shape, generator=generator, dtype=F64).to(dtype)
        return torch.tensor(values, dtype=dtype)[torch.randint(len(values), shape, generator=generator)]

    return draw


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
    {"lower": 0.3, "upper": 0.7},
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


# The shapes of base, patch and result. The patch may be larger than the result or the map, or nothing at all.
WINDOWS: dict[str, tuple[tuple[int, int, int, int], tuple[int, int, int], tuple[int, int]]] = {
    "typical": ((2, 37, 6, 7), (5, 3, 4), (5, 6)),
    "16-channels": ((2, 16, 5, 5), (4, 3, 3), (4, 4)),
    "64-channels": ((1, 64, 3, 3), (2, 2, 1), (3, 3)),
    "3-channels": ((2, 3, 6, 7), (4, 2, 3), (4, 5)),
    "1-channel": ((1, 1, 5, 4), (3, 2, 2), (3, 9)),
    "1-pixel": ((3, 8, 4, 4), (5, 1, 1), (3, 3)),
    "large-patch": ((1, 5, 4, 3), (3, 6, 7), (5, 4)),
    "no-rows": ((2, 4, 5, 5), (3, 0, 2), (3, 3)),
    "no-columns": ((2, 4, 5, 5), (3, 2, 0), (3, 3)),
    "no-variants": ((2, 4, 5, 5), (0, 2, 2), (3, 3)),
    "no-images": ((0, 4, 5, 5), (0, 2, 2), (3, 3)),
    "no-channels": ((2, 0, 5, 5), (3, 2, 2), (3, 3)),
    "no-map": ((2, 4, 0, 5), (3, 2, 2), (3, 3)),
    "no-result": ((2, 4, 5, 5), (3, 2, 2), (0, 3)),
}
FARTHEST = (-(2**63), -(2**62), -(2**40) - 3, 2**40 + 3, 2**63 - 1)


def window_tables(seed: int, base, count: int, patch, size, columns: int, wild: bool = False):
    """Variants, rows and cols. Results and patches begin everywhere, also before and behind the map.

    Wild ones say what no table should, and the kernels must not follow.
    """
    rng = np.random.default_rng(seed)
    lines = 4
    indices = [
        rng.integers(-2, n + 2, count) if wild else rng.integers(0, max(n, 1), count) for n in (base[0], 4, 3)
    ]
    tables = []
    for axis in (0, 1):
        starts = rng.integers(-patch[axis], base[2 + axis] + 1, lines - axis)
        ends = starts + rng.integers(0, base[2 + axis] + 2, lines - axis)
        origins = rng.integers(-size[axis], base[2 + axis] + 1, lines - axis)
        # The usual: a result around a patch that lies in the map.
        starts[0] = max(0, (base[2 + axis] - patch[axis]) // 2)
        ends[0], origins[0] = starts[0] + patch[axis], starts[0] - 1
        table = np.stack({1: [starts], 2: [origins, starts], 3: [origins, starts, ends]}[columns], 1)
        if wild:
            table[1:] = rng.choice(FARTHEST, table[1:].shape)
        tables.append(torch.from_numpy(table))
    return torch.from_numpy(np.stack(indices, 1)), *tables


def _sources(draw, label: str, columns: int, wild: bool):
    base, (count, *patch), size = WINDOWS[label]
    tables = window_tables(len(label), base, count, patch, size, columns, wild)
    return draw(*base), draw(count, base[1], *patch), *tables


def _window_case(
    op: str, label: str, truth, columns: int = 2, options=None, bias=False, wild=False, **extra
) -> Case:
    base, (count, *patch), size = WINDOWS[label]
    out = op.endswith("_")

    def inputs(draw):
        tensors = _sources(draw, label, columns, wild)
        if out:
            channel = extra_channels(options, base[1])
            tensors = draw(count, channel, *size), *tensors
        # An infinite bias is none.
        return (*tensors, drawing(tensors[0].dtype, TIES, 3)(base[1])) if bias else tensors

    name = "-".join(
        [label, *(f"{k}={v}" for k, v in (options or {}).items()), *["bias"] * bias, *["wild"] * wild]
    )
    given = dict(options or {})
    if op in ("gather_windows", "pool_windows"):
        given["size"] = size
    like = None if out or op == "sum_windows" else 0 if 0 in patch or patch == [1, 1] or base[1] == 1 else 1
    if 0 in base or count == 0:
        like = None
    return Case(op, name.replace(" ", ""), inputs, truth, given, like, last="bias" if bias else None, **extra)


def extra_channels(options, channels: int) -> int:
    return channels + (0 if "channel" not in (options or {}) else options["channel"] + 2)


# Fills by the shape that broadcasts.
OCCLUSIONS = {
    "colour": ((2, 3, 6, 7), (1, 3, 1, 1)),
    "number": ((2, 3, 6, 7), ()),
    "image": ((2, 3, 6, 7), (3, 6, 7)),
    "each-its-own": ((2, 3, 6, 7), (2, 3, 6, 7)),
    "grey-image": ((2, 3, 6, 7), (1, 1, 6, 7)),
    "column": ((2, 3, 6, 7), (7,)),
    "1-channel": ((3, 1, 5, 5), (1, 1, 1, 1)),
    "16-channels": ((2, 16, 4, 5), (1, 16, 4, 5)),
    "17-channels": ((2, 17, 4, 5), (17, 1, 1)),
    "no-variants": ((2, 3, 6, 7), ()),
    "no-images": ((0, 3, 6, 7), (1, 3, 1, 1)),
    "no-channels": ((2, 0, 6, 7), ()),
}


def _occlude_case(label: str, region: bool, wild: bool = False) -> Case:
    shape, fill = OCCLUSIONS[label]
    size = (4, 5) if region else shape[2:]
    count = 0 if label.startswith(("no-v", "no-i")) else 6

    def inputs(draw):
        variants, rows, cols = window_tables(len(label), shape, count, (2, 3), size, 3, wild)
        if not region:  # whole images
            rows[:, 0] = cols[:, 0] = 0
        return draw(*shape), draw(*fill), variants, rows, cols

    name = f"{label}{'-region' * region}{'-wild' * wild}"
    like = None if 0 in shape or count == 0 else 0
    return Case("occlude", name, inputs, occlude_truth, {"size": size}, like)


WINDOW_POOLS = [
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 2},
    {"kernel_size": (3, 2), "stride": (1, 2), "padding": (1, 0), "dilation": (2, 1)},
    {"kernel_size": 9, "stride": 1, "padding": 4},
    {"kernel_size": 3, "stride": 2, "padding": 1, "average": True},
    {"kernel_size": (2, 3), "stride": (3, 1), "average": True, "count_include_pad": False},
    {"kernel_size": 3, "stride": 1, "padding": 1, "average": True, "count_include_pad": False},
    {"kernel_size": 3, "stride": 1, "padding": 1, "average": True, "divisor_override": -2},
    {"kernel_size": 9, "stride": 2, "padding": 4, "average": True},
]

# Maps' number, grid, map, window and stride: gaps, clipped windows, a window over all, nothing.
MEANS = [
    (2, (3, 4), (9, 8), (4, 3), (3, 2)),
    (1, (5, 3), (5, 7), (3, 3), (1, 3)),
    (3, (2, 2), (7, 9), (2, 1), (4, 5)),
    (2, (1, 1), (4, 5), (9, 9), (2, 2)),
    (1, (9, 9), (3, 3), (2, 2), (1, 1)),
    (0, (2, 2), (3, 3), (2, 2), (1, 1)),
    (2, (0, 2), (3, 3), (2, 2), (1, 1)),
    (2, (2, 2), (0, 3), (2, 2), (1, 1)),
]

WINDOW_CASES = [
    *(_occlude_case(label, region) for label in OCCLUSIONS for region in (True, False)),
    _occlude_case("colour", True, wild=True),
    *(
        _window_case("gather_windows", label, gather_truth, options=options, bias=bias)
        for label in WINDOWS
        for options, bias in (
            ({"low": 0.0}, True),
            ({"pad": -1.0}, False),
            ({"low": -1.0, "high": 1.0}, False),
        )
        if bias or label in ("typical", "3-channels", "16-channels")
    ),
    _window_case("gather_windows", "16-channels", gather_truth, wild=True),
    *(
        _window_case(
            "gather_windows_", label, gather_into_truth, options={"channel": channel, "low": low}, bias=bias
        )
        for label in WINDOWS
        for channel, low, bias in ((3, 0.0, True), (4, -float("inf"), False))
        if bias or label in ("typical", "3-channels", "16-channels")
    ),
    *(
        _window_case("add_windows_", label, add_truth, options=options)
        for label in WINDOWS
        for options in ({"low": 0.0}, {}, {"low": -1.0, "high": 1.0})
        if options == {"low": 0.0} or label in ("typical", "16-channels")
    ),
    _window_case("add_windows_", "16-channels", add_truth, wild=True),
    *(
        _window_case(
            "pool_windows",
            label,
            window_pool_truth,
            options={**WINDOW_POOLS[i], "low": 0.0},
            bias=True,
            signed=False,
        )
        for j, label in enumerate(WINDOWS)
        for i in range(len(WINDOW_POOLS))
        if label in ("typical", "16-channels") or (i + j) % 4 == 0
    ),
    _window_case(
        "pool_windows", "16-channels", window_pool_truth, options=WINDOW_POOLS[0], wild=True, signed=False
    ),
    _window_case(
        "pool_windows", "typical", window_pool_truth, options=WINDOW_POOLS[4], wild=True, signed=False
    ),
    *(
        _window_case("sum_windows", label, window_sum_truth, 1, {"low": 0.0} if bias else {}, bias)
        for label in WINDOWS
        for bias in (True, False)
        if bias or label in ("typical", "16-channels")
    ),
    _window_case("sum_windows", "16-channels", window_sum_truth, 1, wild=True),
    *(
        Case(
            "window_mean",
            f"{i}",
            lambda draw, maps=maps, grid=grid: (draw(maps, *grid),),
            window_mean_truth,
            {"size": size, "window": window, "stride": stride},
            signed=False,
        )
        for i, (maps, grid, size, window, stride) in enumerate(MEANS)
    ),
]

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
]


# --------------------------------------------------------------------------------------------- harness

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SERVED = convviz_cuda.info()["ops"]
# The module and the attribute in it by which the public functions call each op.
OVERLOADS = {
    value.name().removeprefix("convviz::"): (module, name)
    for module in (ops, window_ops)
    for name, value in vars(module).items()
    if isinstance(value, torch._ops.OpOverload) and value.namespace == "convviz"
}
REFERENCES = {ops: reference, window_ops: window_reference}
BY_OP = {name: [case for case in CASES if case.op == name] for name in op_names()}
# The first row of each op is a full one (overlapping windows, padding, tails, K > 1), for the slower tests.
TYPICAL = [cases[0] for cases in BY_OP.values()]
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
                patch.setattr(module, attribute, getattr(REFERENCES[module], name))
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
