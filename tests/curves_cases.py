"""Functions with known scores, which the tests of the metrics of maps share."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Linear:
    """The sum of pixels under weights, (N, 1): each row is summed by itself, in any batch alike."""

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights

    def __call__(self, x: Tensor) -> Tensor:
        return torch.stack([(row * self.weights).sum() for row in x]).reshape(-1, 1)


class Seen:
    """Keeps copies of the images that it is given."""

    def __init__(self) -> None:
        self.images: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.images += [row.clone() for row in x]
        return torch.stack([row.double().sum() for row in x]).reshape(-1, 1)


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.conv = nn.Conv2d(3, 6, 3, padding=1, dtype=dtype)
        self.fc = nn.Linear(6, 4, dtype=dtype)
        for p in self.parameters():
            p.data.copy_(torch.randn(p.shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu().mean((2, 3)))


X, MAPS = torch.ones(2, 3, 8, 8), torch.ones(2, 8, 8)
