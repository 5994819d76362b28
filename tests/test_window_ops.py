"""The window ops beyond their case table: any geometry, what they refuse, what they leave alone."""

from __future__ import annotations

import functools
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from op_case import DTYPES, F32, F64, SPECIAL, TIES, drawing
from op_cases import ARRANGEMENTS, BY_OP, serving, subjects
from op_truth import assert_same, is_dense
from test_ops import far_apart
from window_cases import window_tables
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
from convviz_cuda import ops
from convviz_cuda._register import op_names

NAMES = [
    "occlude",
    "gather_windows",
    "gather_windows_",
    "add_windows_",
    "pool_windows",
    "sum_windows",
    "window_mean",
]
each_subject = pytest.mark.parametrize("subject", subjects("gather_windows"))


def test_info_lists_the_ops():
    assert set(NAMES) <= set(op_names()) == set(convviz_cuda.info()["ops"])
    assert all(callable(getattr(ops, name)) for name in NAMES)


@pytest.mark.parametrize(
    "case", [case for case in BY_OP["gather_windows"] if "no-" not in case.label], ids=str
)
def test_the_rows_of_the_table_read_all_sources(case):
    base, patch, *tables = case.inputs(drawing(F32))[:5]
    values = gather_truth(base * 0 + 2, patch * 0 + 3, *tables, size=case.options["size"], pad=1.0)
    if "1-pixel" not in case.label and "1-channel" not in case.label:
        assert {3.0} < set(values.unique().tolist())
    assert (values == 3).any()


# ----------------------------------------------------------------------------------------- any geometry

seeds = st.integers(0, 2**16)
bounds = st.sampled_from([{}, {"low": 0.0}, {"low": -1.0, "high": 1.0}, {"high": 0.0}])
layouts = st.tuples(*[st.sampled_from(sorted(ARRANGEMENTS))] * 3)


@st.composite
def windows(draw, columns: int):
    """Inputs of an op on base and patch: maps of any sizes in any strides, results and patches anywhere."""
    dtype, seed, wild = draw(st.sampled_from(DTYPES)), draw(seeds), draw(st.booleans())
    channels = draw(st.sampled_from([1, 2, 4, 16, 35]))
    base = (draw(st.integers(1, 2)), channels, draw(st.integers(1, 7)), draw(st.integers(1, 7)))
    patch, size = (draw(st.tuples(*[st.integers(0, 5)] * 2)) for _ in range(2))
    count = draw(st.integers(0, 4))
    make, kinds = drawing(dtype, draw(st.sampled_from([SPECIAL, TIES])), seed), draw(layouts)
    maps = [ARRANGEMENTS[k](make(*s)) for k, s in zip(kinds, (base, (count, channels, *patch)), strict=False)]
    out = make(count, channels + 3, *size)
    out = out.contiguous(memory_format=torch.channels_last) if "last" in kinds[2] else out
    bias = drawing(dtype, TIES, seed + 1)(channels) if draw(st.booleans()) else None
    return [*maps, *window_tables(seed, base, count, patch, size, columns, wild)], out, bias, size


def on(device, *tensors):
    return [None if x is None else x.to(device) for x in tensors]


@each_subject
@given(windows(2), bounds, st.sampled_from([0.0, -1.5, float("-inf")]))
def test_gathering(subject, given_, limits, pad):
    sources, out, bias, size = given_
    with serving(subject) as device:
        sources_, (out_, bias_) = on(device, *sources), on(device, out, bias)
        result = ops.gather_windows(*sources_, size, pad, bias_, **limits)
        ops.gather_windows_(out_.copy_(out), *sources_, 2, pad, bias_, **limits)
        added = out.to(device).clone()[:, 1:-2]
        ops.add_windows_(added, *sources_, **limits)
    assert_same(result, gather_truth(*sources, bias, size=size, pad=pad, **limits))
    assert_same(added, add_truth(out[:, 1:-2], *sources, **limits))
    expected = gather_into_truth(out, *sources, bias, channel=2, pad=pad, **limits)
    again = gather_into_truth(expected.to(out.dtype), *sources, bias, channel=2, pad=pad, **limits)
    assert_same(out_, again)


