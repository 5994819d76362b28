"""Winograd's ops and their convolution beyond the case table: any geometry, accuracy, layouts, what they refuse."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from op_case import DTYPES, F32, F64, SPECIAL, TIES, drawing
from op_cases import ARRANGEMENTS, serving, subjects
from op_truth import Band, assert_same, is_dense
from winograd_cases import (
    INPUTS,
    WEIGHT,
    WINOGRAD_CASES,
    winograd_conv2d_truth,
    winograd_input_truth,
    winograd_output_truth,
)

import convviz_cuda
from convviz_cuda import ops, winograd

each_subject = pytest.mark.parametrize("subject", subjects("winograd_input"))
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
LIMITS = [{}, {"low": 0.0}, {"low": -1.0, "high": 1.0}, {"high": 0.0}]


def convolved(subject, x, weight, bias=None, **options):
    with serving(subject) as device:
        x, weight, bias = (None if t is None else t.to(device) for t in (x, weight, bias))
        return ops.winograd_conv2d(x, ops.winograd_weight(weight), bias, **options).cpu()


def assert_close(result, expected: Band):
    """Within the band; where the direct convolution is not finite, neither is the result, and NaN stays NaN."""
    finite = expected.value.isfinite()
    assert_same(result[finite], Band(expected.value[finite], expected.bound[finite]))
    assert not result[~finite].isfinite().any()
    assert result[expected.value.isnan()].isnan().all()


# ----------------------------------------------------------------------------------------- any geometry

seeds = st.integers(0, 2**16)
limits = st.sampled_from(LIMITS)
dtypes = st.sampled_from(DTYPES)
channels = st.sampled_from([1, 2, 3, 5, 8, 16, 17])
arrangements = st.sampled_from(sorted(ARRANGEMENTS))
images = st.tuples(st.integers(0, 3), channels, st.integers(1, 9), st.integers(1, 9))
paddings = st.one_of(st.integers(0, 3), st.tuples(*[st.integers(0, 3)] * 2))


def fits(shape, padding) -> bool:
    pads = (padding, padding) if isinstance(padding, int) else padding
    return all(n + 2 * p >= 3 for n, p in zip(shape[2:], pads, strict=True))


geometries = st.tuples(images, paddings).filter(lambda geometry: fits(*geometry))


@each_subject
@given(geometries, dtypes, arrangements, st.sampled_from([SPECIAL, TIES, ()]), seeds)
def test_input_tiles(subject, geometry, dtype, arrangement, values, seed):
    shape, padding = geometry
    x = ARRANGEMENTS[arrangement](drawing(dtype, values, seed)(*shape))
    with serving(subject) as device:
        result = ops.winograd_input(x.to(device), padding)
    assert result.is_contiguous()
    assert_same(result, winograd_input_truth(x, padding=padding))


@each_subject
@given(
    st.tuples(*[st.integers(0, 5)] * 3),
    channels,
    dtypes,
    st.booleans(),
    st.sampled_from([SPECIAL, ()]),
    limits,
    seeds,
)
def test_output_maps(subject, size, count, dtype, biased, values, bounds, seed):
    draw = drawing(dtype, values, seed)
    tiles = size[0] * math.ceil(size[1] / 2) * math.ceil(size[2] / 2)
    products, bias = draw(tiles, 16, count), draw(count) if biased else None
    with serving(subject) as device:
        result = ops.winograd_output(
            products.to(device), size, None if bias is None else bias.to(device), **bounds
        )
    assert result.is_contiguous(memory_format=torch.channels_last) or not result.numel()
    assert_same(result, winograd_output_truth(products, bias, size=size, **bounds))


@each_subject
@given(geometries, channels, dtypes, arrangements, st.booleans(), st.sampled_from([TIES, ()]), limits, seeds)
def test_convolutions(subject, geometry, results, dtype, arrangement, biased, values, bounds, seed):
    shape, padding = geometry
    draw = drawing(dtype, values, seed)
    x = ARRANGEMENTS[arrangement](draw(*shape))
    weight, bias = draw(results, shape[1], 3, 3), draw(results) if biased else None
    result = convolved(subject, x, weight, bias, padding=padding, **bounds)
    assert result.dtype == dtype
    assert_same(result, winograd_conv2d_truth(x, weight, bias, padding=padding, **bounds))


# ----------------------------------------------------------------------------------------- the convolution


@each_dtype
@pytest.mark.parametrize("label", INPUTS)
@each_subject
def test_the_rows_geometries_convolved(subject, label, dtype):
    shape, padding = INPUTS[label]
    draw = drawing(dtype, ())
    x, weight, bias = draw(*shape), draw(7, shape[1], 3, 3), draw(7)
    for given_, bounds in ((bias, {"low": 0.0}), (None, {}), (bias, {"low": -1.0, "high": 1.0})):
        result = convolved(subject, x, weight, given_, padding=padding, **bounds)
        assert_same(result, winograd_conv2d_truth(x, weight, given_, padding=padding, **bounds))


@pytest.mark.parametrize("at_once", [0, 80_000])
@each_subject
def test_images_in_parts_are_images_at_once(subject, at_once, monkeypatch):
    draw = drawing(F64, ())  # float32 on the CPU has a kernel of its own
    x, weight, bias = draw(7, 9, 6, 5), draw(11, 9, 3, 3), draw(11)
    whole = convolved(subject, x, weight, bias, padding=1, low=0.0)
    parts = []
    output = winograd.winograd_output
    monkeypatch.setattr(winograd, "winograd_output", lambda *a: parts.append(a[1][0]) or output(*a))
    monkeypatch.setattr(winograd, "CACHED", at_once)
    result = convolved(subject, x, weight, bias, padding=1, low=0.0)
    assert sum(parts) == 7 and len(parts) > 1 and parts[0] == (1 if at_once == 0 else 3)
    torch.testing.assert_close(result, whole)
    assert result.is_contiguous(memory_format=torch.channels_last)


@each_subject
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 50), st.integers(3, 20), st.integers(3, 20)),
    st.integers(1, 80),
    st.integers(0, 2),
    st.booleans(),
    limits,
    seeds,
)
def test_packed_weights(subject, shape, results, padding, biased, bounds, seed):
    """Tails of vectors, of blocks of results and of tiles."""
    draw = drawing(F32, (), seed)
    x, weight, bias = draw(*shape), draw(results, shape[1], 3, 3), draw(results) if biased else None
    packed = ops.winograd_packed(weight)
    assert packed.shape == (-(-results // 32), 16, shape[1], 32)
    with serving(subject):
        result = ops.winograd_conv2d(x, packed, bias, padding, **bounds, results=results)
    assert result.is_contiguous(memory_format=torch.channels_last) and result.shape[1] == results
    assert_same(result, winograd_conv2d_truth(x, weight, bias, padding=padding, **bounds))


@each_subject
@given(
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.sampled_from(sorted(ARRANGEMENTS)),
    st.booleans(),
    seeds,
)
def test_packing(subject, channels, arrangement, flipped, seed):
    """The matrices of the definition in float64, rounded once; turned around and transposed if asked for."""
    weight = ARRANGEMENTS[arrangement](drawing(F32, (), seed)(*channels, 3, 3))
    with serving(subject):
        result = ops.winograd_packed(weight, flipped)
    turned = weight.transpose(0, 1).flip(2, 3) if flipped else weight
    g = torch.tensor(WEIGHT, dtype=F64)
    expected = torch.einsum("ij,ocjk,lk->ilco", g, turned.double(), g).flatten(0, 1)
    found = result.permute(1, 2, 0, 3).flatten(2)
    assert result.is_contiguous() and not found[:, :, len(turned) :].any()
    torch.testing.assert_close(found[:, :, : len(turned)].double(), expected, rtol=1e-7, atol=1e-7)


def test_a_tile_is_the_same_whatever_is_beside_it(subject="cpu"):
    """Images alone, together and in threads: the same bits."""
    draw = drawing(F32, ())
    x, packed = draw(9, 20, 13, 11), ops.winograd_packed(draw(40, 20, 3, 3))
    with serving(subject):
        whole = ops.winograd_conv2d(x, packed, None, 1, results=40)
        alone = torch.cat([ops.winograd_conv2d(part, packed, None, 1, results=40) for part in x.split(1)])
    assert torch.equal(whole, alone)


@pytest.mark.parametrize("results", [128, 256])
@pytest.mark.parametrize("count", [128, 512])
@each_subject
def test_float32_is_about_as_exact_as_the_direct_convolution(subject, count, results):
    draw = drawing(F32, (), count + results)
    x, weight, bias = (
        draw(2, count, 13, 14).relu(),
        draw(results, count, 3, 3) / math.sqrt(9 * count),
        draw(results),
    )
    truth = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    ours = (convolved(subject, x, weight, bias, padding=1) - truth).square().mean().sqrt()
    direct = (F.conv2d(x, weight, bias, padding=1) - truth).square().mean().sqrt()
    assert 0 < ours <= 4 * direct


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@each_subject
def test_what_is_not_finite_stays_where_a_direct_convolution_has_it(subject, value):
    draw = drawing(F64, ())
    weight = draw(6, 5, 3, 3)
    for y in range(5):
        for x in range(6):
            image = draw(1, 5, 5, 6)
            image[0, 2, y, x] = value
            result = convolved(subject, image, weight, padding=1)
            assert_close(result, winograd_conv2d_truth(image, weight, padding=1))
            if math.isnan(value):  # also behind a ReLU
                assert torch.equal(
                    convolved(subject, image, weight, padding=1, low=0.0).isnan(), result.isnan()
                )


@each_subject
def test_special_values_anywhere(subject):
    draw = drawing(F64, (*TIES * 6, 0.1, -0.7, math.nan, math.inf, -math.inf))
    x, weight = draw(3, 4, 9, 8), drawing(F64, (), 1)(5, 4, 3, 3)
    expected = winograd_conv2d_truth(x, weight, padding=(1, 2))
    assert 0.05 < expected.value.isfinite().double().mean() < 0.95
    assert_close(convolved(subject, x, weight, padding=(1, 2)), expected)


@each_subject
def test_a_bound_of_zero_has_the_zeros_sign(subject):
    products = drawing(F32, (-0.0, 0.0, -1.0, 1.0))(12, 16, 17)
    with serving(subject) as device:
        result = ops.winograd_output(products.to(device), (2, 4, 6), low=0.0)
        assert (result == 0).any() and not result.signbit().any()
        assert ops.winograd_output(-products[:, :, :0].to(device), (2, 4, 6), low=0.0).shape == (2, 0, 4, 6)


@each_dtype
def test_weights(dtype):
    """Each kernel of a single one is an outer product of two columns of the definition's matrix."""
    columns = torch.tensor([[1, 0.5, 0.5, 0], [0, 0.5, -0.5, 0], [0, 0.5, 0.5, 1]], dtype=F64)
    weight = torch.eye(9, dtype=dtype).view(9, 1, 3, 3)
    result = ops.winograd_weight(weight.transpose(2, 3))
    assert result.shape == (16, 1, 9) and result.dtype == dtype and result.is_contiguous()
    for k in range(9):
        assert torch.equal(result[:, 0, k].double(), torch.outer(columns[k % 3], columns[k // 3]).flatten())
    draw = drawing(dtype, ())
    assert ops.winograd_weight(draw(4, 3, 3, 3).requires_grad_()).requires_grad is False


@each_subject
def test_layouts(subject):
    """Whatever the input's layout, the same numbers in channels_last; what is channels_last is not copied."""
    x, weight = drawing(F32, ())(2, 8, 6, 7), drawing(F32, (), 1)(4, 8, 3, 3)
    expected = convolved(subject, x, weight, padding=1)
    for arrange in (ARRANGEMENTS[name] for name in ARRANGEMENTS if name != "expanded"):
        result = convolved(subject, arrange(x), weight, padding=1)
        assert torch.equal(result, expected)
        assert result.is_contiguous(memory_format=torch.channels_last) and is_dense(result)


def test_a_channels_last_input_is_not_copied(monkeypatch):
    seen = []
    op = winograd.winograd_input_op
    monkeypatch.setattr(winograd, "winograd_input_op", lambda x, padding: seen.append(x) or op(x, padding))
    x = torch.ones(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    ops.winograd_input(x)
    ops.winograd_input(x.contiguous())
    assert seen[0].data_ptr() == x.data_ptr() and seen[1].is_contiguous(memory_format=torch.channels_last)


@each_subject
def test_a_bias_with_gaps(subject):
    x, weight, bias = drawing(F32)(1, 3, 4, 4), drawing(F32, (), 1)(5, 3, 3, 3), torch.arange(10.0)[::2]
    assert_same(convolved(subject, x, weight, bias), winograd_conv2d_truth(x, weight, bias))


def test_info_lists_the_ops():
    assert {"winograd_conv2d", "winograd_input", "winograd_output"} <= set(convviz_cuda.info()["ops"])
    assert {case.op for case in WINOGRAD_CASES} == {n for n in ops.__all__ if n.startswith("winograd_")} - {
        "winograd_weight"
    }


def test_it_pays_for_many_channels_only():
    assert ops.winograd_conv2d is winograd.winograd_conv2d
    assert winograd.pays(16, 64) and winograd.pays(512, 32)
    assert not winograd.pays(3, 64) and not winograd.pays(512, 16)


# ------------------------------------------------------------------------------------------------ refused

X, KERNELS, BIAS = torch.ones(2, 3, 5, 6), ops.winograd_weight(torch.ones(4, 3, 3, 3)), torch.ones(4)
PRODUCTS, PACKED = torch.ones(12, 16, 4), ops.winograd_packed(torch.ones(4, 3, 3, 3))


def tiles(**changed):
    return ops.winograd_input(**{"x": X, "padding": 1} | changed)


def maps(**changed):
    return ops.winograd_output(**{"products": PRODUCTS, "size": (2, 3, 5), "bias": BIAS} | changed)


def conv(**changed):
    return ops.winograd_conv2d(**{"x": X, "weight": KERNELS, "bias": BIAS, "padding": 1} | changed)


def kernels(**changed):
    return ops.winograd_weight(**{"weight": torch.ones(4, 3, 3, 3)} | changed)


def packed(**changed):
    return ops.winograd_packed(**{"weight": torch.ones(4, 3, 3, 3)} | changed)


@pytest.mark.parametrize("function", [tiles, maps, conv], ids=lambda f: f.__name__)
@each_subject
def test_no_gradient_is_recorded(subject, function):
    """Neither by a kernel nor by the reference, which PyTorch could differentiate."""
    changed = {
        tiles: {"x": X},
        maps: {"products": PRODUCTS, "bias": BIAS},
        conv: {"x": X, "weight": KERNELS, "bias": BIAS},
    }[function]
    with serving(subject):
        for name, tensor in changed.items():
            assert not function(**{name: tensor.clone().requires_grad_()}).requires_grad


REFUSED = [
    *(
        (function, {name: value}, TypeError, words)
        for function, names in (
            (tiles, ("x",)),
            (maps, ("products", "bias")),
            (conv, ("x", "weight", "bias")),
            (kernels, ("weight",)),
        )
        for name in names
        for value, words in (
            (None, f"{name} must be a tensor, but it is a NoneType."),
            ([1.0], f"{name} must be a tensor, but it is a list."),
            (X.int(), f"{name} must be float64, float32, bfloat16 or float16, but it is torch.int32."),
        )
        if (name, value) != ("bias", None)
    ),
    *(
        (function, {name: X[0]}, ValueError, f"{name} must have the shape (N, C, H, W), but it has")
        for function, name in ((tiles, "x"), (conv, "x"), (kernels, "weight"))
    ),
    *(
        (function, {"padding": value}, error, words)
        for function in (tiles, conv)
        for value, error, words in (
            (-1, ValueError, "padding must be at least 0, but it is -1."),
            ((1, 2, 3), TypeError, "padding must be an int or a pair of ints, but it is (1, 2, 3)."),
            (1.0, TypeError, "but it is 1.0."),
        )
    ),
    *(
        (function, {"x": torch.ones(2, 3, *size), "padding": (0, 1)}, ValueError, words)
        for function in (tiles, conv)
        for size in ((2, 5), (5, 0), (0, 0))
        for words in (f"its padding, but its shape is {(2, 3, *size)} and the padding is (0, 1).",)
    ),
    *(
        (f, {"low": low, "high": high}, ValueError, f"high must be at least low, but low is {low} and high is {high}.")
        for f in (maps, conv)
        for low, high in ((1.0, 0.5), (math.nan, 1.0), (0.0, math.nan))
    ),
    *(
        (function, {"bias": value}, error, words)
        for function, name in ((maps, "products"), (conv, "x"))
        for value, error, words in (
            (BIAS[:2], ValueError, "bias must have the shape (4,), but it has the shape (2,)."),
            (BIAS.view(4, 1), ValueError, "but it has the shape (4, 1)."),
            (BIAS.double(), TypeError, f"bias must be torch.float32 on cpu as {name} is, but it is torch.float64"),
            (BIAS.to("meta"), TypeError, f"as {name} is, but it is torch.float32 on meta."),
        )
    ),
    (maps, {"products": PRODUCTS[:, :9]}, ValueError, "products must be (tiles, 16, C), but the shape is (12, 9, 4)."),
    (maps, {"products": PRODUCTS[0]}, ValueError, "but the shape is (16, 4)."),
    (maps, {"size": (2, 3)}, TypeError, "size must be three ints, (N, h, w), but it is (2, 3)."),
    (maps, {"size": (2, 3, 5.0)}, TypeError, "but it is (2, 3, 5.0)."),
    (maps, {"size": (2, 3, 7)}, ValueError, "size must be (N, h, w) with 12 tiles, but it is (2, 3, 7)."),
    (maps, {"size": (2, -3, -7)}, ValueError, "but it is (2, -3, -7)."),
    (conv, {"weight": torch.ones(4, 3, 3, 3)}, ValueError, "weight must be (16, 3, Co), as winograd_weight makes it"),
    (conv, {"weight": torch.ones(4, 3, 3, 3)}, ValueError, "or that packed, but its shape is (4, 3, 3, 3)."),
    (conv, {"weight": PACKED, "results": 33}, ValueError, "results must be the weight's, but it is 33 for a shape"),
    (conv, {"weight": PACKED, "results": 0}, ValueError, "results must be the weight's, but it is 0 for a shape"),
    (conv, {"results": 5}, ValueError, "results must be the weight's, but it is 5 for a shape (16, 3, 4)."),
    (conv, {"weight": PACKED}, ValueError, "bias must have the shape (32,), but it has the shape (4,)."),
    (conv, {"x": X.double(), "weight": PACKED.double(), "bias": None}, ValueError, "Packed weights are for float32"),
    (conv, {"weight": PACKED[:, :, :2]}, ValueError, "or that packed, but its shape is (1, 16, 2, 32)."),
    (packed, {"weight": torch.ones(4, 3, 3, 1)}, ValueError, "weight must be (Co, Ci, 3, 3), but its shape is"),
    (packed, {"weight": torch.ones(4, 3, 3, 3).double()}, TypeError, "must be float32 on the CPU, but it is torch.f"),
    (packed, {"weight": X.int()}, TypeError, "weight must be float64, float32, bfloat16 or float16, but"),
    (conv, {"weight": KERNELS[:, :2]}, ValueError, "but its shape is (16, 2, 4)."),
    (conv, {"weight": KERNELS[:9]}, ValueError, "but its shape is (9, 3, 4)."),
    (conv, {"weight": KERNELS.double()}, TypeError, "weight must be torch.float32 on cpu as x is, but"),
    (kernels, {"weight": torch.ones(4, 3, 3, 1)}, ValueError, "weight must be (Co, Ci, 3, 3), but its shape is"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("function", "wrong", "error", "words"),
    REFUSED,
    ids=[f"{f.__name__}-{'-'.join(wrong)}-{i}" for i, (f, wrong, _, _) in enumerate(REFUSED)],
)
def test_bad_arguments(function, wrong, error, words):
    with pytest.raises(error, match=re.escape(words)) as caught:
        function(**wrong)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize("function", [tiles, maps, conv, kernels, packed], ids=lambda f: f.__name__)
def test_good_arguments(function):
    assert torch.is_tensor(function())


# ----------------------------------------------------------------------------------- in the backward engine

NATIVE = pytest.mark.skipif(
    convviz_cuda.info()["ops"]["winograd_conv2d"]["cpu"] != "c++", reason="there is no native kernel"
)


@pytest.fixture
def calls(monkeypatch):
    """The shapes of the weights that the op was called with."""
    seen = []
    op = winograd.winograd_conv2d_op
    monkeypatch.setattr(
        winograd, "winograd_conv2d_op", lambda x, w, *a: seen.append(tuple(w.shape)) or op(x, w, *a)
    )
    return seen


def wide(padding=1):
    """32 and 48 channels; the smooth activation between them has no gate that rounding could flip."""
    torch.manual_seed(3)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 5, stride=2), torch.nn.Softplus(),
        torch.nn.Conv2d(32, 48, 3, padding=padding), torch.nn.Softplus(),
        torch.nn.Conv2d(48, 32, 3, padding=padding, bias=False), torch.nn.Flatten(), torch.nn.LazyLinear(4),
    )  # fmt: skip


@NATIVE
@pytest.mark.parametrize("padding", [0, 1, 2, (2, 0)], ids=str)
def test_the_engine_convolves_by_tiles_where_it_is_faster(padding, calls):
    model, x = wide(padding), torch.randn(3, 3, 41, 37, generator=torch.Generator().manual_seed(1))
    model(x)
    model = model.to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    with convviz_cuda.backward_rule("gradient"):
        scores = model(x)
    assert calls == [(2, 16, 32, 32), (1, 16, 48, 32)]
    (found,) = torch.autograd.grad(scores[:, 1].sum(), x, retain_graph=True)
    assert calls[2:] == [(2, 16, 32, 32), (1, 16, 48, 32)]
    exact = x.detach().double().requires_grad_()
    expected = model.double()(exact)
    (gradient,) = torch.autograd.grad(expected[:, 1].sum(), exact)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-5)
    assert (found.double() - gradient).abs().max() < 1e-5 * gradient.abs().max()


@NATIVE
def test_double_backward_autocast_and_other_layouts_keep_the_librarys_convolution(calls):
    model, x = wide(), torch.randn(3, 3, 41, 37, generator=torch.Generator().manual_seed(1))
    model(x)
    with convviz_cuda.backward_rule("gradient"):
        model(x.requires_grad_())  # contiguous
    first, maps = model[2], torch.ones(2, 32, 20, 20).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16), convviz_cuda.backward_rule("gradient"):
        assert first(maps.requires_grad_()).dtype == torch.bfloat16
    assert not calls
    x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    gradients = []
    for kind in (torch.float32, torch.float64):
        exact, given = model.to(kind), x.detach().to(kind).requires_grad_()
        with convviz_cuda.backward_rule("gradient"):
            (first,) = torch.autograd.grad(exact(given)[:, 1].sum(), given, create_graph=True)
        gradients.append(torch.autograd.grad(first.square().sum(), given)[0].double())
    assert (gradients[0] - gradients[1]).abs().max() < 1e-4 * gradients[1].abs().max()


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, True),
        ({"flipped": True, "weight": torch.ones(64, 32, 3, 3)}, True),
        ({"flipped": True}, False),
        ({"stride": (2, 1)}, False),
        ({"dilation": (1, 2)}, False),
        ({"groups": 2}, False),
        ({"padding": (3, 0)}, False),
        ({"weight": torch.ones(64, 16, 3, 1)}, False),
        ({"weight": torch.ones(64, 16, 3, 3).double()}, False),
        ({"weight": torch.ones(64, 8, 3, 3), "x": (2, 8, 30, 30)}, False),
        ({"x": (1, 16, 12, 12)}, False),
        ({"x": (2, 24, 30, 30)}, False),  # the library says what is wrong
        ({"x": (99, 16, 3, 3), "padding": (0, 0)}, False),
        ({"x": (0, 16, 30, 30)}, False),
    ],
    ids=str,
)
@NATIVE
def test_which_convolutions_it_does(changed, expected):
    given = {"x": (2, 16, 30, 30), "weight": torch.ones(64, 16, 3, 3), "stride": (1, 1), "padding": (1, 1),
             "dilation": (1, 1), "groups": 1} | changed  # fmt: skip
    size = given["x"] if not given.get("flipped") else (2, 64, 30, 30)
    x = torch.ones(size).contiguous(memory_format=torch.channels_last)
    assert winograd.convolves(**given | {"x": x}) is expected
    assert not winograd.convolves(**given | {"x": torch.ones(size).contiguous()}) or not x.numel()
