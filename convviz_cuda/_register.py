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
    differentiable: bool = True,
) -> Any:
    """Define ``convviz::name`` and return its overload, ready to call.

    ``signature`` is the schema behind the name; ``backward``, ``setup_context`` and ``vmap`` are as in
    :func:`torch.library.register_autograd` and :func:`torch.library.register_vmap`. The results of an op that is
    not ``differentiable`` are constants to autograd.
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
    if not differentiable:
        _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    if vmap is not None:
        torch.library.register_vmap(qualified, vmap, lib=_library)
    _names.append(name)
    return getattr(torch.ops.convviz, name).default


def vmap_loop(op: Any, info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[Any, Any]:
    """A vmap rule that calls once for each element, for combinations that no kernel serves."""

    def pick(value: Any, dim: Any, i: int) -> Any:
        return value.select(dim, i) if isinstance(value, torch.Tensor) and dim is not None else value

    outs = [op(*(pick(v, d, i) for v, d in zip(args, in_dims, strict=True))) for i in range(info.batch_size)]
    if isinstance(outs[0], tuple):
        return tuple(torch.stack(column) for column in zip(*outs, strict=True)), (0,) * len(outs[0])
    return torch.stack(outs), 0


def looped(op_name: str) -> Callable[..., Any]:
    """The vmap rule that always loops."""
    return lambda info, in_dims, *args: vmap_loop(
        getattr(torch.ops.convviz, op_name).default, info, in_dims, args
    )
