"""The caller's model in a metric: run as it is, the same afterwards; its scores and the classes that it predicts."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._draws import drawn_from
from ..attr._inputs import Target, extra_args, select_target
from ..attr._masked import memory_format
from ..attr._masked_images import Evaluate, args_of_each_image, image_scores, of_each_image

# What is behind a function: a partial's function, a method's object, the function of an attribution method.
BEHIND = ("func", "__self__", "forward_func", "model", "attribution_method")
DEEPEST = 8
_LOCK = threading.Lock()
_RUNNING: dict[int, _Kept] = {}


@contextlib.contextmanager
def evaluated(*functions: Any) -> Iterator[Callable[..., Any]]:
    """Functions run inside the block change neither the buffers of their modules nor PyTorch's random state.

    Gives the first function, to be called in its place: of a module in evaluation mode random numbers are looked after
    while it runs and not in the whole block, which is faster; of a compiled one not at all, because PyTorch would run
    it uncompiled then.

    Modules stay in the modes in which they are. Where that makes scores random or lets the images of a batch change
    each other's, it is warned about once (UserWarning): the number of images in a forward then matters. Random numbers
    come from a generator of the block's own, so that they repeat.

    functions: modules, or functions; modules are found behind a ``functools.partial``, a method and an attribution
    method. Several threads may run the same module: its buffers are put back when the last one is done.
    """
    kept = []
    if any(not isinstance(f, nn.Module) for f in functions) or any(map(_trains, _modules(functions))):
        draws: Any = drawn_from()
        run = functions[0]
    else:
        draws = contextlib.nullcontext()
        run = functions[0] if _compiled(functions[0]) else _drawing(functions[0])
    try:
        for module in filter(_trains, _modules(functions)):
            with _LOCK:
                kept.append(_RUNNING.setdefault(id(module), _Kept(module)))
                kept[-1].users += 1
                first = kept[-1].users == 1
            if first:
                kept[-1].warn()
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


class _Kept:
    """A module's buffers, as they were when the first of its users came."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.users = module, 0
        self.buffers = [
            (part, name, buffer, buffer.detach().clone())
            for part in module.modules()
            for name, buffer in part.named_buffers(recurse=False)
            if not nn.parameter.is_lazy(buffer)
        ]

    @torch.no_grad()
    def restore(self) -> None:
        for part, name, buffer, value in self.buffers:
            if getattr(part, name, None) is not buffer and not isinstance(part, torch.jit.ScriptModule):
                part._buffers[name] = buffer
            if not torch.equal(buffer, value):
                buffer.copy_(value)

    def warn(self) -> None:
        parts = list(self.module.modules())
        mixes = sorted({type(part).__name__ for part in parts if _mixes(part)})
        draws = sorted({type(part).__name__ for part in parts if _draws(part)})
        reasons = [f"the images of a batch change each other's scores ({', '.join(mixes)})"] * bool(mixes)
        reasons += [f"scores are random ({', '.join(draws)})"] * bool(draws)
        if reasons:
            warnings.warn(
                f"The model is in training mode: {' and '.join(reasons)}, so the metric depends on the batch size. "
                "Call model.eval() first.",
                UserWarning,
                stacklevel=5,
            )


def _modules(functions: tuple[Any, ...]) -> list[nn.Module]:
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


# ---------------------------------------------------------------------------------------------- scores


def scored(function: Callable[..., Any], target: Target, args: Any, count: int, score: str) -> Evaluate:
    """What gives the scores of masked images, ``(n, 1)``, from the images and the numbers of those they are made of.

    target, args: of the ``count`` images; each masked image gets its image's.  score: "softmax" or "output".

    Raises AssertionError for targets of another number of images.
    """
    each, args = [of_each_image(target, count)], extra_args(args)
    checked = False

    def evaluate(given: Tensor, image: Tensor, numbers: Sequence[int]) -> Tensor:
        nonlocal checked
        output = function(given, *args_of_each_image(args, image, count))
        if not checked:
            check_targets(output, len(given), target, count)
            checked = True
        return image_scores(output, score, each, numbers)

    return evaluate


def check_targets(output: Any, rows: int, target: Target, count: int) -> None:
    """The targets of all ``count`` images by the first output, of ``rows``, so that no error comes late.

    Raises what :func:`select_target` does, and ValueError for a model without classes.
    """
    if not isinstance(output, Tensor) or not output.dim() or len(output) != rows:
        return  # image_scores says what is wrong
    if not output[0].numel():
        raise ValueError(f"The model must give scores, but its output has the shape {tuple(output.shape)}.")
    if target is not None:
        select_target(output[:1].expand(count, *output.shape[1:]), target)


@torch.no_grad()
def predicted(
    function: Callable[..., Any], images: Tensor, args: Any, batch_size: int = 1
) -> list[int] | None:
    """The class with the highest score of each image; None for functions that give one score an image.

    batch_size: images in one forward. Alone, no image is rounded otherwise because of those beside it.

    Raises ValueError for an output that is not ``(N, classes)``.
    """
    found: list[int] = []
    for start in range(0, len(images), batch_size):
        image = torch.arange(start, min(start + batch_size, len(images)), device=images.device)
        given = images[start : start + batch_size].detach().clone(memory_format=memory_format(images))
        classes = best_classes(
            function(given, *args_of_each_image(extra_args(args), image, len(images))), len(image)
        )
        if classes is None:
            return None
        found += classes
    return found


def best_classes(output: Any, count: int) -> list[int] | None:
    """The class of the highest score of each of ``count`` images, see :func:`predicted`."""
    if isinstance(output, Tensor) and output.numel() == count:
        return None
    if not isinstance(output, Tensor) or output.dim() != 2 or len(output) != count or not output.numel():
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"The predicted class needs an output (N, classes), but of {count} images it is {shape}: give target."
        )
    return output.argmax(1).tolist()


def target_record(given: Target, used: Target, count: int) -> dict[str, Any]:
    """Settings ``target``, "given", "predicted" or None where there is none, and ``targets``, that of each image."""
    named = None if used is None else "predicted" if given is None else "given"
    return {"target": named, "targets": _of_each(used, count)}


def _of_each(target: Target, count: int) -> list[Any] | None:
    if target is None:
        return None
    if hasattr(target, "tolist"):
        target = target.tolist()
        target = target[0] if isinstance(target, list) and len(target) == 1 else target
    return list(target) if isinstance(target, list) else [target] * count
