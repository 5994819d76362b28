"""The deconvnet of Zeiler & Fergus 2013, section 2.1, spelled out: unpool by the switches, ReLU, transposed filters.

Independent of the library: nothing here is autograd's backward but the LRN gradient, which the option asks for.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def forward(chain: list[nn.Module], x: Tensor) -> list[Tensor]:
    """The input and every layer's output."""
    values = [x]
    with torch.no_grad():
        for layer in chain:
            values.append(layer(values[-1]))
    return values


def project(
    chain: list[nn.Module], x: Tensor, seed: Tensor, overlap: str = "sum", norm: str = "identity"
) -> Tensor:
    """The signal ``seed`` at the output of a chain of layers, carried down to the pixels of ``x``."""
    values = forward(chain, x)
    signal = seed
    for layer, below in zip(reversed(chain), reversed(values[:-1]), strict=True):
        signal = down(layer, below, signal, overlap, norm)
    return signal


def down(layer: nn.Module, below: Tensor, signal: Tensor, overlap: str, norm: str) -> Tensor:
    if isinstance(layer, nn.ReLU):
        return signal.clamp(min=0)
    if isinstance(layer, nn.Conv2d):
        size = [
            (n - 1) * s - 2 * p + d * (k - 1) + 1
            for n, s, p, d, k in zip(
                signal.shape[2:], layer.stride, layer.padding, layer.dilation, layer.kernel_size, strict=True
            )
        ]
        extra = [have - made for have, made in zip(below.shape[2:], size, strict=True)]
        return F.conv_transpose2d(
            signal,
            layer.weight.detach(),
            None,
            layer.stride,
            layer.padding,
            extra,
            layer.groups,
            layer.dilation,
        )
    if isinstance(layer, nn.MaxPool2d):
        return unpool(layer, below, signal, overlap)
    if isinstance(layer, nn.LocalResponseNorm):
        if norm == "identity":
            return signal
        leaf = below.clone().requires_grad_()
        return torch.autograd.grad(layer(leaf), leaf, signal)[0]
    if isinstance(layer, nn.Flatten):
        return signal.reshape(below.shape)
    if isinstance(layer, nn.Linear):
        return signal @ layer.weight.detach()
    raise NotImplementedError(type(layer).__name__)


def unpool(layer: nn.MaxPool2d, below: Tensor, signal: Tensor, overlap: str) -> Tensor:
    """Element by element: each pooled signal goes to the place of its window's maximum."""
    _, places = F.max_pool2d(
        below,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.ceil_mode,
        return_indices=True,
    )
    flat, at = signal.flatten(2).tolist(), places.flatten(2).tolist()
    out = torch.zeros_like(below).flatten(2)
    for n in range(signal.shape[0]):
        for c in range(signal.shape[1]):
            gathered: dict[int, list[float]] = {}
            for value, place in zip(flat[n][c], at[n][c], strict=True):
                gathered.setdefault(place, []).append(value)
            for place, values in gathered.items():
                out[n, c, place] = sum(values) if overlap == "sum" else max(values)
    return out.reshape(below.shape)
