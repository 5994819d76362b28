"""Functions with scores that do not simply add up, which the tests of occlusion and of feature ablation share."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import captum.attr
import torch
from torch import Tensor, nn


def by_captum(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return captum.attr.Occlusion(function).attribute(*args, **kwargs)


def assert_close(
    found: Any, expected: Any, tolerance: float = 2e-6, dtype: torch.dtype | None = torch.float32
) -> None:
    """Shapes, dtypes and values, within ``tolerance`` of the largest value expected; dtype None: any that is both's."""
    if isinstance(expected, tuple):
        assert isinstance(found, tuple) and len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other, tolerance, dtype)
        return
    assert found.shape == expected.shape and found.dtype == expected.dtype and dtype in (None, found.dtype)
    if expected.numel():
        scale = expected.abs().max().item()
        assert (found - expected).abs().max().item() <= tolerance * max(scale, 1e-3)


def scores(x: Tensor, outputs: int = 5) -> Tensor:
    """(N, outputs) scores of inputs of any shape, not linear, so that features do not simply add up."""
    flat = x.flatten(1) if x.dim() > 1 else x[:, None]
    flat = flat if flat.is_floating_point() else flat.float()
    weight = torch.randn(
        flat.shape[1], outputs, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    return torch.tanh(flat @ weight.to(flat.dtype) / math.sqrt(flat.shape[1]))


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5),
    ).eval()  # fmt: skip


def two(a: Tensor, b: Tensor, gain: Tensor | float = 1.0) -> Tensor:
    return scores(a) * gain + scores(b.sin()) * scores(a)[:, :1]


AGGREGATES = {
    "scalar": lambda x: scores(x).sum(),
    "number": lambda x: scores(x).sum().item(),
    "integer": lambda x: int((1e4 * scores(x)).sum()),
    "one element": lambda x: scores(x).sum().reshape(1),
    "one row": lambda x: scores(x).sum(0, keepdim=True),
}
