"""Every op, by its kernels and by its reference, against a truth of its own."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_case import DTYPES, F32, F64, SPECIAL, TIES, drawing
from op_cases import (
    ARRANGEMENTS,
    BY_OP,
    CASES,
    DEVICES,
    OVERLOADS,
    RULES,
    SERVED,
    TYPICAL,
    dense_stride,
    on,
    prepared,
    serving,
    subjects,
)
from op_truth import (
    assert_all_same,
    assert_same,
    conv_truth,
    is_dense,
    keeps_strides,
    max_abs_truth,
    pool_truth,
    relu_backward_truth,
    relu_truth,
    unpool_truth,
)

from convviz_cuda import ops
from convviz_cuda._register import op_names
from convviz_cuda.reference import memory_format

ROWS = [
    pytest.param(case, subject, dtype, id=f"{case}-{subject}-{str(dtype).removeprefix('torch.')}")
    for case in CASES
    for subject in subjects(case.op)
    for dtype in case.dtypes
]


@pytest.mark.parametrize(("case", "subject", "dtype"), ROWS)
def test_equals_the_truth(case, subject, dtype):
    # All strides in one dtype, one in the others: strides and dtypes meet in no other way.
    for arrangement in ARRANGEMENTS if dtype == F32 else ["shifted_channels_last"]:
        inputs, expected = prepared(case, dtype, arrangement)
        if case.in_place and not is_dense(inputs[0]):
            continue  # refused, see test_bad_arguments
        with serving(subject) as device:
            given_ = on(device, inputs, arrangement)
            before = [x.clone() for x in given_]
            results = case(*given_)
        assert {result.device for result in results} == {given_[0].device}
        assert results[0].dtype == (F32 if case.sums and dtype != F64 else dtype)
        assert_all_same(results, expected, signed=case.signed)
        if not case.in_place:
            assert_all_same(given_, [x.cpu() for x in before])
        if case.like is not None:
            assert_layout(results[0], given_[case.like])


def assert_layout(result, like):
    """Strides of the input where they are dense, else, and for images, those of one of the two layouts."""
    if like.dim() != 4:
        assert is_dense(result)
        return
    last = like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous()
    assert result.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def test_every_op_has_rows():
    assert [name for name, cases in BY_OP.items() if not cases] == []
    assert {case.op for case in TYPICAL} == set(op_names()) == set(OVERLOADS)


@pytest.mark.parametrize("case", [row for op in ("relu", "relu_") for row in BY_OP[op]], ids=str)
@pytest.mark.parametrize("arrangement", ["contiguous", "channels_last", "transposed"])
def test_relu_keeps_dense_strides(case, arrangement):
    x = ARRANGEMENTS[arrangement](*case.inputs(drawing(F32)))
    stride = x.stride()
    if x.numel() and (case.in_place or keeps_strides(x)):
        assert case(x)[0].stride() == stride


@pytest.mark.parametrize("case", BY_OP["relu_backward"], ids=str)
def test_relu_backward_lies_as_the_forward_does(case):
    result = case(*case.inputs(drawing(F32)))[0]
    assert is_dense(result)
    inner = [
        (n, s, t)
        for n, s, t in zip(result.shape, result.stride(), case.options["stride"], strict=True)
        if n > 1
    ]
    assert all(s == t for _, s, t in inner[1:])


# ----------------------------------------------------------------------------------------- hypothesis

values = st.sampled_from([SPECIAL, TIES, (1.0,), (-1.0, 0.0), (float("-inf"),), (float("nan"), 1.0)])
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**16)
layouts = st.sampled_from(sorted(ARRANGEMENTS))


@st.composite
def poolings(draw):
    """A shape that the pooling fits into, and its arguments."""
    pairs = functools.partial(st.tuples, *[st.integers(1, 3)] * 2)
    kernel, stride, dilation = (
        draw(st.tuples(st.integers(1, 4), st.integers(1, 4))),
        draw(pairs()),
        draw(pairs()),
    )
    span = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    sizes = [draw(st.integers(max(1, n - 2 * p), n + 6)) for n, p in zip(span, padding, strict=True)]
    shape = (draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 17])), *sizes)
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    return shape, dict(zip(names, (kernel, stride, padding, dilation, draw(st.booleans())), strict=True))


@pytest.mark.parametrize("subject", subjects("relu_max_pool2d"))
@given(poolings(), values, dtypes, layouts, seeds, st.booleans())
def test_pooling_of_any_geometry(subject, pooling, values, dtype, arrangement, seed, relu):
    shape, options = pooling
    x = ARRANGEMENTS[arrangement](drawing(dtype, values, seed)(*shape))
    with serving(subject) as device:
        results = ops.relu_max_pool2d(x.to(device), **options, relu=relu)
    assert_all_same(results, pool_truth(x, **options, relu=relu))


@pytest.mark.parametrize("subject", subjects("switch_unpool2d"))
@given(
    poolings(),
    values,
    dtypes,
    layouts,
    seeds,
    st.sampled_from(RULES),
    st.booleans(),
    st.integers(1, 3),
    st.booleans(),
)
def test_unpooling_of_any_geometry(
    subject, pooling, values, dtype, arrangement, seed, rule, overwrite, repeats, any_switch
):
    shape, options = pooling
    switches = pool_truth(drawing(F32, TIES, seed)(*shape), **options, relu=rule != "identity")[1]
    if (
        any_switch
    ):  # whatever they hold, also positions in the padding and behind the window, nothing else is touched
        switches = torch.randint_like(switches, 0, 127)
    signal = drawing(dtype, values, seed)(repeats * shape[0], *switches.shape[1:])
    signal, switches = ARRANGEMENTS[arrangement](signal), ARRANGEMENTS[arrangement](switches)
    options.pop("ceil_mode")
    options |= {"size": shape[2:], "rule": rule, "overlap": "overwrite" if overwrite else "sum"}
    with serving(subject) as device:
        result = ops.switch_unpool2d(signal.to(device), switches.to(device), **options)
    assert_same(result, unpool_truth(signal, switches, **options), signed=False)


@pytest.mark.parametrize("subject", subjects("relu_backward"))
@given(st.data(), values, dtypes, seeds, st.sampled_from(RULES))
def test_relu_of_any_strides(subject, data, values, dtype, seed, rule):
    size = data.draw(st.lists(st.integers(1, 9), max_size=5).filter(lambda s: math.prod(s) < 2000))
    order = data.draw(st.permutations(range(len(size))))
    x = drawing(dtype, values, seed)(*size)
    x = torch.empty_strided(size, dense_stride(size, order), dtype=dtype).copy_(x)
    repeats = data.draw(st.integers(1, 3)) if size and order[0] == 0 else 1
    signal = drawing(dtype, values, seed + 1)(*([repeats * size[0], *size[1:]] if size else []))
    for dim, way in enumerate(data.draw(st.tuples(*[st.sampled_from("=.x") for _ in size]))):
        if way == ".":  # every second element of something longer
            signal = signal.repeat_interleave(2, dim)[(slice(None),) * dim + (slice(None, None, 2),)]
        elif way == "x":  # one element, expanded
            signal = signal.narrow(dim, 0, 1).expand(signal.shape)
    with serving(subject) as device:
        out, mask = ops.relu(x.to(device))
        result = ops.relu_backward(signal.to(device), mask, out.shape, out.stride(), rule)
    assert_all_same((out, mask), relu_truth(x))
    assert_same(result, relu_backward_truth(signal, mask.cpu(), size, out.stride(), rule))


bounds = st.sampled_from([-0.7, -0.1, -0.0, 0.0, 0.1, 1 / 3, 1.0, 33.3, float("inf")])


@pytest.mark.parametrize("subject", subjects("relu"))
@given(st.lists(st.integers(0, 9), max_size=4), values, dtypes, layouts, seeds, bounds, bounds, st.booleans())
def test_relu_of_any_bounds(subject, size, values, dtype, arrangement, seed, one, other, capped):
    lower, upper = sorted([one, other])
    upper = upper if capped else None
    x = drawing(dtype, values, seed)(*size)
    x = ARRANGEMENTS[arrangement](x) if x.dim() == 4 else x
    with serving(subject) as device:
        results = ops.relu(x.to(device), lower, upper)
    assert_all_same(results, relu_truth(x, lower, upper), signed=False)


@st.composite
def convolutions(draw):
    """The size of an input and of a weight that fits into it, and the geometry."""
    kernel, stride, dilation, padding = (
        draw(st.tuples(*[st.integers(low, high)] * 2)) for low, high in ((1, 4), (1, 3), (1, 2), (0, 2))
    )
    least = [(k - 1) * d + 1 - 2 * p for k, d, p in zip(kernel, dilation, padding, strict=True)]
    size = [draw(st.integers(max(1, n), max(1, n) + 6)) for n in least]
    weight = (draw(st.sampled_from([1, 3, 16, 19])), draw(st.integers(1, 4)), *kernel)
    return size, weight, {"stride": stride, "padding": padding, "dilation": dilation}


@pytest.mark.parametrize("subject", subjects("conv2d_input_grad"))
@given(convolutions(), st.integers(1, 2), st.sampled_from([TIES, ()]), dtypes, layouts, seeds)
def test_input_gradients_of_any_geometry(subject, convolution, batch, values, dtype, arrangement, seed):
    size, shape, options = convolution
    weight = drawing(dtype, values, seed)(*shape)
    maps = torch.nn.functional.conv2d(torch.zeros(1, shape[1], *size), weight.float(), **options).shape[2:]
    signal = ARRANGEMENTS[arrangement](drawing(dtype, values, seed + 1)(batch, shape[0], *maps))
    with serving(subject) as device:
        result = ops.conv2d_input_grad(signal.to(device), weight.to(device), size, **options)
    assert_all_same((result,), (conv_truth(signal, weight, size, **options),), signed=False)


@pytest.mark.parametrize("subject", subjects("max_abs_channels"))
@given(st.tuples(*[st.integers(1, n) for n in (2, 19, 9, 9)]), values, dtypes, layouts, seeds)
def test_largest_magnitudes_of_any_size(subject, shape, values, dtype, arrangement, seed):
    x = ARRANGEMENTS[arrangement](drawing(dtype, values, seed)(*shape))
    with serving(subject) as device:
        result = ops.max_abs_channels(x.to(device))
    assert_same(result, max_abs_truth(x))


# ----------------------------------------------------------------------------------- large, in place, exact


def _pooled(x):
    return ops.relu_max_pool2d(x, 3, 2, 1)


# Each op on an input larger than the shares of work that threads get, with odd ends.
LARGE = {
    "relu": lambda x: ops.relu(x, upper=1.0),
    "relu_": lambda x: (ops.relu_(y := x.clone()), y),
    "relu_backward": lambda x: ops.relu_backward(torch.cat([x.flip(2), -x]), *_forward(x), "guided"),
    "relu_max_pool2d": _pooled,
    "switch_unpool2d": lambda x: ops.switch_unpool2d(
        torch.cat([_pooled(x)[0], -_pooled(x)[0]]), _pooled(x)[1], x.shape[2:], 3, 2, 1, rule="guided"
    ),
    "conv2d_input_grad": lambda x: ops.conv2d_input_grad(
        x, x[0, :, None, :7, :7].expand(-1, 3, 7, 7), (43, 59), 2, 3
    ),
    "max_abs_channels": ops.max_abs_channels,
    "occlude": lambda x: ops.occlude(x, x[:1, :, :1, :1], *_tables(x, 3), x.shape[2:]),
    "gather_windows": lambda x: ops.gather_windows(
        *_sources(x), *_tables(x, 2), (19, 23), bias=x[0, :, 0, 0]
    ),
    "gather_windows_": lambda x: _changed(ops.gather_windows_, x, 20, 3, 0.5, x[0, :, 1, 0], 0.0),
    "add_windows_": lambda x: _changed(ops.add_windows_, x, 0, 0.0),
    "pool_windows": lambda x: ops.pool_windows(*_sources(x), *_tables(x, 2), (9, 11), 3, 2, 1, low=0.0),
    "sum_windows": lambda x: ops.sum_windows(*_sources(x), *_tables(x, 1), low=0.0),
    "window_mean": lambda x: ops.window_mean(x.flatten(0, 1).contiguous(), (47, 61), 5, 2),
    "direct_conv2d": lambda x: ops.direct_conv2d(
        x, x[0].reshape(-1)[: 402 * 32].view(1, 402, 32), None, (3, 2)
    ),
    "direct_conv2d_": lambda x: _beside(ops.direct_conv2d_, x, x[0, :, :2, :16].reshape(1, -1, 32), 1),
    "winograd_conv2d": lambda x: ops.winograd_conv2d(
        x, x[:, :, :8, :4].reshape(16, 67, -1)[..., :2], None, 1
    ),
    "winograd_conv2d_": lambda x: _beside(
        ops.winograd_conv2d_, x, x[:, :, :8, :4].reshape(16, 67, -1)[..., :2], 1
    ),
    "winograd_input": lambda x: ops.winograd_input(x, 1),
    "winograd_output": lambda x: ops.winograd_output(
        x.flatten()[: 82 * 16 * 67].view(-1, 16, 67), (2, 81, 2), x[0, :, 0, 0], 0.0
    ),
    "winograd_packed": lambda x: ops.winograd_packed(x.reshape(-1)[: 67 * 66 * 9].view(67, 66, 3, 3)) + 0.0,
    "mask_images": lambda x: ops.mask_images(x, *_grids(x)),
    "mask_images_": lambda x: _masked_into(x, *_grids(x)),
    "replace_ranked": lambda x: ops.replace_ranked(x, *_ranked(x)),
    "replace_ranked_": lambda x: _ranked_into(x, *_ranked(x)),
    "philox": lambda x: ops.philox(torch.arange(2000, device=x.device), 103, 5, 7),
}


def _tables(x, columns):
    """16 variants, each at a place of its own."""
    place = torch.arange(16, device=x.device)
    lines = torch.stack([place - 2, place, place + 9][: max(2, columns)], 1)
    return torch.stack([place % 2, place, place.flip(0)], 1), *[
        lines[:, 2 - columns if columns == 1 else 0 :]
    ] * 2


def _grids(x):
    """16 grids of zeros and ones, each for an image and at a place of its own; every position is exact."""
    place = torch.arange(16, device=x.device)
    grids = (place[:, None, None] >> torch.arange(4, device=x.device)[:, None]) + place[:4] & 1
    return grids.to(x.dtype), place % 2, torch.stack([place, place.flip(0)], 1), 1 / 16, 1 / 32


def _masked_into(x, *arguments):
    out = x.new_ones(16, *x.shape[1:]).contiguous(memory_format=memory_format(x))
    ops.mask_images_(out, x, *arguments)
    return out


def _ranked(x):
    """16 ranges of ranks, each of an image; a fill of one value a channel."""
    place = torch.arange(16, device=x.device)
    pixels = x.shape[2] * x.shape[3]
    ranks = (torch.arange(x.shape[0] * pixels, device=x.device) * 7919 % pixels).int()
    ranks = ranks.view(x.shape[0], *x.shape[2:])
    return x[:1, :, :1, :1], ranks, place % 2, place * 10, place * place * 20


def _ranked_into(x, *arguments):
    out = x.new_ones(16, *x.shape[1:]).contiguous(memory_format=memory_format(x))
    ops.replace_ranked_(out, x, *arguments)
    return out


def _sources(x):
    return x, x[:1, :, 3:18, 2:19].expand(16, -1, -1, -1)


def _changed(op, x, more, *arguments):
    """The result of an op in place, with `more` channels than it changes all of."""
    out = x.new_ones(16, x.shape[1] + more, 19, 23).contiguous(memory_format=memory_format(x))
    op(out, *_sources(x), *_tables(x, 2), *arguments)
    return out


def _beside(op, x, weight, number):
    """A convolution into the channels from 3 on of something larger."""
    out = x.new_ones(x.shape[0], 40, *x.shape[2:]).contiguous(memory_format=memory_format(x))
    op(out, x, weight, None, number, channel=3)
    return out


def _forward(x):
    out, mask = ops.relu(x)
    return mask, out.shape, out.stride()


@pytest.fixture
def threads():
    """Sets the number of threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("op", LARGE)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_large_results_are_the_references_for_any_number_of_threads(op, layout, threads):
    inexact = op in ("conv2d_input_grad", "sum_windows", "window_mean") or op.startswith(
        ("winograd", "direct")
    )
    x = ARRANGEMENTS[layout](drawing(F32, TIES if inexact else SPECIAL)(2, 67, 22, 30))
    results = []
    with serving("reference"):
        results.append(LARGE[op](x))
    for count in (1, 2, 7, 7):
        threads(count)
        results.append(LARGE[op](x))
    expected, *others = [result if isinstance(result, tuple) else (result,) for result in results]
    for result in others:  # a convolution's sums of small integers are exact in any order
        assert_all_same(result, expected, signed=op not in ("switch_unpool2d", "conv2d_input_grad"))


