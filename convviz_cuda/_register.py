"""Defines an op of the namespace ``convviz``: schema, reference, fake and autograd, all in Python.

The reference is registered as the kernel for every backend (``CompositeExplicitAutograd``); the
extension, when it is loaded, registers faster kernels for CPU and CUDA beside it and the dispatcher
prefers those. So a missing extension needs no branch anywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from . import _backend

_library = torch.library.Library("convviz", "DEF")
_names: list[str] = []


def op_names() -> tuple[str, ...]:
    """Names of all ops defined so far, in order of definition."""
    return tuple(_names)


def define(
    name: str,
    signature: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    vmap: Callable[..., Any] | None = None,
) -> Any:
    """Define ``convviz::name`` and return its overload, ready to call.

    ``signature`` is the schema behind the name; ``backward``, ``setup_context`` and ``vmap`` are as in
    :func:`torch.library.register_autograd` and :func:`torch.library.register_vmap`.
    """
    qualified = f"convviz::{name}"
    _library.define(name + signature, tags=(torch.Tag.pt2_compliant_tag,))

    @functools.wraps(reference)
    def fallback(*args: Any) -> Any:
        _backend.refuse_reference(name, args[0].device.type)
        return reference(*args)

    _library.impl(name, fallback, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_library)
    if vmap is not None:
        torch.library.register_vmap(qualified, vmap, lib=_library)
    _names.append(name)
    return getattr(torch.ops.convviz, name).default
