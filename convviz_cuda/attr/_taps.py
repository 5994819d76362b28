"""What layers give, or are given, while a forward runs: seen, and changed where wanted. Nothing stays behind."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn


@contextlib.contextmanager
def tapped(
    layers: Sequence[nn.Module], tap: Callable[[int, Any], Any], of_input: bool = False
) -> Iterator[None]:
    """While the block lasts, ``tap(place, value)`` is called whenever one of the layers runs in this thread.

    Args:
        layers: modules; ``place`` is a layer's number among them.
        tap: gets what the layer gave. What it returns takes the value's place, unless it is None.
        of_input: the tap gets what the layer was given instead: the argument, or a tuple where there are several.
    """
    thread = threading.get_ident()  # another thread's forward through the same model is not ours

    def after(place: int) -> Callable[..., Any]:
        return lambda _, given, gave: tap(place, gave) if threading.get_ident() == thread else None

    def before(place: int) -> Callable[..., Any]:
        def hook(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
            if threading.get_ident() != thread:
                return None
            every = (*given, *named.values())
            changed = tap(place, every[0] if len(every) == 1 else every)
            if changed is None:
                return None
            changed = (changed,) if len(every) == 1 else tuple(changed)
            return changed[: len(given)], dict(zip(named, changed[len(given) :], strict=True))

        return hook

    handles = []
    try:
        for place, layer in enumerate(layers):
            if of_input:
                handles.append(layer.register_forward_pre_hook(before(place), with_kwargs=True))
            else:
                handles.append(layer.register_forward_hook(after(place)))
        yield
    finally:
        for handle in handles:
            handle.remove()
