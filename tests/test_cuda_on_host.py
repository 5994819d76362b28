"""Every CUDA kernel, run on the CPU thread by thread, against truths that share no code with it.

The host's blocks have 4 threads and a grid at most 3 blocks, so nearly every case has short last blocks and
threads that take several steps. A result lies in guarded memory and is computed twice over different garbage:
what the kernel does not write, or writes beside it, shows.
"""

from __future__ import annotations

import itertools

import cuda_on_host
import numpy as np
import pytest
import torch
from op_case import BF16, DTYPES, F16, F32, F64, SPECIAL, drawing
from op_cases import ARRANGEMENTS, CONVS, POOLS, RELU_BOUNDS, RULES, SIGNALS, WIDEST, dense_stride
from op_truth import (
    assert_same,
    conv_truth,
    max_abs_truth,
    pool_truth,
    relu_backward_truth,
    relu_truth,
    two,
    unpool_truth,
)

pytestmark = pytest.mark.skipif(cuda_on_host.compiler() is None, reason="there is no C++ compiler")

CODES = {"identity": 0, "gradient": 1, "deconvnet": 2, "guided": 3}
LAYOUTS = ("contiguous", "channels_last")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(scope="session")
def gpu():
    return cuda_on_host.build()


# ------------------------------------------------------------------------------------------------- memory

GUARD = 64  # elements before and behind a result


def raw(x: torch.Tensor) -> np.ndarray:
    """The tensor's memory for a kernel; half-precision values as their bits."""
    return (x.view(torch.int16) if x.dtype in (F16, BF16) else x).numpy()


class Guarded:
    """A dense tensor of garbage between guards; ``shift`` elements off the alignment that vectors need."""

    def __init__(self, shape, stride, dtype, garbage: int, shift: int = 0):
        count = int(np.prod(shape))
        size = (count + 2 * GUARD + shift) * dtype.itemsize
        self.memory = torch.full((size,), garbage, dtype=torch.uint8)
        self.untouched = self.memory.clone()
        whole = self.memory.view(dtype)
        self.tensor = whole.as_strided(shape, stride, GUARD + shift)
        self.inner = slice((GUARD + shift) * dtype.itemsize, (GUARD + shift + count) * dtype.itemsize)

    def check(self) -> torch.Tensor:
        self.untouched[self.inner] = self.memory[self.inner]
        assert torch.equal(self.memory, self.untouched), "memory beside the result was written"
        return self.tensor


def twice(compute, *specs, shift: int = 0) -> list[torch.Tensor]:
    """The results, shaped as in ``specs``, of a kernel that must write all of them."""
    runs = []
    for garbage in (0x55, 0xAA):
        results = [Guarded(*spec, garbage, shift) for spec in specs]
        compute(*(raw(result.tensor) for result in results))
        runs.append([result.check() for result in results])
    for first, second in zip(*runs, strict=True):
        assert np.array_equal(raw(first), raw(second), equal_nan=first.dtype in (F32, F64)), (
            "not all was written"
        )
    return runs[0]


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def arranged(x: torch.Tensor, layout: str, shift: int) -> torch.Tensor:
    """A copy in this layout, at an address where vectors may begin or, with a shift, where they may not."""
    order = (0, 1, 2, 3) if layout == "contiguous" else (0, 2, 3, 1)
    memory = x.permute(order).contiguous()
    if shift:
        memory = ARRANGEMENTS["shifted"](memory)
    return memory.permute([order.index(dim) for dim in range(4)])


def image_stride(shape, layout: str) -> list[int]:
    return dense_stride(shape, (0, 1, 2, 3) if layout == "contiguous" else (0, 2, 3, 1))


def axes(shape, out, kernel_size, stride=None, padding=0, dilation=1, **_):
    """The kernels' description of both axes: in, out, kernel, stride, padding, dilation."""
    geometry = map(two, (kernel_size, stride or kernel_size, padding, dilation))
    return [[*axis] for axis in zip(shape[-2:], out[-2:], *geometry, strict=True)]


def test_memory_beside_a_result_and_gaps_in_it_are_noticed():
    def writes(places):
        def compute(out):
            for place in places:
                np.lib.stride_tricks.as_strided(out[2:], (9,), (4,))[place] = 1.0

        return compute

    spec = ((4,), (1,), F32)
    assert twice(lambda out: out.fill(1.0), spec)[0].tolist() == [1.0] * 4
    with pytest.raises(AssertionError, match="not all was written"):
        twice(writes([0, 1]), spec)
    with pytest.raises(AssertionError, match="beside the result"):
        twice(writes([2]), spec)


