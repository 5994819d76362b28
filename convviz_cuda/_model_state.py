"""What a model's function depends on, as keys under which something is remembered of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ._layers import CannotCapture

_PLAIN = (int, float, bool, str, type(None), bytes, complex, torch.dtype, torch.device)
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
SAMPLE = 1024  # values of a tensor that are looked at, to see whether it changed


def state_key(model: nn.Module, images: Tensor, geometry: bool = False) -> tuple[Any, dict[Any, Any]]:
    """What the model's function depends on: its tensors, and the settings of its modules, each by itself.

    Of a tensor it is the object, its version, and up to SAMPLE of its values: what is written through ``.data`` has no
    version. Lists and dicts are looked into, other objects are not, nor are globals.  geometry: see `geometry_key`.
    """
    settings: dict[Any, Any] = {}
    for name, module in model.named_modules():
        if module.training:
            raise CannotCapture(f"The module {name or type(model).__name__!r} is in training mode.")
        hooks = module._forward_hooks or module._forward_pre_hooks
        if hooks:
            raise CannotCapture(f"The module {name or type(model).__name__!r} has forward hooks.")
        if isinstance(module, torch.jit.ScriptModule):
            raise CannotCapture(f"The module {name or type(model).__name__!r} is scripted.")
        # Plain attributes hold a module's settings: strides, slopes, bounds.
        settings[id(module), None] = name
        for attribute, value in vars(module).items():
            if attribute not in _OF_EVERY_MODULE:
                settings[id(module), attribute] = _setting(value, geometry)
    tensors = [*model.parameters(), *model.buffers()]
    try:
        state = tuple((id(t), t._version, t.data_ptr()) for t in tensors)
    except RuntimeError as error:
        raise CannotCapture(f"The parameters of the model cannot be followed: {error}") from None
    values = None if geometry else sampled(tensors)
    return (tuple(images.shape[1:]), images.dtype, images.device, state, values), settings


def geometry_key(model: nn.Module, images: Tensor) -> Any:
    """What receptive fields stay right for: the images' size and the modules' plain settings, whatever the weights are.

    Raises CannotCapture as :func:`capture` does.
    """
    state, settings = state_key(model, images, geometry=True)
    return state[:3], settings


def settings_of(model: nn.Module) -> tuple[Any, ...]:
    """The settings of a model's modules: plain attributes, and those in their lists and dicts."""
    return tuple(
        (id(module), *(_setting(v, True) for name, v in vars(module).items() if name not in _OF_EVERY_MODULE))
        for module in model.modules()
    )


def _setting(value: Any, geometry: bool, depth: int = 4) -> Any:
    """A setting as a value of its own; of what is not plain its identity, or, for ``geometry``, nothing."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if depth and kind in (tuple, list, torch.Size, set, frozenset) and len(value) <= SAMPLE:
        return kind, tuple(_setting(each, geometry, depth - 1) for each in value)
    if depth and isinstance(value, dict) and len(value) <= SAMPLE:
        return kind, tuple((k, _setting(each, geometry, depth - 1)) for k, each in value.items())
    if geometry:
        return None
    if isinstance(value, Tensor):
        version = None if value.is_inference() else value._version
        return id(value), version, tuple(value.shape), sampled([value])
    return id(value)


@torch.no_grad()
def sampled(tensors: Iterable[Tensor]) -> int:
    """A number that changes with the tensors' values: with any of small ones, with some of those over SAMPLE."""
    groups: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.layout == torch.strided and tensor.numel() and not tensor.is_meta:
            # In the order of the memory, so that nothing is copied.
            span = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
            every = -(-span // SAMPLE)
            with contextlib.suppress(RuntimeError, TypeError):  # kinds of tensors without memory of their own
                values = tensor.as_strided((-(-span // every),), (every,))
                groups.setdefault((values.dtype, values.device), []).append(values)
    found = []
    for each in groups.values():
        with contextlib.suppress(RuntimeError):  # dtypes that few operations know
            found.append(torch.cat(each).view(torch.uint8).cpu().numpy().tobytes())
    return hash(tuple(found))
