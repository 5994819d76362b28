"""Copies of a model's modules with the same tensors."""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import weakref
from collections.abc import Iterable, Iterator
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn

# Classes' own methods get their parts from ``self``, so they are not looked into.
_ENDS = (Tensor, type, ModuleType, CodeType, FrameType)
_TAPS = f"{__package__}.attr._taps"  # its hooks, of another thread's forward, do nothing in this one
MANY = 50_000  # objects that are looked at, to see what a copy holds


def twin_of(model: nn.Module) -> nn.Module:
    """The model's modules again with the same tensors: for what changes modules while it runs, as an export does, when
    other threads may be using these. Of a model that cannot be copied, itself.

    Functions are not copied: what they hold of the model's modules, the twin runs too. A capture bears that, as all are
    in evaluation mode and its layers are compared with the model's output; for other uses see :func:`own_twin`.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    try:
        return copy.deepcopy(model, shared)
    except Exception:  # whatever a module that cannot be copied raises
        return model


def own_twin(model: nn.Module) -> nn.Module:
    """A twin that runs none of the model's own modules; where there can be none, the model itself.

    A forward that was wrapped, or a hook, is a function, which a copy takes as it is: it would run the model's modules,
    in training mode.
    """
    twin = twin_of(model)
    return model if twin is model or _reaches(twin, model) else twin


def _reaches(twin: nn.Module, model: nn.Module) -> bool:
    """Whether a copy holds modules of the model in any way: in what its functions close over or name, say."""
    originals = {id(module) for module in model.modules()}
    seen: set[int] = set()
    waiting: list[Any] = [twin]
    while waiting and len(seen) < MANY:
        value = waiting.pop()
        if id(value) in originals:
            return True
        if id(value) not in seen and not isinstance(value, _ENDS):
            seen.add(id(value))
            waiting += _held_by(value)
    return bool(waiting)  # too many to know


def _held_by(value: Any) -> Iterable[Any]:
    if isinstance(value, weakref.ref):
        return [value()]
    if not isinstance(value, FunctionType):
        return gc.get_referents(value)
    names = value.__globals__
    if names.get("__name__") == _TAPS:
        return []
    named = [names[name] for name in _names_in(value.__code__) if name in names]
    return [value.__closure__, value.__defaults__, value.__kwdefaults__, vars(value), *named]


def _names_in(code: CodeType) -> Iterator[str]:
    inner = (_names_in(each) for each in code.co_consts if isinstance(each, CodeType))
    return itertools.chain(code.co_names, *inner)


def say_less(twin: nn.Module) -> list[Exception]:
    """Where the export prints the whole graph because of an exception of the twin's forward, it meets another one; the
    list gets the true one."""
    stopped: list[Exception] = []
    forward = twin.forward

    @functools.wraps(forward)
    def without_details(*args: Any, **kwargs: Any) -> Any:
        try:
            return forward(*args, **kwargs)
        except RuntimeError as error:
            if "data-dependent" not in str(error).lower():
                raise
            stopped.append(error)
        raise ValueError("The model's control flow depends on data.")

    twin.forward = without_details  # type: ignore[method-assign]
    return stopped
