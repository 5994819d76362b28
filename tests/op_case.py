"""One row of the ops' case table, and the numbers that go into it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from convviz_cuda import direct_conv, mask_ops, ops, window_ops, winograd

F64, F32, BF16, F16 = DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Case:
    """One call: ``inputs(draw)`` makes the tensors, ``options`` are the other arguments."""

    op: str
    label: str
    inputs: Callable[[Callable[..., Tensor]], tuple[Tensor, ...]]
    truth: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)
    like: int | None = None  # the input whose layout the results have
    pytorch: Callable[..., Tensor] | None = None  # the same function in PyTorch, differentiable
    special: bool = True  # defined for NaN and infinities, number by number
    signed: bool = True  # the sign of a zero is defined too
    dtypes: tuple[torch.dtype, ...] = DTYPES
    sums: bool = False  # the results have the type that sums are kept in
    last: str | None = None  # the name by which the last tensor is given

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        result = self.apply(getattr(ops, self.op), tensors)
        results = result if isinstance(result, tuple) else () if result is None else (result,)
        return (tensors[0], *results) if self.in_place else results

    def apply(self, function: Callable[..., Any], tensors: tuple[Tensor, ...]) -> Any:
        if self.last is None:
            return function(*tensors, **self.options)
        return function(*tensors[:-1], **{self.last: tensors[-1]}, **self.options)

    @property
    def differentiable(self) -> bool:
        fixed = (window_ops, winograd, direct_conv, mask_ops)
        return not any(self.op in module.__all__ for module in fixed)

    @property
    def in_place(self) -> bool:
        return self.op.endswith("_")

    def __str__(self) -> str:
        return f"{self.op}-{self.label}"


# Few values, so that windows and channels tie, and zeros of both signs; all sums of them are exact.
TIES = (-2.0, -1.0, -0.0, 0.0, 0.0, 1.0, 1.0, 3.0)
# Fractions, whose sums depend on the order; what is not finite is rare, as it drowns the rest.
SPECIAL = (*TIES * 2, 0.1, -0.7, 1 / 3, 33.3, -33.2, float("nan"), float("inf"), float("-inf"))


def drawing(dtype: torch.dtype, values: tuple[float, ...] = TIES, seed: int = 0) -> Callable[..., Tensor]:
    """A function from a shape to a tensor with these values, or normal ones where there are none."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        if not values:
            return torch.randn(shape, generator=generator, dtype=F64).to(dtype)
        return torch.tensor(values, dtype=dtype)[torch.randint(len(values), shape, generator=generator)]

    return draw