@each_subject
@given(windows(3), st.sampled_from([(), (1, 1, 1), (5, 1, 1, 1)]), st.booleans())
def test_occluding(subject, given_, fill, each):
    (images, _, *tables), _, _, size = given_
    shape = (
        images.shape
        if each
        else tuple(n if n == 1 else images.shape[i - len(fill)] for i, n in enumerate(fill))
    )
    fill = drawing(images.dtype, SPECIAL, 7)(*shape)
    with serving(subject) as device:
        result = ops.occlude(*on(device, images, fill, *tables), size)
    assert_same(result, occlude_truth(images, fill, *tables, size=size))


@st.composite
def poolings(draw):
    pairs = functools.partial(st.tuples, *[st.integers(1, 3)] * 2)
    kernel = draw(st.tuples(st.integers(1, 5), st.integers(1, 9)))
    options = {
        "kernel_size": kernel,
        "stride": draw(pairs()),
        "padding": tuple(draw(st.integers(0, k // 2)) for k in kernel),
        "average": draw(st.booleans()),
    }
    if not options["average"]:
        return options | {"dilation": draw(pairs())}
    include, divisor = draw(st.booleans()), draw(st.sampled_from([None, None, 3, -1]))
    return options | {"count_include_pad": include, "divisor_override": divisor}


@each_subject
@given(windows(2), poolings(), bounds)
def test_pooling_rectangles(subject, given_, options, limits):
    sources, _, bias, size = given_
    with serving(subject) as device:
        result = ops.pool_windows(
            *on(device, *sources), size, **options, bias=None if bias is None else bias.to(device), **limits
        )
    assert_same(result, window_pool_truth(*sources, bias, size=size, **options, **limits), signed=False)


@each_subject
@given(windows(1), bounds)
def test_summing(subject, given_, limits):
    sources, _, bias, _ = given_
    with serving(subject) as device:
        result = ops.sum_windows(*on(device, *sources, bias), **limits)
    assert_same(result, window_sum_truth(*sources, bias, **limits))


@each_subject
@given(
    st.tuples(st.integers(0, 2), *[st.integers(0, 6)] * 2),
    *[st.tuples(*[st.integers(least, 9)] * 2) for least in (0, 1, 1)],
    st.sampled_from(DTYPES),
    seeds,
)
def test_maps_of_windows(subject, shape, size, window, stride, dtype, seed):
    scores = drawing(dtype, SPECIAL, seed)(*shape)
    with serving(subject) as device:
        result = ops.window_mean(scores.to(device), size, window, stride)
    assert_same(result, window_mean_truth(scores, size=size, window=window, stride=stride))


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"ceil_mode": True}, {"padding": 1}, {"ceil_mode": True, "padding": 1}]
)
@each_subject
def test_pooling_everything_is_pytorchs_pooling(subject, options, average):
    """The whole pooled map, with a patch that makes no difference, and one that is everything."""
    x = drawing(F64, ())(2, 5, 8, 9)
    pool = F.avg_pool2d if average else F.max_pool2d
    expected = pool(x, 3, 2, **options)
    variants = torch.tensor([[0, 0, 0], [1, 0, 0]])
    padding = options.get("padding", 0)
    with serving(subject) as device:
        for base, patch in ((x, x[:, :, 2:4, 2:5]), (x[:, :, :, :] * 0, x)):
            start = 0 if patch.shape == x.shape else 2
            tables = variants, torch.tensor([[0, start]]), torch.tensor([[0, start]])
            result = ops.pool_windows(
                *on(device, base, patch, *tables), expected.shape[2:], 3, 2, padding, average=average
            )
            torch.testing.assert_close(result.cpu(), expected)


