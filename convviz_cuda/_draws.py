"""Random numbers without PyTorch's global generator: counted ones, and those of code that takes no generator."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .mask_ops import philox

# How operations that draw numbers are called where they are given a generator.
OVERLOADS = {"default": "generator", "low": "low_generator"}


class drawn_from(TorchDispatchMode):
    """Random numbers drawn inside the block, in this thread, come from a generator; the global one is not touched.

    Not by seeding and restoring the global one: that would disturb, and be disturbed by, what other threads draw.

    Args:
        generator: of the device on which is drawn; None: one of each device, seeded with 0.
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.generators = {} if generator is None else {generator.device: generator}

    def _generator(self, args: Any, kwargs: dict[str, Any]) -> torch.Generator:
        device = kwargs.get("device")
        if device is None:
            device = next((x.device for x in tree_leaves(args) if isinstance(x, Tensor)), "cpu")
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if device not in self.generators:
            self.generators[device] = torch.Generator(device).manual_seed(0)
        return self.generators[device]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ops.aten.native_dropout.default:  # a GPU's, which takes no generator
            return self._dropout(*args, **kwargs)
        func, takes = _given_generator(func)
        if takes and kwargs.get("generator") is None:
            kwargs["generator"] = self._generator(args, kwargs)
        return func(*args, **kwargs)

    def _dropout(self, input: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
        if train is False or p == 0:
            return input.clone(), torch.ones_like(input, dtype=torch.bool)
        keep = torch.empty_like(input, dtype=torch.bool)
        keep.bernoulli_(1 - p, generator=self._generator((input,), {}))
        return (input * keep * (0.0 if p == 1 else 1 / (1 - p))).to(input.dtype), keep


class drawn_as_usual(drawn_from):
    """Inside a block of :class:`drawn_from`: random numbers come from PyTorch's global generators again."""

    def __init__(self) -> None:
        super().__init__(torch.default_generator)
        for index, generator in enumerate(torch.cuda.default_generators):
            self.generators[torch.device("cuda", index)] = generator


@functools.cache
def _given_generator(func: Any) -> tuple[Any, bool]:
    """An operation, or its overload that takes a generator, and whether it takes one."""
    if any(argument.name == "generator" for argument in func._schema.arguments):
        return func, True
    name = OVERLOADS.get(func._overloadname)
    other = getattr(func.overloadpacket, name, None) if name else None
    return (func, False) if other is None else (other, True)


def normal(streams: Tensor, count: int, seed: int) -> Tensor:
    """(n, count) float64, standard normal: a row for each stream of :func:`philox`, the same wherever it stands.

    Box and Muller 1958, two words for each number.
    """
    words = philox(streams, 2 * count, seed).view(-1, count, 2).double()
    radius = (-2 * torch.log((words[..., 0] + 1) / 2**32)).sqrt()
    return radius * torch.cos(2 * math.pi / 2**32 * words[..., 1])
