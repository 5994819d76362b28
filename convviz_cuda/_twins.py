"""Copies of a model's modules with the same tensors."""

from __future__ import annotations

import copy
import functools
from typing import Any

from torch import nn


def twin_of(model: nn.Module) -> nn.Module:
    """The model's modules again with the same tensors: for what changes modules while it runs, as an export does, when
    other threads may be using these. Of a model that cannot be copied, itself."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    try:
        return copy.deepcopy(model, shared)
    except Exception:  # whatever a module that cannot be copied raises
        return model


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
