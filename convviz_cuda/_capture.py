"""From a model to its flat list of layers, with ``torch.export``; the last of each model is remembered."""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._agreement import check_captured
from ._draws import drawn_from
from ._export import Unsupported, parse
from ._fields import ReceptiveField
from ._layers import CannotCapture
from ._model_state import state_key
from ._network import Network
from ._twins import say_less, twin_of


class _Known(NamedTuple):
    """A model's last capture: its key, and the network or why there is none."""

    state: Any
    settings: dict[Any, Any]
    passing: frozenset[Any]  # settings that a forward changes: a count of calls, a value that is kept aside
    found: Network | str

    def holds(self, key: tuple[Any, dict[Any, Any]]) -> bool:
        state, settings = key
        lasting = {name: value for name, value in settings.items() if name not in self.passing}
        return state == self.state and lasting == self.settings


_last: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()
_lock = threading.RLock()
_EXPORT_LOGGERS = ("torch.fx.experimental.symbolic_shapes", "torch._export.non_strict_utils", "torch.export")


def capture(model: nn.Module, images: Tensor, again: bool = False) -> Network:
    """The layers of a model on images like these ((N, C, H, W)): its function in evaluation mode, for any
    batch size.

    The last capture of each model is remembered, also that it failed, and used again while its parameters,
    buffers, modes, settings and the images' size, dtype and device stay what they were; ``again=True`` captures
    anew. The model and its parameters are only read. Not noticed is what changes otherwise than by operations on
    tensors (through ``.data``, or by C++) and not in the 1024 values that are looked at of a large tensor, and what
    is read from globals or from objects that are no list, dict or tensor.

    Raises:
        CannotCapture: with the reason, if the model is not a module in evaluation mode, has hooks, cannot be
            exported (control flow that depends on data, several outputs), or mixes the images of a batch.
    """
    if not isinstance(model, nn.Module):
        raise CannotCapture(
            f"A {type(model).__name__} is not a torch.nn.Module, so its layers are not known."
        )
    key = state_key(model, images)
    with _lock:
        try:
            known = _last.get(model)
        except TypeError:
            known = None
        if known is not None and known.holds(key) and not again:
            if isinstance(known.found, str):
                raise CannotCapture(known.found)
            return known.found
        try:
            found: Network | str = _capture(model, images)
        except CannotCapture as error:
            if isinstance(error.__context__, torch.OutOfMemoryError):  # there may be enough another time
                raise
            found = str(error)
        state, settings = key
        after = state_key(model, images)[1]  # the model ran once
        if isinstance(found, str) and known is not None and isinstance(known.found, str):
            after = {**after, **known.settings}  # or did not run at all: what differs did not help last time
        passing = frozenset(name for name in settings | after if settings.get(name) != after.get(name))
        settings = {name: value for name, value in settings.items() if name not in passing}
        with contextlib.suppress(TypeError):  # a module without a weak reference is captured at every call
            _last[model] = _Known(state, settings, passing, found)
        if isinstance(found, str):
            raise CannotCapture(found)
        found.key = key
        return found


def captured(model: nn.Module, images: Tensor) -> Network | None:
    """What :func:`capture` would give without capturing, or None."""
    try:
        known = _last.get(model)
        if known is None or isinstance(known.found, str) or not known.holds(state_key(model, images)):
            return None
        return known.found
    except (TypeError, CannotCapture):
        return None


def is_current(network: Network, model: nn.Module, images: Tensor) -> bool:
    """Whether the tensors and modes of a model still are those that were captured; settings do not matter any more."""
    try:
        return state_key(model, images)[0] == network.key[0]
    except CannotCapture:
        return False


def receptive_field(model: nn.Module, layer: str, images: Tensor, rivals: bool = False) -> ReceptiveField:
    """The receptive field of the layer of a name, for images like these (N, C, H, W); branches included.

    rivals: also what the max pooling windows see that overlap with those that a position sees.

    Raises:
        CannotCapture: with the reason, as :func:`capture` does.
        ValueError: the model has no such layer, or it does not run.
    """
    network = capture(model, images)
    place = network.layer_index(layer)
    # Of maps that are transposed or have the channels last, rows and columns are not the image's.
    fields = network.receptive_fields(rivals)[place] if network.layers[place].axes == (2, 3) else None
    return ReceptiveField(*(fields or (None, None)), (images.shape[2], images.shape[3]))


def _capture(model: nn.Module, images: Tensor) -> Network:
    example = torch.zeros(2, *images.shape[1:], dtype=images.dtype, device=images.device)
    twin = twin_of(model)
    stopped = say_less(twin) if twin is not model else []
    drawn = drawn_from()  # what a model draws leaves PyTorch's random state alone
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    try:
        with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings(), _no_log():
            warnings.simplefilter("ignore")
            program = torch.export.export(
                twin, (example,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False
            )
            with drawn:
                network = Network(*parse(program, twin))
    except (KeyboardInterrupt, MemoryError, CannotCapture):
        raise
    except Unsupported as error:
        raise CannotCapture(str(error)) from None
    except Exception as error:  # torch.export raises whatever the traced code and the tracer raise
        error = stopped[-1] if stopped else error
        reason = str(error).strip().splitlines()
        raise CannotCapture(
            f"torch.export cannot capture the model: {type(error).__name__}: {reason[0] if reason else ''}"
        ) from None
    finally:
        assert modes == (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    with drawn:
        check_captured(network, model, example)
    return network


@contextlib.contextmanager
def _no_log() -> Iterator[None]:
    """The export's warnings of what it cannot follow, in this thread, are not logged: the caller gets the reason."""
    thread = threading.get_ident()

    def elsewhere(record: logging.LogRecord) -> bool:
        return record.thread != thread

    loggers = [logging.getLogger(name) for name in _EXPORT_LOGGERS]
    for logger in loggers:
        logger.addFilter(elsewhere)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(elsewhere)
