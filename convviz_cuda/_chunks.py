"""Work on many items some at a time, fewer where memory ends."""

from __future__ import annotations

from collections.abc import Iterator

import torch


class Chunks:
    """(start, stop) of so many items after the other; of half as many, from the same item on, where memory ends::

        for start, stop in chunks:
            with chunks:
                ...  # what may find no memory
            if chunks.failed:
                continue

    at_once: items of a chunk; it may be set between chunks. fixed: it was asked for. Then torch.OutOfMemoryError leaves
    the ``with`` block, as it does where one item finds no memory.
    """

    def __init__(self, count: int, at_once: int, fixed: bool) -> None:
        self.count, self.fixed, self.failed, self._tried = count, fixed, False, 0
        self.at_once = max(1, min(at_once, count))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        start = 0
        while start < self.count:
            stop = min(start + self.at_once, self.count)
            self.failed, self._tried = False, stop - start
            yield start, stop
            if not self.failed:
                start = stop

    def __enter__(self) -> Chunks:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        out_of_memory = kind is not None and issubclass(kind, torch.OutOfMemoryError)
        half = self._tried // 2  # the last chunk may be smaller than the others
        self.failed = out_of_memory and not self.fixed and half > 0
        if self.failed:
            self.at_once = half
        # Tried again behind the block: the exception, which keeps the attempt's tensors alive, ends with it.
        return self.failed
