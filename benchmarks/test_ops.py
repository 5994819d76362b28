"""Each op on the CPU against the PyTorch operations it replaces: both layouts, float32 and bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import op_cases
import pytest
from interleave import relative_error


@pytest.mark.parametrize("layout", op_cases.LAYOUTS)
@pytest.mark.parametrize("dtype", op_cases.DTYPES)
@pytest.mark.parametrize("case", op_cases.CASES, ids=lambda case: f"{case.op}-{case.name}".replace(" ", "_"))
def test_op(case: op_cases.Case, dtype: str, layout: str, quick: bool, compare: Callable[..., Any]) -> None:
    if case.only not in (None, dtype):
        pytest.skip(f"{case.op} serves {case.only} only.")
    shape = (1, *case.shape[1:2], *(side // 8 + 16 for side in case.shape[2:])) if quick else case.shape
    sides = case.prepare(op_cases.maker(dtype, layout, "cpu"), shape)
    error = relative_error(sides.ours(), sides.torch())
    assert error <= op_cases.TOLERANCE[dtype], (
        f"{case.op} differs from PyTorch by {error} of its largest value."
    )
    compare(
        f"{case.op}, cpu",
        f"{case.name}, {dtype}, {layout}",
        op_cases.rotated([sides]),
        rounds=11,
        errors={"to torch": error},
        notes=lambda seconds: {"GB/s": sides.bytes_moved / seconds / 1e9},
    )
