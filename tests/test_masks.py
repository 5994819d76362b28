"""The mask ops beyond their case table: what they equal in PyTorch, any geometry, known answers, what they refuse."""

from __future__ import annotations

import contextlib
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_cases import CELLS, mask_images_truth, philox_truth, places
from op_case import DTYPES, F32, F64, drawing
from op_cases import ARRANGEMENTS, serving, subjects
from op_truth import Band, assert_same, is_dense

import convviz_cuda
from convviz_cuda import ops
from convviz_cuda._register import op_names

NAMES = ["mask_images", "mask_images_", "philox"]
each_subject = pytest.mark.parametrize("subject", subjects("mask_images"))
each_layout = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])


def test_info_lists_the_ops():
    assert set(NAMES) <= set(op_names()) == set(convviz_cuda.info()["ops"])
    assert all(callable(getattr(ops, name)) for name in NAMES)


# -------------------------------------------------------------------------------------- masks of PyTorch


@pytest.mark.parametrize("grid", [(1, 1), (7, 7), (3, 5), (1, 4)])
@pytest.mark.parametrize("corners", [False, True])
@each_layout
@each_subject
def test_equals_interpolation_and_a_crop(subject, grid, corners, layout):
    """RISE's masks: each grid upsampled to a cell more than the image has, cropped at an offset of its own."""
    size = (29, 35)
    cell = [-(-n // h) for n, h in zip(size, grid, strict=True)]
    whole = [(h + 1) * c for h, c in zip(grid, cell, strict=True)]
    images = drawing(F64, ())(2, 3, *size).contiguous(memory_format=layout)
    grids = drawing(F64, (), 1)(6, *grid)
    image = torch.tensor([0, 1, 1, 0, 1, 0])
    offsets = torch.stack([torch.arange(6) * (c - 1) // 5 for c in cell], 1)
    upsampled = F.interpolate(grids[:, None], size=whole, mode="bilinear", align_corners=corners)
    crops = torch.stack(
        [
            u[:, y : y + size[0], x : x + size[1]]
            for u, (y, x) in zip(upsampled, offsets.tolist(), strict=True)
        ]
    )
    sampling = {"scale": [h / n for h, n in zip(grid, whole, strict=True)]}
    if corners:
        scale = [(h - 1) / (n - 1) for h, n in zip(grid, whole, strict=True)]
        sampling = {"scale": scale, "shift": 0.0}
    with serving(subject) as device:
        result = ops.mask_images(*(t.to(device) for t in (images, grids, image, offsets)), **sampling)
    torch.testing.assert_close(result.cpu(), images[image] * crops, rtol=0, atol=1e-12)


@each_subject
def test_a_grid_is_spread_over_the_image_unless_told_otherwise(subject):
    """What Score-CAM asks for: activation maps at the image's size."""
    images, maps = drawing(F64, ())(1, 3, 20, 26), drawing(F64, (), 1)(5, 6, 4)
    expected = F.interpolate(maps[:, None], size=(20, 26), mode="bilinear") * images
    with serving(subject) as device:
        image = torch.zeros(5, dtype=torch.int64, device=device)
        result = ops.mask_images(images.to(device), maps.to(device), image)
    torch.testing.assert_close(result.cpu(), expected, rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------ any geometry

sizes = st.tuples(*[st.integers(1, 9)] * 2)
numbers = st.floats(-2, 2)
seeds = st.integers(0, 2**16)


@each_subject
@given(
    st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 3, 4, 17])),
    sizes,
    st.tuples(st.integers(0, 4), *[st.integers(1, 6)] * 2),
    st.one_of(st.none(), numbers, st.tuples(numbers, numbers)),
    st.one_of(st.none(), numbers, st.tuples(numbers, numbers)),
    st.booleans(),
    st.sampled_from(DTYPES),
    st.sampled_from(sorted(ARRANGEMENTS)),
    seeds,
)
def test_masked_images(subject, batch, size, grids, scale, shift, shifted, dtype, arrangement, seed):
    images = ARRANGEMENTS[arrangement](drawing(dtype, (), seed)(*batch, *size))
    cells = ARRANGEMENTS[arrangement](drawing(dtype, (), seed + 1)(*grids))
    image, offsets = places(seed, images.shape, grids)
    offsets = offsets if shifted else None
    options = {"scale": scale, "shift": shift}
    expected = mask_images_truth(images, cells, image, offsets, **options)
    with serving(subject) as device:
        tensors = [None if t is None else t.to(device) for t in (images, cells, image, offsets)]
        assert_same(ops.mask_images(*tensors, **options), expected)
        for kind in ("contiguous", "channels_last", "transposed"):
            out = ARRANGEMENTS[kind](images.new_zeros(grids[0], *images.shape[1:])).to(device)
            stride = out.stride()
            ops.mask_images_(out, *tensors, **options)
            assert out.stride() == stride
            assert_same(out, expected)


@contextlib.contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def colour_case(count, size, grid, sampling, span, layout, seed):
    """Images of three colours for the op, places of up to `span` around them, and the truth."""
    draw = drawing(F32, (), seed)
    images, grids = draw(3, 3, *size).contiguous(memory_format=layout), draw(count, *grid)
    image, _ = places(seed, images.shape, grids.shape)
    offsets = torch.randint(-span, span + 1, (count, 2), generator=torch.Generator().manual_seed(seed))
    arguments = images, grids, image, offsets
    return arguments, mask_images_truth(*arguments, **sampling)


def written(arguments, sampling, expected: Band, layout) -> torch.Tensor:
    """What the op writes over NaN, where nothing is right by chance, once it is seen to be the truth."""
    images, grids = arguments[:2]
    room = images.new_full((len(grids) + 2, *images.shape[1:]), float("nan"))
    room = room.contiguous(memory_format=layout)
    ops.mask_images_(room[1:-1], *arguments, **sampling)
    result = room.cpu()
    assert result[0].isnan().all() and result[-1].isnan().all()
    assert_same(result[1:-1], expected)
    return result[1:-1]


# Slow ones too, where many rows and columns lie in one cell.
rates = st.one_of(st.none(), st.sampled_from([0.0, 0.06, -0.06, 0.25]), numbers)


@each_layout
@each_subject
@settings(max_examples=300)
@given(
    st.integers(1, 20),
    st.tuples(st.integers(1, 9), st.integers(1, 70)),
    sizes.map(lambda cells: tuple(min(n, 6) for n in cells)),
    st.tuples(numbers, numbers),
    rates,
    rates,
    st.sampled_from([0, 3, 70]),
    st.integers(1, 5),
    seeds,
)
def test_masked_colour_images(subject, layout, count, size, grid, shift, high, wide, span, number, seed):
    """Rows of whole vectors and what is left of them, more masks than are applied at once, several threads."""
    spread = [h / n for h, n in zip(grid, size, strict=True)]
    scale = tuple(n if given is None else given for n, given in zip(spread, (high, wide), strict=True))
    sampling = {"scale": scale, "shift": shift}
    arguments, expected = colour_case(count, size, grid, sampling, span, layout, seed)
    with serving(subject) as device, threads(number):
        written([t.to(device) for t in arguments], sampling, expected, layout)


# A thread is worth its while from 43 rows of this width on. The rows of one mask are split inside it, however they
# are split; those of several here not where a mask ends, if each of 2 to 5 threads gets as many, rounded up.
@pytest.mark.parametrize(("count", "height"), [(1, 219), (11, 37), (23, 37)])
@each_layout
@each_subject
def test_threads_may_share_a_mask(subject, layout, count, height):
    sampling = {"scale": (0.07, 0.03), "shift": (0.4, -0.2)}
    arguments, expected = colour_case(count, (height, 129), (6, 5), sampling, 20, layout, count)
    rows = count * height
    with serving(subject) as device:
        arguments = [t.to(device) for t in arguments]
        with threads(1):
            alone = written(arguments, sampling, expected, layout)
        for number in (2, 3, 4, 5):
            assert -(-rows // number) >= 43 and (count == 1 or -(-rows // number) % height)
            with threads(number):
                assert torch.equal(written(arguments, sampling, expected, layout), alone)


@each_subject
def test_not_a_number_stays_in_its_pixel(subject):
    images = drawing(F32, ())(1, 2, 6, 7)
    images[0, 1, 2, 3] = float("nan")
    grids = drawing(F32, CELLS)(3, 2, 2)
    with serving(subject) as device:
        result = ops.mask_images(
            images.to(device), grids.to(device), torch.zeros(3, dtype=torch.int64, device=device)
        ).cpu()
    assert result[:, 1, 2, 3].isnan().all() and result.isnan().sum() == 3


@each_subject
def test_a_grid_of_ones_changes_nothing(subject):
    for dtype in DTYPES:
        images = drawing(dtype, ())(2, 3, 13, 11)
        with serving(subject) as device:
            ones, image = torch.ones(2, 5, 4, dtype=dtype, device=device), torch.tensor([0, 1], device=device)
            assert torch.equal(ops.mask_images(images.to(device), ones, image, scale=0.37).cpu(), images)


@each_layout
@each_subject
def test_the_part_of_a_buffer_is_written_alone(subject, layout):
    images, grids, image = drawing(F32, ())(2, 3, 5, 6), torch.ones(2, 2, 2), torch.tensor([1, 0])
    with serving(subject) as device:
        room = torch.full((4, 3, 5, 6), 7.0, device=device).contiguous(memory_format=layout)
        ops.mask_images_(room[1:3], images.to(device), grids.to(device), image.to(device))
    assert torch.equal(room[1:3].cpu(), images.flip(0))
    assert (room[0] == 7).all() and (room[3] == 7).all()


# --------------------------------------------------------------------------------------- random numbers

# Random123's kat_vectors for philox4x32 with 10 rounds: counter, key and result, each word as published.
ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "answer"), ANSWERS)
@each_subject
def test_known_answers(subject, counter, key, answer):
    c, k, expected = ([int(word, 16) for word in words.split()] for words in (counter, key, answer))
    stream = c[2] | c[3] << 32
    stream -= 2**64 * (stream >= 2**63)
    with serving(subject) as device:
        words = ops.philox(torch.tensor([stream], device=device), 4, k[0] | k[1] << 32, c[0] | c[1] << 32)
    assert words.tolist() == [expected]


@each_subject
@given(
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5),
    st.integers(0, 13),
    st.integers(0, 2**64 - 1),
    st.one_of(st.integers(0, 3), st.integers(2**32 - 3, 2**32 + 3), st.integers(2**63 - 3, 2**64 - 1)),
)
def test_words_of_any_stream(subject, streams, words, seed, block):
    streams = torch.tensor(streams, dtype=torch.int64)
    with serving(subject) as device:
        result = ops.philox(streams.to(device), words, seed, block).cpu()
    assert result.is_contiguous()
    assert torch.equal(result, philox_truth(streams, words=words, seed=seed, block=block))


