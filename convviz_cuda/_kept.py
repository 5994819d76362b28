"""What a forward may change besides its output, kept and put back: a model's buffers and random states."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class KeptBuffers:
    """The buffers of modules, objects and values, as they are now. :meth:`restore` puts them back.

    Every buffer is copied, because what it held is gone once a forward has written into it, and any forward may: a
    layer may count its runs in evaluation mode too, a model adapt the statistics of its batch norms. Copies kept from
    an earlier call would miss what was written through ``.data`` meanwhile, and put back an old value. It takes 2
    microseconds a buffer.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._kept = [
            (part, name, buffer, buffer.clone(), _version(buffer))
            for part in modules
            for name, buffer in part._buffers.items()
            if buffer is not None and not nn.parameter.is_lazy(buffer)
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Writes only where something changed: a write counts as a change for what is remembered of a model."""
        for part, name, buffer, value, version in self._kept:
            if getattr(part, name, None) is not buffer:
                part._buffers[name] = buffer
            # A write through .data leaves the version; on a GPU the comparison of values waits for it.
            if _version(buffer) != version or not torch.equal(buffer, value):
                buffer.copy_(value)


class KeptRandom:
    """The states of Python's generator and of PyTorch's default ones: the CPU's and those of the GPUs of tensors.

    Not NumPy's: to read its state takes four times as long as Python's, 7 % of a tiny model's gradient.
    """

    def __init__(self, tensors: Iterable[Tensor | None] = ()) -> None:
        self._python, self._cpu = random.getstate(), torch.get_rng_state()
        self._gpus = {device: torch.cuda.get_rng_state(device) for device in _gpus(tensors)}

    def restore(self) -> None:
        random.setstate(self._python)
        torch.set_rng_state(self._cpu)
        for device, state in self._gpus.items():
            torch.cuda.set_rng_state(state, device)


def _gpus(tensors: Iterable[Tensor | None]) -> set[torch.device]:
    # A generator's state cannot be read while a graph is captured.
    if not torch.cuda.is_initialized() or torch.cuda.is_current_stream_capturing():
        return set()
    return {x.device for x in tensors if x is not None and x.is_cuda}


def _version(tensor: Tensor) -> Any:
    return None if tensor.is_inference() else tensor._version