@each_subject
def test_a_sum_is_a_global_averages_change(subject):
    base, patch = drawing(F64, ())(2, 6, 7, 8), drawing(F64, (), 1)(3, 6, 3, 4)
    variants = torch.tensor([[0, 0, 0], [1, 1, 0], [1, 0, 1]])
    rows, cols = torch.tensor([[0], [4]]), torch.tensor([[1], [4]])
    whole = base[variants[:, 0]].clone()
    for n, (_, r, c) in enumerate(variants.tolist()):
        whole[n, :, rows[r, 0] : rows[r, 0] + 3, cols[c, 0] : cols[c, 0] + 4] = patch[n]
    with serving(subject) as device:
        change = ops.sum_windows(*on(device, base, patch, variants, rows, cols)).cpu()
    means = base[variants[:, 0]].mean((2, 3)) + change / (7 * 8)
    torch.testing.assert_close(means, whole.mean((2, 3)))


@pytest.mark.parametrize("dtype", DTYPES)
@each_subject
def test_a_sum_is_more_than_its_numbers_type_can_hold(subject, dtype):
    base, patch = torch.zeros(1, 2, 64, 64, dtype=dtype), torch.full((1, 2, 60, 50), 40.0, dtype=dtype)
    variants, table = torch.tensor([[0, 0, 0]]), torch.tensor([[0]])
    with serving(subject) as device:
        total = ops.sum_windows(*on(device, base, patch, variants, table, table)).cpu()
    assert total.dtype == (F64 if dtype == F64 else F32) and total.eq(40.0 * 60 * 50).all()


@each_subject
def test_maps_beyond_32_bit_offsets(subject):
    with serving(subject) as device:
        base, patch = (far_apart(3, dtype=torch.float16, device=device).view(3, 1, 2, 4) for _ in range(2))
        base.copy_(drawing(torch.float16)(3, 1, 2, 4))
        patch.copy_(drawing(torch.float16, seed=1)(3, 1, 2, 4))
        variants, table = torch.tensor([[2, 0, 0], [0, 0, 0], [1, 0, 0]]), torch.tensor([[0, 1]])
        sources = base, patch, variants.to(device), table.to(device), table.to(device)
        expected = (*(x.cpu().contiguous() for x in sources),)
        assert_same(ops.gather_windows(*sources, (3, 5)), gather_truth(*expected, size=(3, 5)))
        result = ops.pool_windows(*sources, (1, 3), 2, 1)
        assert_same(result, window_pool_truth(*expected, size=(1, 3), kernel_size=2, stride=1), signed=False)


# ------------------------------------------------------------------------------------------- left alone

BASE, PATCH = drawing(F32, ())(2, 3, 5, 6), drawing(F32, (), 1)(4, 3, 2, 3)
VARIANTS = torch.tensor([[0, 0, 0], [1, 0, 1], [1, 1, 0], [0, 1, 1]])
PAIRS, SINGLES, TRIPLES = (
    torch.tensor([[-1, 0], [2, 3]]),
    torch.tensor([[0], [3]]),
    torch.tensor([[0, 1, 3]] * 2),
)
BIAS = torch.ones(3)


def common(columns: torch.Tensor):
    return {"base": BASE, "patch": PATCH, "variants": VARIANTS, "rows": columns, "cols": columns}


def call(op: str, arguments: dict):
    def named(**changed):
        return getattr(ops, op)(**arguments | changed)

    named.__name__ = op
    named.arguments = arguments
    return named


OUT, SUM = torch.zeros(4, 5, 4, 4), torch.zeros(4, 3, 4, 4)
occlude = call(
    "occlude",
    {
        "images": BASE,
        "fill": BIAS.view(3, 1, 1),
        "variants": VARIANTS,
        "rows": TRIPLES,
        "cols": TRIPLES,
        "size": (5, 6),
    },
)
gather = call("gather_windows", common(PAIRS) | {"size": (4, 4), "bias": BIAS})
gather_ = call("gather_windows_", {"out": OUT} | common(PAIRS) | {"channel": 1, "bias": BIAS})
add_ = call("add_windows_", {"out": SUM} | common(PAIRS))
pool = call("pool_windows", common(PAIRS) | {"size": (2, 2), "kernel_size": 2, "bias": BIAS})
total = call("sum_windows", common(SINGLES) | {"bias": BIAS})
mean = call("window_mean", {"scores": torch.ones(1, 2, 2), "size": (4, 4), "window": 2, "stride": 2})
ON_MAPS = gather, gather_, add_, pool, total
IN_PLACE = gather_, add_


