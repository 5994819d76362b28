"""The CPU's direct convolution beyond the case table: any geometry, accuracy, layouts, what it refuses."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F
from direct_conv_cases import direct_conv2d_truth, into_truth
from hypothesis import given
from hypothesis import strategies as st
from op_case import F32, TIES, drawing
from op_cases import ARRANGEMENTS, serving, subjects
from op_truth import assert_same

from convviz_cuda import ops

each_subject = pytest.mark.parametrize("subject", subjects("direct_conv2d"))
LIMITS = [{}, {"low": 0.0}, {"low": -1.0, "high": 1.0}, {"high": 0.0}]
kernels = st.tuples(*[st.integers(1, 5)] * 2)
geometries = st.tuples(
    st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(1, 15), st.integers(1, 60)),
    kernels,
    st.tuples(*[st.integers(1, 3)] * 2),
).filter(lambda g: g[0][2] >= g[1][0] and g[0][3] >= g[1][1])


@each_subject
@given(
    geometries,
    st.integers(1, 80),
    st.sampled_from(sorted(ARRANGEMENTS)),
    st.booleans(),
    st.sampled_from([TIES, ()]),
    st.sampled_from(LIMITS),
    st.integers(0, 2**16),
)
def test_convolutions(subject, geometry, results, arrangement, biased, values, bounds, seed):
    """Tails of lines, of tiles of pixels, of vectors and of blocks of results; every layout."""
    shape, kernel, stride = geometry
    draw = drawing(F32, values, seed)
    x, filters = ARRANGEMENTS[arrangement](draw(*shape)), draw(results, shape[1], *kernel)
    bias = draw(results) if biased else None
    packed = ops.direct_packed(filters)
    options = {"kernel_size": kernel, "stride": stride, "results": results, **bounds}
    with serving(subject):
        result = ops.direct_conv2d(x, packed, bias, **options)
    assert result.is_contiguous(memory_format=torch.channels_last) or not result.numel()
    expected = direct_conv2d_truth(x, packed, bias, **options)
    assert_same(result, expected)
    if x.numel():
        library = F.conv2d(x.double(), filters.double(), None if bias is None else bias.double(), stride)
        library = library.clamp(bounds.get("low", -math.inf), bounds.get("high", math.inf))
        torch.testing.assert_close(expected.value, library, rtol=1e-12, atol=1e-12)


@each_subject
@given(geometries, st.integers(1, 40), st.integers(0, 3), st.integers(0, 3), st.integers(0, 2**16))
def test_into_channels_of_something_larger(subject, geometry, results, before, behind, seed):
    shape, kernel, stride = geometry
    draw = drawing(F32, (), seed)
    x, packed = draw(*shape), ops.direct_packed(draw(results, shape[1], *kernel))
    height, width = ((n - k) // s + 1 for n, k, s in zip(shape[2:], kernel, stride, strict=True))
    for layout in (torch.channels_last, torch.contiguous_format):
        out = draw(shape[0], before + results + behind, height, width).contiguous(memory_format=layout)
        options = {"kernel_size": kernel, "stride": stride, "results": results, "channel": before}
        expected = into_truth(direct_conv2d_truth)(out.clone(), x, packed, **options)
        version = out._version
        with serving(subject):
            ops.direct_conv2d_(out, x, packed, **options)
        assert_same(out, expected)
        assert out._version > version or not out.numel()


@each_subject
def test_a_result_is_the_same_whatever_is_beside_it(subject):
    """Images alone and together: the same bits, whether a line is a row or all pixels."""
    draw = drawing(F32, ())
    x = draw(7, 20, 13, 11)
    for kernel in (1, 3):
        packed = ops.direct_packed(draw(40, 20, kernel, kernel))
        with serving(subject):
            whole = ops.direct_conv2d(x, packed, None, kernel, results=40)
            alone = torch.cat(
                [ops.direct_conv2d(part, packed, None, kernel, results=40) for part in x.split(1)]
            )
        torch.testing.assert_close(whole, alone, rtol=1e-6, atol=1e-5)
        if subject != "reference":  # the library's sums may depend on it
            assert torch.equal(whole, alone)


@each_subject
def test_what_is_not_finite_is_where_the_library_has_it(subject):
    draw = drawing(F32, (*TIES * 12, 0.1, -0.7, math.nan, math.inf, -math.inf), 5)
    x, filters = draw(2, 3, 9, 8), drawing(F32, (), 1)(5, 3, 3, 3)
    expected = F.conv2d(x.double(), filters.double())
    with serving(subject):
        result = ops.direct_conv2d(x, ops.direct_packed(filters), None, 3, results=5).double()
        clamped = ops.direct_conv2d(x, ops.direct_packed(filters), None, 3, low=0.0, results=5)
    assert 0.05 < expected.isfinite().double().mean() < 0.95
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(result), kind(expected))
    assert torch.equal(clamped.isnan(), expected.isnan())


def test_packing():
    filters = torch.arange(33.0 * 2 * 3 * 2).view(33, 2, 3, 2)
    packed = ops.direct_packed(filters.requires_grad_())
    assert packed.shape == (2, 12, 32) and packed.is_contiguous() and not packed.requires_grad
    for k, c, y, x in ((0, 0, 0, 0), (31, 1, 2, 1), (32, 0, 1, 1), (7, 1, 0, 1)):
        assert packed[k // 32, (y * 2 + x) * 2 + c, k % 32] == filters[k, c, y, x]
    assert not packed[1, :, 1:].any()


X, PACKED, BIAS = torch.ones(2, 3, 5, 6), ops.direct_packed(torch.ones(4, 3, 3, 3)), torch.ones(4)


def conv(**changed):
    return ops.direct_conv2d(
        **{"x": X, "weight": PACKED, "bias": BIAS, "kernel_size": 3, "results": 4} | changed
    )


def into(**changed):
    given = {
        "out": torch.ones(2, 7, 3, 4),
        "x": X,
        "weight": PACKED,
        "bias": BIAS,
        "kernel_size": 3,
        "results": 4,
    }
    return ops.direct_conv2d_(**given | changed)


def winograd_into(**changed):
    given = {"out": torch.ones(2, 7, 3, 4), "x": X, "weight": ops.winograd_weight(torch.ones(4, 3, 3, 3))}
    return ops.winograd_conv2d_(**given | changed)


def packed(**changed):
    return ops.direct_packed(**changed)


REFUSED = [
    *(
        (function, *wrong)
        for function in (conv, into)
        for wrong in (
            ({"x": None}, TypeError, "x must be a tensor, but it is a NoneType."),
            ({"x": X[0]}, ValueError, "x must have the shape (N, C, H, W), but it has"),
            ({"x": X.double(), "weight": PACKED.double()}, TypeError, "x must be float32 on the CPU, but it is torch."),
            ({"weight": PACKED.double()}, TypeError, "weight must be torch.float32 on cpu as x is, but"),
            ({"weight": PACKED[:, :9]}, ValueError, "weight must be (blocks, 27, 32), as direct_packed makes it"),
            ({"weight": torch.ones(4, 3, 3, 3)}, ValueError, "but its shape is (4, 3, 3, 3)."),
            ({"kernel_size": 0}, ValueError, "kernel_size must be at least 1, but it is 0."),
            ({"kernel_size": (6, 1)}, ValueError, "x must be as large as the kernel, but its shape is (2, 3, 5, 6)"),
            ({"stride": 0}, ValueError, "stride must be at least 1, but it is 0."),
            ({"stride": 1.0}, TypeError, "stride must be an int or a pair of ints, but it is 1.0."),
            ({"results": 33}, ValueError, "results must be the weight's, but it is 33 for a shape (1, 27, 32)."),
            ({"results": 0}, ValueError, "results must be the weight's, but it is 0"),
            ({"bias": BIAS[:2]}, ValueError, "bias must have the shape (4,), but it has the shape (2,)."),
            ({"low": 1.0, "high": 0.0}, ValueError, "high must be at least low, but low is 1.0 and high is 0.0."),
        )
    ),
    *(
        (function, *wrong)
        for function in (into, winograd_into)
        for wrong in (
            ({"out": torch.ones(2, 7, 4, 4)}, ValueError, "out must have 2 images of 3 x 4, but its shape is (2,"),
            ({"out": torch.ones(1, 7, 3, 4)}, ValueError, "out must have 2 images of 3 x 4, but its shape is (1,"),
            ({"out": torch.ones(2, 7, 3, 4).double()}, TypeError, "out must be torch.float32 on cpu as x is, but"),
            ({"out": None}, TypeError, "out must be a tensor, but it is a NoneType."),
            ({"out": torch.ones(2, 7, 3, 1).expand(-1, -1, -1, 4)}, ValueError, "out must have memory for each"),
            ({"channel": 4}, ValueError, "channel must leave room for 4 channels in out's 7, but it is 4."),
            ({"channel": -1}, ValueError, "but it is -1."),
            ({"channel": 1.0}, TypeError, "channel must be an int, but it is 1.0."),
            ({"out": torch.ones(2, 7, 3, 4).requires_grad_()}, ValueError, "out must not require a gradient where it"),
        )
    ),
    (packed, {"weight": torch.ones(4, 3, 3, 3).double()}, TypeError, "weight must be float32 on"),
    (packed, {"weight": torch.ones(4, 3, 3)}, ValueError, "weight must have the shape (N, C"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "wrong", "error", "words"), REFUSED)
def test_bad_arguments(function, wrong, error, words):
    with pytest.raises(error, match=re.escape(words)) as caught:
        function(**wrong)
    assert str(caught.value).endswith(".")


def test_good_arguments():
    assert conv().shape == (2, 4, 3, 4) and into() is winograd_into() is None


@each_subject
def test_no_gradient_is_recorded(subject):
    with serving(subject):
        for name in ("x", "weight", "bias"):
            tensor = {"x": X, "weight": PACKED, "bias": BIAS}[name].clone().requires_grad_()
            assert not conv(**{name: tensor}).requires_grad
            out = torch.ones(2, 7, 3, 4)
            into(**{name: tensor, "out": out})
            assert not out.requires_grad
