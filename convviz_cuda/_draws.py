"""Random numbers without PyTorch's global generator: counted ones, and those of code that takes no generator."""

from __future__ import annotations

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
        takes = any(argument.name == "generator" for argument in func._schema.arguments)
        if not takes and func._overloadname in OVERLOADS:
            other = getattr(func.overloadpacket, OVERLOADS[func._overloadname], None)
            func, takes = (other, True) if other is not None else (func, False)
        if takes and kwargs.get("generator") is None:
            kwargs["generator"] = self._generator(args, kwargs)
        return func(*args, **kwargs)


def normal(streams: Tensor, count: int, seed: int) -> Tensor:
    """(n, count) float64, standard normal: a row for each stream of :func:`philox`, the same wherever it stands.

    Box and Muller 1958, two words for each number.
    """
    words = philox(streams, 2 * count, seed).view(-1, count, 2).double()
    radius = (-2 * torch.log((words[..., 0] + 1) / 2**32)).sqrt()
    return radius * torch.cos(2 * math.pi / 2**32 * words[..., 1])