@pytest.mark.parametrize("function", [occlude, *ON_MAPS, mean], ids=lambda f: f.__name__)
@each_subject
def test_no_gradient_is_recorded(subject, function):
    """Neither by a kernel nor by the reference, which PyTorch could differentiate."""
    with serving(subject):
        first = next(name for name in function.arguments if name != "out")
        changed = {first: function.arguments[first].clone().requires_grad_()}
        if function in IN_PLACE:
            changed["out"] = function.arguments["out"].clone()
        result = function(**changed)
        assert not (changed["out"] if result is None else result).requires_grad


@pytest.mark.parametrize("function", IN_PLACE, ids=lambda f: f.__name__)
@each_subject
def test_a_change_in_place_is_noticed_by_autograd(subject, function):
    x = function.arguments["out"].clone().requires_grad_()
    y = x * 1.0
    z = (y * y).sum()
    with serving(subject), torch.no_grad():
        function(out=y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.backward()
    with serving(subject), torch.inference_mode():  # tensors without a count of changes
        function(out=torch.zeros_like(x))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(4, 3, 1, 1), (4, 3, 0, 2), (4, 3, 2, 3)])
def test_a_patch_that_has_both_layouts_follows_the_base(layout, shape):
    base = BASE.contiguous(memory_format=layout)
    patch = torch.ones(shape)
    if shape[3] == 3:
        patch = patch.contiguous(memory_format=layout)
    for result in (gather(base=base, patch=patch), pool(base=base, patch=patch)):
        assert result.is_contiguous(memory_format=layout) and is_dense(result)
    last = torch.channels_last if layout == torch.contiguous_format else torch.contiguous_format
    assert gather(base=base, patch=PATCH.contiguous(memory_format=last)).is_contiguous(memory_format=last)


# --------------------------------------------------------------------------------------------- refused