# ------------------------------------------------------------------------------------------- the launcher


def test_threads_take_steps_through_a_capped_grid(gpu):
    def launched(count):
        before = gpu.counts()
        x = torch.ones(count)
        gpu.relu(
            "float32", raw(x), raw(x), raw(torch.empty(count // 8 + 1, dtype=torch.uint8)), count, 0.0, None
        )
        return tuple(after - start for after, start in zip(gpu.counts(), before, strict=True))

    assert launched(0) == (0, 0)  # CUDA refuses an empty grid
    assert launched(8) == (1, 4)  # one block
    assert launched(8 * 9) == (1, 12)  # three blocks
    assert launched(8 * 500) == (1, 12)  # no more than three


def test_misaligned_vectors_are_refused_as_on_a_gpu(gpu):
    store = torch.arange(9.0)
    aligned = 0 if store.data_ptr() % 16 == 0 else 2
    assert gpu.load_vector(raw(store[aligned:])) == store[aligned : aligned + 4].tolist()
    with pytest.raises(RuntimeError, match="misaligned"):
        gpu.load_vector(raw(store[aligned + 1 :]))


def test_division_without_dividing(gpu):
    edges = [1, 2, 3, 5, 6, 7, 9, 10, 11, 49, 112, 113, 641, 65535, 65536, 65537, 2**30, 2**31 - 2, 2**31 - 1]
    beyond = [2**31, 2**31 + 1, 2**32, 2**40 + 7]
    random = np.random.default_rng(0).integers(1, 2**31, 300).tolist()
    for divisor in [*edges, *beyond, *random]:
        multiples = [divisor * k + offset for k in (1, 2, 1000) for offset in (-1, 0, 1)]
        for index in [0, *edges, *beyond, *random[:20], *multiples]:
            assert gpu.divide(index, divisor) == index // divisor, (index, divisor)


# ------------------------------------------------------------------------------------------------- relu


@each_dtype
@pytest.mark.parametrize("numel", [0, 1, 7, 8, 9, 63, 64, 97, 515])
@pytest.mark.parametrize("shift", [0, 1])
def test_relu(gpu, dtype, numel, shift):
    for bounds in RELU_BOUNDS:
        x = drawing(dtype, SPECIAL)(numel + shift)[shift:]
        expected, bits = relu_truth(x, **bounds)
        given = x.clone()
        arguments = (numel, bounds.get("lower", 0.0), bounds.get("upper"))
        out, mask = twice(
            lambda out, mask, x=x, arguments=arguments: gpu.relu(name(dtype), raw(x), out, mask, *arguments),
            ((numel,), (1,), dtype),
            (((numel + 7) // 8,), (1,), torch.uint8),
            shift=shift,
        )
        assert_same(out, expected)
        assert_same(mask, bits)
        assert_same(x, given.double())
        mask_again = torch.zeros_like(mask)
        gpu.relu(name(dtype), raw(x), raw(x), raw(mask_again), *arguments)
        assert_same(x, expected)
        assert_same(mask_again, bits)


@each_dtype
@pytest.mark.parametrize(("size", "order", "repeats"), [row for row in SIGNALS if len(row[0]) <= 4])
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_relu_backward(gpu, dtype, size, order, repeats, arrangement):
    stride = dense_stride(size, order)
    draw = drawing(dtype, SPECIAL)
    mask = relu_truth(draw(max(1, int(np.prod(size)))).expand(1, -1)[0][: int(np.prod(size))])[1]
    grad = ARRANGEMENTS[arrangement](draw(*([repeats * size[0], *size[1:]] if size else [])))
    out_stride = [int(np.prod(size[1:])), *stride[1:]] if repeats > 1 else stride
    dims = [dim for dim in sorted(order, key=lambda dim: -out_stride[dim]) if grad.shape[dim] != 1]
    geometry = ([grad.shape[dim] for dim in dims] or [1], [grad.stride(dim) for dim in dims] or [1])
    for rule, shift in itertools.product(RULES, (0, 1)):
        if grad.numel() == 0:  # the op returns before it launches
            continue
        (out,) = twice(
            lambda out, rule=rule: gpu.relu_backward(
                name(dtype), raw(grad), raw(mask), out, int(np.prod(size)), *geometry, CODES[rule]
            ),
            (tuple(grad.shape), out_stride, dtype),
            shift=shift,
        )
        assert_same(out, relu_backward_truth(grad, mask, size, stride, rule))


@each_dtype
@pytest.mark.parametrize(("numel", "repeats"), [(80, 1), (515, 1), (40, 3), (12, 5), (9, 4)])
def test_relu_backward_of_flat_signals(gpu, dtype, numel, repeats):
    """Dimensions that were joined into one: packs of 8, and repeats that start within a byte of the mask."""
    x, grad = drawing(dtype, SPECIAL, 1)(numel), drawing(dtype, SPECIAL, 2)(numel * repeats)
    mask = relu_truth(x)[1]
    for rule, start in itertools.product(RULES, (0, 1)):
        signal = grad.clone() if start == 0 else torch.cat([grad[:1], grad])[1:]
        (out,) = twice(
            lambda out, rule=rule, signal=signal: gpu.relu_backward(
                name(dtype), raw(signal), raw(mask), out, numel, [numel * repeats], [1], CODES[rule]
            ),
            ((numel * repeats,), (1,), dtype),
        )
        assert_same(out, relu_backward_truth(signal, mask, (numel,), (1,), rule))


# ---------------------------------------------------------------------------------------------- pooling


def pool(gpu, x, options, layout, relu, shift):
    expected, switches = pool_truth(x, **options, relu=relu)
    shape = tuple(expected.shape)
    stride = image_stride(shape, layout)
    results = twice(
        lambda out, chosen: gpu.relu_max_pool2d(
            name(x.dtype),
            layout == "channels_last",
            raw(x),
            out,
            chosen,
            *shape[:2],
            *axes(x.shape, shape, **options),
            relu,
        ),
        (shape, stride, x.dtype),
        (shape, stride, switches.dtype),
        shift=shift,
    )
    assert_same(results[0], expected)
    assert_same(results[1], switches)


# More rows: as many channels as vectors of all dtypes have, and rows of windows longer than a vector.
VECTORS = {
    "16-channels": ((2, 16, 5, 7), {"kernel_size": 3, "stride": 2, "padding": 1}),
    "long-rows": ((1, 2, 6, 75), {"kernel_size": 2, "stride": 2}),
    "long-rows-overlap": ((1, 1, 5, 70), {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True}),
    "long-rows-stride-1": ((1, 1, 4, 48), {"kernel_size": 3, "stride": 1, "padding": 1}),
    "aligned-rows": ((1, 2, 4, 64), {"kernel_size": 2, "stride": 2}),
}
ALL_POOLS = POOLS | VECTORS


@each_dtype
@each_layout
@pytest.mark.parametrize("label", ALL_POOLS)
def test_relu_max_pool2d(gpu, dtype, layout, label):
    shape, options = ALL_POOLS[label]
    for relu, shift in itertools.product((True, False), (0, 1)):
        x = arranged(drawing(dtype, SPECIAL)(*shape), layout, shift)
        pool(gpu, x, options, layout, relu, shift)


def test_relu_max_pool2d_with_switches_of_32_bits(gpu):
    shape, options = WIDEST
    pool(gpu, drawing(F16, ())(*shape), options, "contiguous", True, 0)


@each_dtype
@each_layout
@pytest.mark.parametrize("label", ALL_POOLS)
def test_switch_unpool2d(gpu, dtype, layout, label):
    shape, options = ALL_POOLS[label]
    options = {key: value for key, value in options.items() if key != "ceil_mode"}
    switches = pool_truth(drawing(F32, SPECIAL)(*shape), **ALL_POOLS[label][1])[1]
    ways = itertools.product(RULES, ("sum", "overwrite"))
    # Each rule and overlap meets every pooling, each with another arrangement, repeat and alignment.
    for i, (rule, overlap) in enumerate(ways, start=list(ALL_POOLS).index(label)):
        arrangement, repeats, shift = list(ARRANGEMENTS)[i % len(ARRANGEMENTS)], 1 + i % 3, i % 2
        grad = drawing(dtype, SPECIAL, i)(repeats * shape[0], *switches.shape[1:])
        unpool(
            gpu, ARRANGEMENTS[arrangement](grad), switches, shape[2:], options, layout, rule, overlap, shift
        )


def unpool(gpu, grad, switches, size, options, layout, rule="gradient", overlap="sum", shift=0):
    switches = arranged(switches, layout, shift)
    result = (*grad.shape[:2], *size)
    if 0 in result:  # the op returns before it launches
        return
    (out,) = twice(
        lambda out: gpu.switch_unpool2d(
            name(grad.dtype),
            layout == "channels_last",
            raw(grad),
            list(grad.stride()),
            raw(switches),
            out,
            grad.shape[0],
            switches.shape[0],
            grad.shape[1],
            *axes(size, switches.shape, **options),
            CODES[rule],
            overlap == "overwrite",
        ),
        (result, image_stride(result, layout), grad.dtype),
        shift=shift,
    )
    assert_same(out, unpool_truth(grad, switches, size, **options, rule=rule, overlap=overlap), signed=False)


@each_layout
def test_switch_unpool2d_with_switches_of_32_bits(gpu, layout):
    shape, options = WIDEST
    switches = pool_truth(drawing(F16, ())(*shape), **options)[1]
    unpool(gpu, drawing(F16, ())(*switches.shape), switches, shape[2:], options, layout)


@each_layout
def test_switches_that_no_pooling_would_give(gpu, layout):
    """Positions in the padding or beyond the window, maps larger than the windows reach."""
    options = {"kernel_size": 3, "stride": 2, "padding": 1}
    switches = torch.randint(-128, 128, (1, 4, 5, 6), generator=torch.Generator().manual_seed(0)).to(
        torch.int8
    )
    grad = drawing(F32, SPECIAL)(2, 4, 5, 6)
    for size in [(9, 11), (4, 3), (30, 40)]:
        unpool(gpu, grad, switches, size, options, layout, "guided")


# -------------------------------------------------------------------------------- convolution, reduction


MORE_CONVS = {
    "vectors": ((2, 3, 11, 13), 32, (3, 3), {"padding": 1}),
    "vectors-stride": ((1, 3, 19, 23), 16, (7, 7), {"stride": 2}),
}


@each_dtype
@each_layout
@pytest.mark.parametrize("label", [*CONVS, *MORE_CONVS])
@pytest.mark.parametrize("in_channels", [1, 2, 3, 4])
def test_conv2d_input_grad(gpu, dtype, layout, label, in_channels):
    shape, channels, kernel, geometry = (CONVS | MORE_CONVS)[label]
    shape = (shape[0], in_channels, *shape[2:])
    draw = drawing(dtype, ())
    mapped = torch.nn.functional.conv2d(
        torch.empty(shape, device="meta"),
        torch.empty(channels, in_channels, *kernel, device="meta"),
        None,
        **geometry,
    ).shape
    for shift in (0, 1):
        grad = arranged(draw(*mapped), layout, shift)
        weight = ARRANGEMENTS["transposed" if shift else layout](draw(channels, in_channels, *kernel))
        if grad.numel() == 0:  # the op returns before it launches
            continue
        acc = F64 if dtype == F64 else F32
        packed = Guarded((kernel[0] * kernel[1] * 4 * channels,), (1,), acc, 0x55)
        (out,) = twice(
            lambda out, grad=grad, weight=weight, packed=packed: gpu.conv2d_input_grad(
                name(dtype),
                layout == "channels_last",
                raw(grad),
                raw(weight),
                list(weight.stride()),
                raw(packed.tensor),
                out,
                grad.shape[0],
                channels,
                in_channels,
                *axes(shape, mapped, kernel, **({"stride": 1} | geometry)),
            ),
            (shape, image_stride(shape, layout), dtype),
            shift=shift,
        )
        packed.check()
        assert_same(out, conv_truth(grad, weight, shape[2:], **geometry))


@each_dtype
@each_layout
@pytest.mark.parametrize(
    "shape", [(2, 3, 4, 5), (1, 1, 3, 3), (2, 37, 2, 3), (3, 4, 1, 70), (2, 16, 8, 8), (0, 3, 2, 2)]
)
def test_max_abs_channels(gpu, dtype, layout, shape):
    result = (shape[0], *shape[2:])
    for shift in (0, 1):
        x = arranged(drawing(dtype, SPECIAL)(*shape), layout, shift)
        (out,) = twice(
            lambda out, x=x: gpu.max_abs_channels(
                name(dtype), layout == "channels_last", raw(x), out, *shape[:2], shape[2] * shape[3]
            ),
            (result, dense_stride(result, (0, 1, 2)), dtype),
            shift=shift,
        )
        assert_same(out, max_abs_truth(x))