@each_subject
def test_streams_do_not_depend_on_what_is_drawn_beside_them(subject):
    with serving(subject) as device:
        whole = ops.philox(torch.arange(50, device=device), 21, 9)
        part = ops.philox(torch.arange(20, 31, device=device), 21, 9)
        tail = ops.philox(torch.arange(50, device=device), 9, 9, 3)
    assert torch.equal(whole[20:31], part)
    assert torch.equal(whole[:, 12:], tail)


# ------------------------------------------------------------------------------------------- left alone

IMAGES, GRIDS = drawing(F32, ())(2, 3, 5, 6), drawing(F32, (), 1)(4, 2, 3)
IMAGE, OFFSETS = torch.tensor([0, 1, 1, 0]), torch.zeros(4, 2, dtype=torch.int64)
OUT = torch.zeros(4, 3, 5, 6)


def masked(**changed):
    return ops.mask_images(**{"images": IMAGES, "grids": GRIDS, "image": IMAGE, "offsets": OFFSETS} | changed)


def masked_(**changed):
    arguments = {"out": OUT, "images": IMAGES, "grids": GRIDS, "image": IMAGE, "offsets": OFFSETS}
    return ops.mask_images_(**arguments | changed)


def random(**changed):
    return ops.philox(**{"streams": IMAGE, "words": 3} | changed)


