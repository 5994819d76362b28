"""Winograd's CUDA kernels on the host, as in test_cuda_on_host.py, over the rows of the ops' case table."""

from __future__ import annotations

import math

import cuda_on_host
import pytest
from op_case import F32, SPECIAL, drawing
from op_truth import assert_same, two
from test_cuda_on_host import (
    Guarded,
    arranged,
    dense_stride,
    each_dtype,
    gpu,
    image_stride,
    name,
    raw,
    twice,
)
from winograd_cases import WINOGRAD_CASES

pytestmark = pytest.mark.skipif(cuda_on_host.compiler() is None, reason="there is no C++ compiler")

__all__ = ["gpu"]  # the fixture

each_shift = pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "misaligned"])


def rows(op: str):
    """No launcher is called for results of nothing at all: the ops return before."""
    cases = [case for case in WINOGRAD_CASES if case.op == op]
    nothing = ("no-images", "no-channels", *["no-rows"] * (op == "winograd_output"))
    return pytest.mark.parametrize("case", [c for c in cases if not c.label.startswith(nothing)], ids=str)


def misplaced(x, shift: int):
    """The values of a dense tensor at an address where vectors may begin or, with a shift, where they may not."""
    guarded = Guarded(x.shape, x.stride(), x.dtype, 0x55, shift)
    guarded.tensor.copy_(x)
    return guarded.tensor


@each_dtype
@each_shift
@rows("winograd_input")
def test_winograd_input(gpu, case, shift, dtype):
    (x,) = case.inputs(drawing(dtype, SPECIAL))
    expected = case.apply(case.truth, (x,))
    given = arranged(x, "channels_last", shift)
    shape = tuple(expected.value.shape)
    for place in (0, 1):  # of the result
        (out,) = twice(
            lambda out: gpu.winograd_input(name(dtype), raw(given), out, list(two(case.options["padding"]))),
            (shape, dense_stride(shape, (0, 1, 2)), dtype),
            shift=place,
        )
        assert_same(out, expected)


@each_dtype
@each_shift
@rows("winograd_output")
def test_winograd_output(gpu, case, shift, dtype):
    products, *bias = case.inputs(drawing(dtype, SPECIAL))
    expected = case.apply(case.truth, (products, *bias))
    given = misplaced(products, shift), *[raw(misplaced(b, 1)) for b in bias]
    limits = case.options.get("low", -math.inf), case.options.get("high", math.inf)
    shape = tuple(expected.value.shape)
    for place in (0, 1):
        (out,) = twice(
            lambda out: gpu.winograd_output(
                name(dtype), raw(given[0]), given[1] if bias else None, out, *limits
            ),
            (shape, image_stride(shape, "channels_last"), dtype),
            shift=place,
        )
        assert_same(out, expected)


def test_the_rows_take_vectors_and_their_tails():
    """Of each dtype's 2, 4 or 8 channels a vector: some rows fill them, some do not, and some are shorter."""
    for op in ("winograd_input", "winograd_output"):
        channels = {
            case.inputs(drawing(F32))[0].shape[1 if op == "winograd_input" else 2]
            for case in WINOGRAD_CASES
            if case.op == op
        }
        for lanes in (2, 4, 8):
            assert any(n and n % lanes == 0 for n in channels)
            assert any(n > lanes and n % lanes for n in channels)
            assert any(0 < n < lanes for n in channels)
