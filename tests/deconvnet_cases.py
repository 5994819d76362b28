"""Networks, images and random chains on which the ways of projecting are compared."""

from __future__ import annotations

import itertools

import torch
from hypothesis import assume, reject
from hypothesis import strategies as st
from torch import nn


def norm() -> nn.LocalResponseNorm:
    return nn.LocalResponseNorm(3, alpha=0.7, beta=0.75, k=1.0)


CHAINS = {
    "2x2/2": lambda: [nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(5, 6, 3), nn.ReLU()],
    "3x3/2 overlapping": lambda: [
        nn.Conv2d(3, 5, 5, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True), norm(),
        nn.Conv2d(5, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(6, 4, 3, padding=1), nn.ReLU(),
    ],
    "3x3/1 padded": lambda: [
        nn.Conv2d(3, 5, 3), nn.ReLU(), nn.MaxPool2d(3, 1, padding=1), norm(), nn.Conv2d(5, 6, 3, stride=2), nn.ReLU(),
    ],
    "pool without a ReLU before it": lambda: [
        nn.Conv2d(3, 5, 3), nn.MaxPool2d(3, 2), nn.ReLU(), nn.Conv2d(5, 6, 3, dilation=2), nn.MaxPool2d(2, 1),
    ],
    "dense": lambda: [
        nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True), nn.Flatten(),
        nn.Linear(4 * 6 * 7, 9), nn.ReLU(),
    ],
}  # fmt: skip


def network(name: str, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(*CHAINS[name]()).double().eval()


def images(count: int = 2, height: int = 26, width: int = 29, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, height, width, generator=generator, dtype=torch.float64)


@st.composite
def cases(draw):
    """A chain of random geometry, the size of an image that it accepts, and a seed."""
    layers, channels = [], 3
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(("conv", "conv", "max", "average", "norm")))
        kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
        stride = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
        if kind == "conv":
            dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
            padding = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
            groups = draw(
                st.sampled_from((1, 1, channels if channels == 4 else 3, 1 if channels == 3 else 2))
            )
            outputs = 4 if channels % groups == 0 and 4 % groups == 0 else 3
            groups = groups if channels % groups == 0 and outputs % groups == 0 else 1
            layers.append(nn.Conv2d(channels, outputs, kernel, stride, padding, dilation, groups))
            channels = outputs
        elif kind == "norm":
            layers.append(norm())
        else:
            padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
            pool = nn.MaxPool2d if kind == "max" else nn.AvgPool2d
            layers.append(pool(kernel, stride, padding, ceil_mode=draw(st.booleans())))
        if draw(st.booleans()):
            layers.append(nn.ReLU())
    size = draw(st.tuples(st.integers(14, 45), st.integers(14, 45)))
    return layers, size, draw(st.integers(0, 2**31))


def built(layers: list[nn.Module], size: tuple[int, int], seed: int):
    """A drawn chain with random weights, an image and the chain's output; drops what the image is too small for."""
    assume(layers)
    torch.manual_seed(seed)
    model = nn.Sequential(*layers).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(1, 3, *size, dtype=torch.float64)
    try:
        out = model(x)
    except RuntimeError:
        reject()
    assume(min(out.shape[2:]) > 0)
    return model, x, out


def corners(maps: torch.Tensor) -> list[list[int]]:
    """Positions of maps (N, C, h, w): corners, borders and the middle."""
    return [list(p) for p in itertools.product(*(sorted({0, n // 2, n - 1}) for n in maps.shape[2:]))]
