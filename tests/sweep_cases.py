"""A small network, its images and the definition of a sweep, which the tests of sweeps share."""

from __future__ import annotations

import torch
from torch import nn


def images(count=2, channels=3, height=24, width=24, dtype=torch.float64, seed=1):
    return torch.randn(
        count, channels, height, width, dtype=dtype, generator=torch.Generator().manual_seed(seed)
    )


def brute_force(model, x, window, stride, fill=0.0, border="clip"):
    """(B, R, Q, K) by slicing: the definition."""
    fill = torch.as_tensor(fill, dtype=x.dtype).expand(x.shape)
    (wh, ww), (sh, sw) = ((v, v) if isinstance(v, int) else v for v in (window, stride))
    height, width = x.shape[2:]

    def starts(size, side, step):
        last = (size - side) // step if border == "inside" else -((side - size) // step)
        return [i * step for i in range(last + 1)]

    rows = []
    for top in starts(height, wh, sh):
        row = []
        for left in starts(width, ww, sw):
            masked = x.clone()
            area = (..., slice(top, top + wh), slice(left, left + ww))
            masked[area] = fill[area]
            with torch.no_grad():
                row.append(model(masked))
        rows.append(torch.stack(row, 1))
    return torch.stack(rows, 1)


def close(found, expected, part=1e-10):
    expected = expected.detach()
    spread = max(float(expected.max() - expected.min()), 1e-30)
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= part * spread, (
        float((found - expected).abs().max()) / spread
    )


def small_net(seed=0, classes=5):
    torch.manual_seed(seed)
    return (
        nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
            nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes),
        ).double().eval()
    )  # fmt: skip


def average(x):
    return x.mean((2, 3))
