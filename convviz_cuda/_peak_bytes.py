"""How many bytes of tensors a piece of work holds at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakBytes(TorchDispatchMode):
    """The most bytes of tensors that operations inside the block held at once; not their inputs from before."""

    def __init__(self, active: bool) -> None:
        super().__init__()
        self.active, self.bytes = active, 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __enter__(self) -> PeakBytes:
        return super().__enter__() if self.active else self

    def __exit__(self, *exception: Any) -> None:
        if self.active:
            super().__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._live = {key: held for key, held in self._live.items() if not held[0].expired()}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                self._live.setdefault(reference.cdata, (reference, storage.nbytes()))
        self.bytes = max(self.bytes, sum(size for _, size in self._live.values()))
        return result
