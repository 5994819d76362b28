"""The caller's model run as it is, and the same afterwards: its buffers and PyTorch's random state."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from ._draws import drawn_from
from ._kept import KeptBuffers

# What is behind a function: a partial's function, a method's object, the function of an attribution method.
BEHIND = ("func", "__self__", "forward_func", "model", "attribution_method")
DEEPEST = 8
_LOCK = threading.Lock()
_RUNNING: dict[int, _Kept] = {}


@contextlib.contextmanager
def evaluated(
    *functions: Any, so: str | None = "the metric depends on the batch size"
) -> Iterator[Callable[..., Any]]:
    """Functions run inside the block change neither the buffers of their modules nor PyTorch's random state.

    Gives the first function, to be called in its place: of a module in evaluation mode random numbers are looked after
    while it runs and not in the whole block, which is faster; of a compiled one not at all, because PyTorch would run
    it uncompiled then.

    Modules stay in the modes in which they are. Where that makes scores random or lets the images of a batch change
    each other's, it is warned about once (UserWarning): the number of images in a forward then matters. Random numbers
    come from a generator of the block's own, so that they repeat.

    functions: modules, or functions; modules are found behind a ``functools.partial``, a method and an attribution
    method. Several threads may run the same module: its buffers are put back when the last one is done.
    so: what the warning says that follows from it; None: no warning.
    """
    kept = []
    if any(not isinstance(f, nn.Module) for f in functions) or any(map(_trains, modules_behind(functions))):
        draws: Any = drawn_from()
        run = functions[0]
    else:
        draws = contextlib.nullcontext()
        run = functions[0] if _compiled(functions[0]) else _drawing(functions[0])
    try:
        for module in filter(_trains, modules_behind(functions)):
            with _LOCK:
                kept.append(_RUNNING.setdefault(id(module), _Kept(module)))
                kept[-1].users += 1
                first = kept[-1].users == 1
            if first and so is not None:
                warn_of_training(module, so, stacklevel=5)
        with draws:
            yield run
    finally:
        for each in kept:
            with _LOCK:
                each.users -= 1
                if not each.users:
                    del _RUNNING[id(each.module)]
                    each.restore()


def _drawing(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that draws its random numbers from a generator of its own."""
    mode = drawn_from()

    def call(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return function(*args, **kwargs)

    return call


def _compiled(module: nn.Module) -> bool:
    return any(
        hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None
        for part in module.modules()
    )


class _Kept(KeptBuffers):
    """A module's buffers, as they were when the first of its users came."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module.modules())
        self.module, self.users = module, 0


def warn_of_training(module: nn.Module, so: str, stacklevel: int) -> None:
    """A UserWarning where a module's mode makes scores random or lets images change each other's; ``so``: the rest."""
    parts = list(module.modules())
    mixes = sorted({type(part).__name__ for part in parts if _mixes(part)})
    draws = sorted({type(part).__name__ for part in parts if _draws(part)})
    reasons = [f"the images of a batch change each other's scores ({', '.join(mixes)})"] * bool(mixes)
    reasons += [f"scores are random ({', '.join(draws)})"] * bool(draws)
    if reasons:
        warnings.warn(
            f"The model is in training mode: {' and '.join(reasons)}, so {so}. Call model.eval() first.",
            UserWarning,
            stacklevel=stacklevel,
        )


def modules_behind(functions: tuple[Any, ...]) -> list[nn.Module]:
    """The modules behind functions, each once."""
    found: dict[int, nn.Module] = {}
    for function in functions:
        for _ in range(DEEPEST):
            if function is None or isinstance(function, nn.Module):
                break
            function = next((getattr(function, name) for name in BEHIND if hasattr(function, name)), None)
        if isinstance(function, nn.Module):
            found[id(function)] = function
    return list(found.values())


def _trains(module: nn.Module) -> bool:
    return any(part.training for part in module.modules())


def _mixes(part: nn.Module) -> bool:
    return isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training


def _draws(part: nn.Module) -> bool:
    if not part.training:
        return False
    if isinstance(part, nn.RNNBase | nn.MultiheadAttention):
        return part.dropout > 0
    name = type(part).__name__  # torchvision's and timm's layers too
    dropped = getattr(part, "p", getattr(part, "drop_prob", 1.0))
    return name == "RReLU" or (("Drop" in name or name == "StochasticDepth") and dropped != 0)
