"""Perturbations that are the same each time, which the tests of robustness share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

F64 = torch.float64


def wobble(x, radius: float = 0.3):
    """A perturbation that depends on the row, so that samples differ, and on nothing else."""
    if isinstance(x, tuple):
        return tuple(wobble(one, radius) for one in x)
    row = torch.arange(len(x), dtype=x.dtype, device=x.device).view(-1, *[1] * (x.dim() - 1))
    line = torch.linspace(0, 9, x[0].numel(), dtype=x.dtype, device=x.device)
    return x + radius * torch.sin(7 * row + line.view(x.shape[1:]))


def both(x, baselines=None):
    after = wobble(x)
    if isinstance(x, tuple):
        return tuple(a - b for a, b in zip(x, after, strict=True)), after
    return x - after, after


def untouched(*_: object, **__: object) -> Tensor:
    raise RuntimeError("nothing may be computed before the arguments are checked")


def blurred(x: Tensor, **_: object) -> Tensor:
    """A method that commutes with what moves pixels, but for the border."""
    return nn.functional.avg_pool2d(x.sum(1, keepdim=True), 3, 1, 1)
