"""A small network and comparisons, which the tests of integrated gradients and of the noise tunnel share."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch
from torch import Tensor, nn


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(8, 12, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 7),
    ).eval().to(dtype)  # fmt: skip


def normal(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@contextlib.contextmanager
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def assert_equal_to(found: Any, expected: Any, tolerance: float = 2e-6) -> None:
    """Within ``tolerance`` of the largest value expected: attributions have no absolute scale."""
    if isinstance(expected, tuple):
        assert isinstance(found, tuple) and len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_equal_to(one, other, tolerance)
        return
    expected = expected.detach()
    assert found.shape == expected.shape and found.dtype == expected.dtype and not found.requires_grad
    scale = expected.abs().max().item()
    assert scale > 0 and (found - expected).abs().max().item() <= tolerance * scale


class Watched(nn.Module):
    """The batch sizes that a model saw."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.sizes = model, []

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        self.sizes.append(len(x))
        return self.model(x, *more)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(5, 4)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.relu(self.conv(a)).mean((2, 3)) * torch.tanh(self.linear(b))