REFUSED = [
    *(
        (function, {name: value}, TypeError, words)
        for function, names in (
            (occlude, ("images", "fill")),
            *((f, ("base", "patch")) for f in ON_MAPS),
            *((f, ("out",)) for f in IN_PLACE),
            (gather, ("bias",)),
            (pool, ("bias",)),
            (mean, ("scores",)),
        )
        for name in names
        for value, words in (
            (None, f"{name} must be a tensor, but it is a NoneType."),
            ([1.0], f"{name} must be a tensor, but it is a list."),
            (BASE.int(), f"{name} must be float64, float32, bfloat16 or float16, but it is torch.int32."),
        )
        if (name, value) != ("bias", None)
    ),
    *(
        (function, {name: value}, error, words)
        for function in (occlude, *ON_MAPS)
        for name in ("variants", "rows", "cols")
        for value, error, words in (
            (None, TypeError, f"{name} must be a tensor, but it is a NoneType."),
            (VARIANTS.int(), TypeError, f"{name} must be int64, but it is torch.int32."),
            (VARIANTS[0], ValueError, "but it has the shape (3,)."),
            (torch.zeros(4, 7, dtype=torch.int64), ValueError, f"{name} must have the shape (count, "),
            (torch.zeros(4, 7, dtype=torch.int64).to("meta"), ValueError, "but it has the shape (4, 7)."),
            (function.arguments[name].to("meta"), ValueError, f"{name} must be on cpu as the other tensors are"),
        )
    ),
    *(
        (function, {name: function.arguments[name][:0]}, ValueError, f"{name} must not be empty")
        for function in (occlude, *ON_MAPS)
        for name in ("rows", "cols")
    ),
    *(
        (function, {name: BASE[:0]}, ValueError, f"{name} must have an image where there are variants.")
        for function, name in ((occlude, "images"), *((f, "base") for f in ON_MAPS))
    ),
    *(
        (f, {"patch": value}, error, words)
        for f in ON_MAPS
        for value, error, words in (
            (PATCH[0], ValueError, "patch must have the shape (N, C, H, W), but it has the shape (3, 2, 3)."),
            (PATCH.double(), TypeError, "patch must be torch.float32 on cpu as base is, but it is torch.float64"),
            (PATCH[:3], ValueError, "patch must have 4 variants of 3 channels, but it has the shape (3, 3, 2, 3)."),
            (PATCH[:, :2], ValueError, "but it has the shape (4, 2, 2, 3)."),
            (PATCH.to("meta"), TypeError, "but it is torch.float32 on meta."),
        )
    ),
    *(
        (f, {"low": low, "high": high}, ValueError, f"high must be at least low, but low is {low} and high is {high}.")
        for f in ON_MAPS
        for low, high in ((1.0, 0.5), (float("nan"), 1.0), (0.0, float("nan")))
    ),
    *(
        (f, {"bias": value}, error, words)
        for f in (gather, gather_, pool, total)
        for value, error, words in (
            (BIAS[:2], ValueError, "bias must have the shape (3,), but it has the shape (2,)."),
            (BIAS.view(3, 1), ValueError, "but it has the shape (3, 1)."),
            (BIAS.double(), TypeError, "bias must be torch.float32 on cpu as patch is"),
        )
    ),
    *(
        (f, {"size": value}, error, words)
        for f in (occlude, gather, pool, mean)
        for value, error, words in (
            ((2, -1), ValueError, "size must be at least 0, but it is (2, -1)."),
            ((1, 2, 3), TypeError, "size must be an int or a pair of ints, but it is (1, 2, 3)."),
            ((2.0, 2), TypeError, "(2.0, 2)"),
        )
    ),
    (occlude, {"fill": torch.ones(2, 1, 1)}, ValueError, "fill must broadcast to the images' shape (2, 3, 5, 6)"),
    (occlude, {"fill": torch.ones(5, 1, 3, 5, 6)}, ValueError, "but it has the shape (5, 1, 3, 5, 6)."),
    (occlude, {"fill": BIAS.double()}, TypeError, "fill must be torch.float32 on cpu as images is"),
    *(
        (f, {"out": value}, error, words)
        for f in IN_PLACE
        for value, error, words in (
            (OUT[:3], ValueError, "out must have 4 variants, but it has 3."),
            (OUT.double(), TypeError, "out must be torch.float32 on cpu as patch is, but it is torch.float64 on cpu."),
            (OUT[:, :, :1].expand(4, 5, 4, 4), ValueError, "out must have memory for each element"),
            (OUT.clone()[:, : f.arguments["out"].shape[1]].requires_grad_(), ValueError, "use torch.no_grad()"),
        )
    ),
    (gather_, {"channel": 3}, ValueError, "channel must leave room for 3 channels in out's 5, but it is 3."),
    (gather_, {"channel": -1}, ValueError, "but it is -1."),
    (add_, {"out": OUT}, ValueError, "out must have 3 channels, but it has 5."),
    (pool, {"padding": 2}, ValueError, "padding must be at most half of the kernel_size 2, but it is 2."),
    (pool, {"stride": 0}, ValueError, "stride must be at least 1, but it is 0."),
    (pool, {"kernel_size": (2, 2, 2)}, TypeError, "kernel_size must be an int or a pair of ints"),
    (pool, {"kernel_size": [2, 0]}, ValueError, "kernel_size must be at least 1, but it is [2, 0]."),
    (pool, {"average": True, "dilation": 2}, ValueError, "dilation must be 1 for an average, but it is 2."),
    (pool, {"divisor_override": 2}, ValueError, "divisor_override must be None, or for an average not 0, but it is 2."),
    (pool, {"average": True, "divisor_override": 0}, ValueError, "but it is 0."),
    (mean, {"scores": torch.ones(2, 2)}, ValueError, "scores must have the shape (M, R, Q)"),
    (mean, {"window": 0}, ValueError, "window must be at least 1, but it is 0."),
    (mean, {"stride": (1, 0)}, ValueError, "stride must be at least 1, but it is (1, 0)."),
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
    assert not OUT.any() and not SUM.any()


@pytest.mark.parametrize("function", [occlude, *ON_MAPS, mean], ids=lambda f: f.__name__)
def test_good_arguments(function):
    changed = {"out": function.arguments["out"].clone()} if "out" in function.arguments else {}
    result = function(**changed)
    assert torch.is_tensor(changed["out"] if result is None else result)