@each_subject
def test_no_gradient_is_recorded(subject):
    with serving(subject):
        assert not masked(images=IMAGES.clone().requires_grad_()).requires_grad
        out = OUT.clone()
        masked_(out=out, images=IMAGES.clone().requires_grad_())
        assert not out.requires_grad


@each_subject
def test_a_change_in_place_is_noticed_by_autograd(subject):
    y = OUT.clone().requires_grad_() * 1.0
    z = (y * y).sum()
    with serving(subject), torch.no_grad():
        masked_(out=y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.backward()
    with serving(subject), torch.inference_mode():  # tensors without a count of changes
        masked_(out=torch.zeros_like(OUT))


def test_results_are_dense():
    for images in (IMAGES, IMAGES.transpose(2, 3).contiguous().transpose(2, 3), IMAGES[:, :, ::2]):
        assert is_dense(masked(images=images))


REFUSED = [
    *(
        (call, {name: value}, TypeError, words)
        for call in (masked, masked_)
        for name in ("images", "grids")
        for value, words in (
            (None, f"{name} must be a tensor, but it is a NoneType."),
            (IMAGES.int(), f"{name} must be float64, float32, bfloat16 or float16, but it is torch.int32."),
        )
    ),
    *(
        (call, {name: wrong}, error, words)
        for call in (masked, masked_)
        for name, value, shape in (("image", IMAGE, "(4,)"), ("offsets", OFFSETS, "(4, 2)"))
        for wrong, error, words in (
            (3, TypeError, f"{name} must be a tensor, but it is a int."),
            (IMAGE.int(), TypeError, f"{name} must be int64, but it is torch.int32."),
            (IMAGE[:3], ValueError, f"{name} must have the shape {shape} for 4 grids, but it has the shape (3,)."),
            (value.to("meta"), ValueError, f"{name} must be on cpu as the images are, but it is on meta."),
        )
    ),
    *(
        (call, changed, error, words)
        for call in (masked, masked_)
        for changed, error, words in (
            ({"images": IMAGES[0]}, ValueError, "images must have the shape (N, C, H, W)"),
            ({"grids": GRIDS[0]}, ValueError, "grids must have the shape (M, h, w), but they have the shape (2, 3)."),
            ({"grids": GRIDS.double()}, TypeError, "grids must be torch.float32 on cpu as images is"),
            ({"grids": GRIDS[:, :0]}, ValueError, "There must be an image and a cell for each mask"),
            ({"images": IMAGES[:0]}, ValueError, "images has the shape (0, 3, 5, 6)"),
            ({"scale": "1"}, TypeError, "scale must be a number or a pair of numbers, but it is '1'."),
            ({"scale": (1, 2, 3)}, TypeError, "but it is (1, 2, 3)."),
            ({"shift": (1, None)}, TypeError, "shift must be a number or a pair of numbers, but it is (1, None)."),
            ({"scale": float("nan")}, ValueError, "scale must be finite, but it is nan."),
            ({"shift": (0, float("inf"))}, ValueError, "shift must be finite, but it is (0, inf)."),
        )
    ),
    (masked_, {"out": None}, TypeError, "out must be a tensor"),
    (masked_, {"out": OUT[:3]}, ValueError, "out must have the shape (4, 3, 5, 6), but it has the shape (3, 3, 5, 6)."),
    (masked_, {"out": OUT.double()}, TypeError, "out must be torch.float32 on cpu as images is"),
    (masked_, {"out": OUT[:1].expand(4, 3, 5, 6)}, ValueError, "out must have memory for each element"),
    (masked_, {"out": OUT.clone().requires_grad_()}, ValueError, "use torch.no_grad()."),
    (random, {"streams": 3}, TypeError, "streams must be a tensor, but it is a int."),
    (random, {"streams": IMAGE.int()}, TypeError, "streams must be int64, but they are torch.int32."),
    (random, {"streams": OFFSETS}, ValueError, "streams must have the shape (n,), but they have the shape (4, 2)."),
    (random, {"words": -1}, ValueError, "words must be from 0 to 2**63 - 1, but it is -1."),
    (random, {"words": 2.0}, TypeError, "words must be an int, but it is 2.0."),
    (random, {"seed": -1}, ValueError, "seed must be from 0 to 2**64 - 1, but it is -1."),
    (random, {"seed": 2**64}, ValueError, f"but it is {2**64}."),
    (random, {"seed": True}, TypeError, "seed must be an int, but it is True."),
    (random, {"block": 2**64}, ValueError, "block must be from 0 to 2**64 - 1"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "wrong", "error", "words"),
    REFUSED,
    ids=[f"{call.__name__}-{'-'.join(wrong)}-{i}" for i, (call, wrong, *_) in enumerate(REFUSED)],
)
def test_bad_arguments(call, wrong, error, words):
    with pytest.raises(error, match=re.escape(words)) as caught:
        call(**wrong)
    assert str(caught.value).endswith(".")
    assert not OUT.any()


def test_good_arguments():
    assert masked().shape == OUT.shape and random().shape == (4, 3)
    assert masked_(out=OUT.clone()) is None
    assert masked(scale=1, shift=(0, 1)).shape == OUT.shape