@pytest.mark.skipif(SERVED["conv2d_input_grad"]["cpu"] == "reference", reason="PyTorch may sum in any order")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_convolutions_sums_do_not_depend_on_threads(layout, threads):
    x = ARRANGEMENTS[layout](drawing(F32, ())(2, 67, 22, 30))
    threads(1)
    expected = LARGE["conv2d_input_grad"](x)
    for count in (2, 7):
        threads(count)
        assert_same(LARGE["conv2d_input_grad"](x), expected)


def test_every_op_is_tried_large():
    assert set(LARGE) == set(op_names())


def test_relu_in_place_changes_its_slice_only():
    base = drawing(F32, (-1.0,))(3, 50)
    ops.relu_(base[1, 3:20])
    assert (base[1, 3:20] == 0).all()
    assert (base == 0).sum() == 17


def test_relu_in_place_is_noticed_by_autograd():
    x = torch.randn(5, requires_grad=True)
    y = x * 1.0
    z = (y * y).sum()
    with torch.no_grad():
        ops.relu_(y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.backward()


# By hand, as the truth could be wrong too: a 2x2 window, its maximum and switch after a ReLU, and without.
nan, inf = float("nan"), float("inf")
WINDOWS = [
    ([1, 2, 3, 4], (4, 3), (4, 3)),
    ([5, 5, 5, 5], (5, 0), (5, 0)),  # the first of equal ones
    ([-1, -2, -3, -4], (0, ~0), (-1, 0)),  # a dead window: all tie at zero
    ([-4, -3, 0, -1], (0, ~0), (0, 2)),
    ([-0.0, 0, -0.0, 0], (0, ~0), (0, 0)),
    ([nan, 9, nan, 1], (nan, 2), (nan, 2)),  # the last NaN
    ([-inf, -inf, -inf, -inf], (0, ~0), (-inf, 0)),
    ([-inf, inf, inf, 2], (inf, 1), (inf, 1)),
]


@pytest.mark.parametrize(("window", "with_relu", "without"), WINDOWS)
@pytest.mark.parametrize("subject", subjects("relu_max_pool2d"))
def test_switch_of_one_window(subject, window, with_relu, without):
    with serving(subject) as device:
        x = torch.tensor(window, dtype=F32, device=device).view(1, 1, 2, 2)
        for relu, (value, switch) in ((True, with_relu), (False, without)):
            out, switches = ops.relu_max_pool2d(x, 2, relu=relu)
            assert_all_same(
                (out, switches),
                (torch.full((1, 1, 1, 1), value), torch.full_like(switches, switch).cpu()),
                signed=False,
            )


@pytest.mark.parametrize("kernel", [(3, 3000), (3001, 3), (65, 64), (46000, 46000)])
@pytest.mark.parametrize("subject", [s for s in subjects("relu_max_pool2d") if s != "reference"])
def test_a_window_much_larger_than_the_map(subject, kernel):
    """The kernel's own way for those: against PyTorch's pooling, which the reference of so many positions is not."""
    padding = tuple(k // 2 for k in kernel)
    x = drawing(F32, ())(2, 3, 5, 7).requires_grad_()
    plain = torch.nn.functional.max_pool2d(x.relu(), kernel, 2, padding)
    signal = drawing(F32, (), 1)(*plain.shape)
    expected = torch.autograd.grad(plain, x, signal)[0]
    for layout in (torch.contiguous_format, torch.channels_last):
        with serving(subject) as device:
            data = x.detach().to(device, memory_format=layout)
            out, switches = ops.relu_max_pool2d(data, kernel, 2, padding)
            found = ops.switch_unpool2d(signal.to(device), switches, (5, 7), kernel, 2, padding)
        assert_same(out, plain.detach())
        torch.testing.assert_close(found.cpu(), expected)


# By hand: two 1x2 windows of stride 1 that share position 1, and what the rules let through there.
SHARED = [
    # input, signal, overlap, identity, gradient, deconvnet, guided: the signal at input position 1
    ([0, 5, 1], [2, 3], "sum", 5, 5, 5, 5),
    ([0, 5, 1], [2, 3], "overwrite", 3, 3, 3, 3),
    ([0, 5, 1], [-2, 3], "sum", 1, 1, 1, 1),
    ([0, 5, 1], [-2, -3], "sum", -5, -5, 0, 0),
    ([0, 5, 1], [-2, -3], "overwrite", -2, -2, 0, 0),
    ([0, 5, 1], [4, nan], "overwrite", nan, nan, nan, nan),
    ([0, 5, 1], [nan, 4], "sum", nan, nan, nan, nan),
    ([0, 5, 1], [inf, 4], "sum", inf, inf, inf, inf),
    ([-7, -7, -7], [2, 3], "sum", 3, 0, 3, 0),  # dead: each window points at its first position
    ([-7, -7, -7], [2, inf], "sum", inf, 0, inf, 0),
    ([-7, -7, -7], [2, nan], "sum", nan, 0, nan, 0),
]


@pytest.mark.parametrize(("row", "signal", "overlap", "identity", "gradient", "deconvnet", "guided"), SHARED)
@pytest.mark.parametrize("subject", subjects("switch_unpool2d"))
def test_windows_that_share_a_maximum(subject, row, signal, overlap, identity, gradient, deconvnet, guided):
    with serving(subject) as device:
        x, signal = (torch.tensor(v, dtype=F32, device=device).view(1, 1, 1, -1) for v in (row, signal))
        _, switches = ops.relu_max_pool2d(x, (1, 2), 1)
        for rule, value in zip(
            ("identity", "gradient", "deconvnet", "guided"),
            (identity, gradient, deconvnet, guided),
            strict=True,
        ):
            result = ops.switch_unpool2d(signal, switches, (1, 3), (1, 2), 1, rule=rule, overlap=overlap)
            assert_same(result[0, 0, 0, 1], torch.tensor(float(value)))


def far_apart(count: int, **options):
    """[count, 8]: rows whose offsets do not fit in 32 bits. Nobody touches the memory between them."""
    try:
        return torch.empty(2**31 * (count - 1) + 64, **options).as_strided((count, 8), (2**31, 1))
    except RuntimeError as error:
        pytest.skip(f"no address space: {error}")


@pytest.mark.parametrize("subject", subjects("relu_backward"))
def test_signals_beyond_32_bit_offsets(subject):
    with serving(subject) as device:
        signal = far_apart(3, dtype=torch.float16, device=device)
        signal.copy_(drawing(torch.float16)(3, 8))
        mask = torch.tensor([0b10110010], dtype=torch.uint8, device=device)
        options = {"size": [1, 8], "stride": [8, 1], "rule": "guided"}
        assert_same(
            ops.relu_backward(signal, mask, **options),
            relu_backward_truth(signal.cpu(), mask.cpu(), **options),
        )
        x = drawing(F32)(1, 1, 4, 8)
        switches = pool_truth(x, 2)[1]
        options = {"size": (4, 8), "kernel_size": 2}
        signal = signal.view(3, 1, 2, 4)
        result = ops.switch_unpool2d(signal, switches.to(device), **options)
        assert_same(result, unpool_truth(signal.cpu(), switches, **options), signed=False)


# Each op on an image of which all rows are the same, or repeat every two.
BIG = {
    "relu": lambda x: ops.relu(x, upper=2.0)[:1],
    "relu_": lambda x: (ops.relu_(x), x)[1:],
    "relu_backward": lambda x: (
        ops.relu_backward(
            x, x.new_full(((x.numel() + 7) // 8,), 0b01010101, dtype=torch.uint8), x.shape, x.stride()
        ),
    ),
    "relu_max_pool2d": lambda x: ops.relu_max_pool2d(x, (1, 2)),
    "switch_unpool2d": lambda x: (
        ops.switch_unpool2d(x[..., ::2][..., :-1], _odd_switches(x), x.shape[2:], (1, 2), rule="guided"),
    ),
    "conv2d_input_grad": lambda x: (ops.conv2d_input_grad(x, x.new_full((1, 1, 1, 1), 2.0), x.shape[2:]),),
    "max_abs_channels": lambda x: (ops.max_abs_channels(x),),
    "occlude": lambda x: (ops.occlude(x, x.new_ones(()), *_whole(x, 3), x.shape[2:]),),
    "gather_windows": lambda x: (ops.gather_windows(x, x[:, :, :2, :3], *_whole(x, 2), x.shape[2:]),),
    "pool_windows": lambda x: (
        ops.pool_windows(x, x[:, :, :2, :3], *_whole(x, 2), [n - 1 for n in x.shape[2:]], 2, 1),
    ),
}


def _whole(x, columns):
    """One variant: the map as it is, but for an occluder or a patch of a few pixels behind its end."""
    place = torch.tensor([[0, 2**17, 2**17 + 3][:columns]], device=x.device)
    return torch.zeros(1, 3, dtype=torch.int64, device=x.device), place, place


def _odd_switches(x):
    return torch.ones(1, 1, x.shape[2], x.shape[3] // 2, dtype=torch.int8, device=x.device)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", BIG)
def test_more_than_2_to_the_31_elements(op, device):
    if SERVED[op][device] == "reference":
        pytest.skip("the reference's index tensors would need ten times the memory")
    height, width = 2**16 + 3, 2**15 + 1
    row = drawing(torch.bfloat16)(width).to(device)
    expected = BIG[op](row.expand(1, 1, 4, width).contiguous())
    results = BIG[op](row.expand(1, 1, height, width).contiguous())
    for result, small in zip(results, expected, strict=True):
        for y in (0, 1, 2**15, 2**16 - 1, 2**16, result.shape[-2] - 1):
            assert_same(result[..., y, :], small[..., y % 2, :].cpu())
