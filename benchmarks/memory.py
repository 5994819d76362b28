"""Bytes held between forward and backward, and the peak of resident memory in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

PEAK_SCRIPT = Path(__file__).resolve().parent / "peak_memory.py"


def held_bytes(attribution: Callable[[], Any], model: nn.Module, images: Tensor) -> int:
    """Bytes of the storages that an attribution's forward keeps for its backward.

    Every node's saved tensors pass the same hooks, PyTorch's and ours; each storage counts once. Not counted,
    on either side: parameters, buffers and the input (also as a leaf that was copied into another layout).
    """
    storages: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() and not (tensor.is_leaf and tensor.requires_grad):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage  # held, so that its address stays its own
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        attribution()
    known = [*model.parameters(), *model.buffers(), images]
    for tensor in known:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in storages.values())


def peak_bytes(side: str, method: str, model: str, batch: int, size: int, threads: int) -> int:
    """Peak resident memory of one attribution above the loaded model, in a fresh process."""
    arguments = [side, method, model, str(batch), str(size), str(threads)]
    done = subprocess.run(
        [sys.executable, str(PEAK_SCRIPT), *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(
            f"peak_memory.py {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr}"
        )
    return json.loads(done.stdout.splitlines()[-1])["peak_bytes"]
