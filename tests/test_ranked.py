"""replace_ranked beyond its case table: any shape, values that are no numbers, parts of a buffer, what it refuses."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_case import DTYPES, F32, SPECIAL, drawing
from op_cases import ARRANGEMENTS, serving, subjects
from op_truth import assert_same, is_dense
from ranked_cases import ranges, ranked_truth

from convviz_cuda import ops
from convviz_cuda._register import op_names

each_subject = pytest.mark.parametrize("subject", subjects("replace_ranked"))
each_layout = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])


def test_the_ops_are_listed():
    assert {"replace_ranked", "replace_ranked_"} <= set(op_names())


@each_subject
@given(
    st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 3, 4, 17]), st.integers(1, 9), st.integers(1, 20)),
    st.tuples(*[st.booleans()] * 4),
    st.integers(0, 5),
    st.sampled_from(DTYPES),
    st.sampled_from(sorted(ARRANGEMENTS)),
    st.sampled_from(sorted(ARRANGEMENTS)),
    st.sampled_from([torch.int32, torch.int64]),
    st.integers(0, 2**16),
)
def test_any_shape_and_arrangement(subject, shape, whole, count, dtype, arranged, fill_arranged, kind, seed):
    images = ARRANGEMENTS[arranged](drawing(dtype, SPECIAL, seed)(*shape))
    sizes = [size if full else 1 for size, full in zip(shape, whole, strict=True)]
    fills = ARRANGEMENTS[fill_arranged](drawing(dtype, SPECIAL, seed + 1)(*sizes))
    tables = ranges(seed, shape, count)
    expected = ranked_truth(images, fills, *tables)
    with serving(subject) as device:
        given_tensors = [t.to(device) for t in (images, fills, tables[0].to(kind), *tables[1:])]
        result = ops.replace_ranked(*given_tensors)
        assert is_dense(result)
        assert_same(result, expected)
        for name in ("contiguous", "channels_last", "transposed"):
            out = ARRANGEMENTS[name](images.new_zeros(count, *shape[1:])).to(device)
            stride = out.stride()
            ops.replace_ranked_(out, *given_tensors)
            assert out.stride() == stride
            assert_same(out, expected)


@each_layout
@each_subject
def test_the_part_of_a_buffer_is_written_alone(subject, layout):
    with serving(subject) as device:
        images = drawing(F32, ())(2, 3, 5, 6).to(device).contiguous(memory_format=layout)
        room = torch.full((4, 3, 5, 6), 7.0, device=device).contiguous(memory_format=layout)
        ranks = torch.arange(30, device=device).view(1, 5, 6).repeat(2, 1, 1).int()
        image, low = torch.tensor([1, 0], device=device), torch.zeros(2, dtype=torch.int64, device=device)
        fills = torch.full((1, 1, 1, 1), float("nan"), device=device)
        ops.replace_ranked_(room[1:3], images, fills, ranks, image, low, low)
    assert torch.equal(room[1:3], images.flip(0))
    assert (room[0] == 7).all() and (room[3] == 7).all()


@each_subject
def test_a_change_in_place_is_noticed_by_autograd(subject):
    y = OUT.clone().requires_grad_() * 1.0
    z = (y * y).sum()
    with serving(subject), torch.no_grad():
        replaced_(out=y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.backward()


IMAGES, FILLS = drawing(F32, ())(2, 3, 5, 6), torch.zeros(1, 3, 1, 1)
RANKS, IMAGE = torch.zeros(2, 5, 6, dtype=torch.int32), torch.tensor([0, 1, 1, 0])
OUT = torch.zeros(4, 3, 5, 6)
USUAL = {"images": IMAGES, "fills": FILLS, "ranks": RANKS, "image": IMAGE, "low": IMAGE, "high": IMAGE}


def replaced(**changed):
    return ops.replace_ranked(**USUAL | changed)


def replaced_(**changed):
    return ops.replace_ranked_(**{"out": OUT} | USUAL | changed)


@each_subject
def test_no_gradient_is_recorded(subject):
    with serving(subject):
        assert not replaced(images=IMAGES.clone().requires_grad_()).requires_grad


REFUSED = [
    *(
        (call, changed, error, words)
        for call in (replaced, replaced_)
        for changed, error, words in (
            ({"images": None}, TypeError, "images must be a tensor, but it is a NoneType."),
            ({"images": IMAGES.int()}, TypeError, "images must be float64, float32, bfloat16 or float16, but it is"),
            ({"images": IMAGES[0]}, ValueError, "images must have the shape (N, C, H, W)"),
            ({"fills": 0.0}, TypeError, "fills must be a tensor, but it is a float."),
            ({"fills": FILLS[0]}, ValueError, "fills must have the shape (N, C, H, W)"),
            ({"fills": FILLS.double()}, TypeError, "fills must be torch.float32 on cpu as images is"),
            ({"fills": IMAGES[:, :2]}, ValueError, "fills must broadcast to the images' shape (2, 3, 5, 6)"),
            ({"ranks": RANKS.float()}, TypeError, "ranks must be int32 or int64, but it is torch.float32."),
            ({"ranks": RANKS[:1]}, ValueError, "ranks must have the shape (2, 5, 6), one for each pixel, but it has"),
            ({"ranks": RANKS.to("meta")}, ValueError, "ranks must be on cpu as the images are, but it is on meta."),
            ({"image": IMAGE.int()}, TypeError, "image must be int64, but it is torch.int32."),
            ({"image": IMAGE[None]}, ValueError, "image must have the shape (M,), but it has the shape (1, 4)."),
            ({"low": IMAGE[:3]}, ValueError, "low must have the shape (4,) as image has, but it has the shape (3,)."),
            ({"high": IMAGE[:, None]}, ValueError, "high must have the shape (4,) as image has"),
            ({"high": 3}, TypeError, "high must be a tensor, but it is a int."),
            ({"images": IMAGES[:0], "ranks": RANKS[:0]}, ValueError, "There are 4 variants, but no images."),
        )
    ),
    (replaced_, {"out": None}, TypeError, "out must be a tensor"),
    (replaced_, {"out": OUT[:3]}, ValueError, "out must have the shape (4, 3, 5, 6), but it has the shape (3,"),
    (replaced_, {"out": OUT.double()}, TypeError, "out must be torch.float32 on cpu as images is"),
    (replaced_, {"out": OUT[:1].expand(4, 3, 5, 6)}, ValueError, "out must have memory for each element"),
    (replaced_, {"out": OUT.clone().requires_grad_()}, ValueError, "use torch.no_grad()."),
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
