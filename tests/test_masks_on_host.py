"""The mask ops' CUDA kernels on the host, as in test_cuda_on_host.py, over the rows of the ops' case table."""

from __future__ import annotations

import math

import cuda_on_host
import pytest
import torch
from mask_cases import MASK_CASES, MASKS, two_
from op_case import SPECIAL, drawing
from op_truth import assert_same
from test_cuda_on_host import (
    Guarded,
    arranged,
    dense_stride,
    each_dtype,
    each_layout,
    gpu,
    image_stride,
    name,
    raw,
    twice,
)

pytestmark = pytest.mark.skipif(cuda_on_host.compiler() is None, reason="there is no C++ compiler")

__all__ = ["gpu"]  # the fixture


def sampling(case, images, grids):
    """The row's scale and shift, or the defaults."""
    scale = case.options.get("scale")
    scales = (
        [h / n for h, n in zip(grids.shape[1:], images.shape[2:], strict=True)]
        if scale is None
        else two_(scale)
    )
    shift = case.options.get("shift")
    return list(scales), [(s - 1) / 2 for s in scales] if shift is None else list(two_(shift))


# No launcher is called for nothing at all: the ops return before.
LAUNCHED = [case for case in MASK_CASES if case.op == "mask_images" and not case.label.startswith("no-")]


@each_dtype
@each_layout
@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("case", LAUNCHED, ids=str)
def test_mask_images(gpu, dtype, layout, shift, case):
    inputs = case.inputs(drawing(dtype, SPECIAL if case.special else ()))
    expected = case.apply(case.truth, inputs)
    images, grids, image, offsets = inputs
    given = raw(arranged(images, layout, shift)), raw(grids), raw(image), raw(offsets)
    shape = tuple(expected.value.shape)
    for place in (0, 1):  # of the result
        (out,) = twice(
            lambda out: gpu.mask_images(
                name(dtype), layout == "channels_last", *given, out, *sampling(case, images, grids)
            ),
            (shape, image_stride(shape, layout), dtype),
            shift=place,
        )
        assert_same(out, expected, signed=False)


def test_the_rows_take_vectors_and_their_tails():
    """Of each dtype's 2, 4 or 8 lanes a vector: rows that fill them, that do not, and shorter ones, in both layouts."""
    for lengths in (
        {shape[3] for shape, *_ in MASKS.values()},
        {shape[3] * shape[1] for shape, *_ in MASKS.values()},
    ):
        for lanes in (2, 4, 8):
            assert any(n and n % lanes == 0 for n in lengths)
            assert any(n > lanes and n % lanes for n in lengths)
            assert any(0 < n < lanes for n in lengths)


@pytest.mark.parametrize(
    "case",
    [case for case in MASK_CASES if case.op == "philox" and not case.label.startswith("no-")],
    ids=str,
)
def test_philox(gpu, case):
    (streams,) = case.inputs(drawing(torch.float32))
    expected = case.apply(case.truth, (streams,))
    shape = tuple(expected.shape)
    given = Guarded(streams.shape, (1,), torch.int64, 0x55)
    given.tensor.copy_(streams)
    (out,) = twice(
        lambda out: gpu.philox(
            raw(given.tensor), out, case.options.get("seed", 0), case.options.get("block", 0)
        ),
        (shape, dense_stride(shape, (0, 1)), torch.int64),
    )
    given.check()
    assert_same(out, expected)
    assert math.prod(shape)
