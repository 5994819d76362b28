"""The window ops' CUDA kernels on the host, as in test_cuda_on_host.py, over the rows of the ops' case table."""

from __future__ import annotations

import math

import cuda_on_host
import pytest
from op_case import F32, F64, SPECIAL, drawing
from op_truth import assert_same, two
from test_cuda_on_host import (
    Guarded,
    arranged,
    axes,
    dense_stride,
    each_dtype,
    gpu,
    image_stride,
    name,
    raw,
    twice,
)
from window_cases import WINDOW_CASES

pytestmark = pytest.mark.skipif(cuda_on_host.compiler() is None, reason="there is no C++ compiler")

__all__ = ["gpu"]  # the fixture

# Of base, patch and result, and whether they lie where no vector may begin.
ARRANGED = [
    (("channels_last",) * 3, 0),
    (("contiguous",) * 3, 0),
    (("channels_last",) * 3, 1),
    (("contiguous",) * 3, 1),
    (("contiguous", "channels_last", "channels_last"), 0),
    (("channels_last", "contiguous", "contiguous"), 0),
]


def bounds(case, bias):
    return bias, case.options.get("low", -math.inf), case.options.get("high", math.inf)


def overlay(gpu, dtype, case, base, patch, tables, bias, out):
    """gather_windows, its form in place, add_windows_ and occlude."""
    channel, pad = case.options.get("channel", 0), case.options.get("pad", 0.0)
    add = case.op == "add_windows_"
    gpu.overlay_windows(name(dtype), base, patch, tables, out, channel, pad, add, *bounds(case, bias))


def pool(gpu, dtype, case, base, patch, tables, bias, out):
    geometry = {
        k: case.options[k] for k in ("kernel_size", "stride", "padding", "dilation") if k in case.options
    }
    average, include = case.options.get("average", False), case.options.get("count_include_pad", True)
    divisor = float(case.options.get("divisor_override") or 0)
    both = axes(base.shape, out.shape, **geometry)
    gpu.pool_windows(
        name(dtype), base, patch, tables, out, *both, average, include, divisor, *bounds(case, bias)
    )


def total(gpu, dtype, case, base, patch, tables, bias, out):
    gpu.sum_windows(name(dtype), base, patch, tables, out, *bounds(case, bias))


def run(gpu, dtype, case, tensors, layouts, shift):
    """The kernel's result for these inputs, in guarded memory."""
    tensors = list(tensors)
    start = tensors.pop(0) if case.in_place else None
    bias = raw(tensors.pop()) if case.last == "bias" else None
    base, patch, *tables = tensors
    # A fill's value stays one: its strides are 0.
    patch = patch.expand(base.shape) if case.op == "occlude" else arranged(patch, layouts[1], shift)
    sources = (
        raw(arranged(base, layouts[0], shift)),
        raw(patch),
        [raw(t.contiguous()) for t in tables],
        bias,
    )
    compute = {"pool_windows": pool, "sum_windows": total}.get(case.op, overlay)
    if start is not None:
        guarded = Guarded(start.shape, image_stride(start.shape, layouts[2]), dtype, 0x55, shift)
        guarded.tensor.copy_(start)
        compute(gpu, dtype, case, *sources, raw(guarded.tensor))
        return guarded.check()
    shape = (len(tables[0]), base.shape[1], *case.options.get("size", ()))
    stride = image_stride(shape, layouts[2]) if len(shape) == 4 else dense_stride(shape, (0, 1))
    kept = dtype if len(shape) == 4 or dtype == F64 else F32  # sums stay in the type that they are made in
    return twice(lambda out: compute(gpu, dtype, case, *sources, out), (shape, stride, kept), shift=shift)[0]


# No launcher is called for nothing at all: the ops return before.
LAUNCHED = [
    case
    for case in WINDOW_CASES
    if case.op != "window_mean" and not case.label.startswith(("no-v", "no-i", "no-c", "no-res"))
]


@each_dtype
@pytest.mark.parametrize("case", [case for case in LAUNCHED if "no-map" not in case.label], ids=str)
def test_windows(gpu, dtype, case):
    inputs = case.inputs(drawing(dtype, SPECIAL))
    expected = case.apply(case.truth, inputs)
    for layouts, shift in ARRANGED if dtype == F32 else ARRANGED[:3]:
        result = run(gpu, dtype, case, inputs, layouts, shift)
        assert_same(result, expected, signed=case.signed)


@each_dtype
@pytest.mark.parametrize("case", [case for case in WINDOW_CASES if case.op == "window_mean"], ids=str)
def test_window_mean(gpu, dtype, case):
    (scores,) = case.inputs(drawing(dtype, SPECIAL))
    shape = (len(scores), *case.options["size"])
    if not math.prod(shape):
        pytest.skip("the op returns before")
    window, stride = two(case.options["window"]), two(case.options["stride"])
    (out,) = twice(
        lambda out: gpu.window_mean(name(dtype), raw(scores), out, list(window), list(stride)),
        (shape, dense_stride(shape, (0, 1, 2)), dtype),
    )
    assert_same(out, case.apply(case.truth, (scores,)))
