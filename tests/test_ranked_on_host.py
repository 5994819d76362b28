"""replace_ranked's CUDA kernel on the host, as in test_cuda_on_host.py, over the rows of the ops' case table."""

from __future__ import annotations

import cuda_on_host
import pytest
from op_case import SPECIAL, drawing
from op_truth import assert_same
from ranked_cases import RANKED, RANKED_CASES
from test_cuda_on_host import arranged, each_dtype, each_layout, gpu, image_stride, raw, twice

pytestmark = pytest.mark.skipif(cuda_on_host.compiler() is None, reason="there is no C++ compiler")

__all__ = ["gpu"]  # the fixture

# No launcher is called for nothing at all: the ops return before.
LAUNCHED = [case for case in RANKED_CASES if case.op == "replace_ranked" and not case.label.startswith("no-")]


def strides(fills, images, layout: str) -> list[int]:
    """As the op gives them: 0 for what is broadcast, and for sizes of 1 what the images' layout has."""
    usual = image_stride(images.shape, layout)
    return [
        own if size > 1 else usual[d] if images.shape[d] == 1 else 0
        for d, (own, size) in enumerate(zip(fills.stride(), fills.shape, strict=True))
    ]


def shifted(ranks):
    """Where no vector of ranks may begin."""
    store = ranks.new_empty(ranks.numel() + 1)[1:]
    return store.view(ranks.shape).copy_(ranks)


@each_dtype
@each_layout
@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("case", LAUNCHED, ids=str)
def test_replace_ranked(gpu, dtype, layout, shift, case):
    inputs = case.inputs(drawing(dtype, SPECIAL))
    expected = case.apply(case.truth, inputs)
    images, fills, *tables = inputs
    shape = tuple(expected.shape)
    # The fill in either layout; each of the addresses in turn where no vector may begin.
    for fill_layout, moved in (("contiguous", shift), ("channels_last", 1 - shift), (layout, 0)):
        tables[0] = shifted(tables[0]) if moved else tables[0].clone()
        given = arranged(images, layout, shift)
        fill = arranged(fills, fill_layout, moved)
        for place in (0, 1):  # of the result
            (out,) = twice(
                lambda out, given=given, fill=fill, tables=tuple(tables): gpu.replace_ranked(
                    layout == "channels_last",
                    raw(given),
                    raw(fill),
                    strides(fill, images, layout),
                    *map(raw, tables),
                    out,
                ),
                (shape, image_stride(shape, layout), dtype),
                shift=place,
            )
            assert_same(out, expected)


def test_the_rows_take_vectors_and_their_tails():
    for lengths in (
        {shape[3] for shape, *_ in RANKED.values()},
        {shape[3] * shape[1] for shape, *_ in RANKED.values()},
    ):
        for lanes in (2, 4, 8):
            assert any(n and n % lanes == 0 for n in lengths)
            assert any(n > lanes and n % lanes for n in lengths)
            assert any(0 < n < lanes for n in lengths)
