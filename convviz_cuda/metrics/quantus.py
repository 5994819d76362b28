"""An adapter to Quantus (Hedström et al. 2023): it calls our methods, and its metrics take our maps.

Quantus itself is not needed to import this module, nor by :func:`explain_func`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..attr._gradient import EXAMPLES, check_at_once, check_module
from ..checks import check_images
from ._result import Metric

# What Quantus adds to the keyword arguments of every explanation, and no method of ours takes.
OF_QUANTUS = ("device", "method", "softmax")


def explain_func(
    method: Callable[[nn.Module], Any], *, batch_size: int | None = None, **options: Any
) -> Callable[..., np.ndarray]:
    """A function with the call shape of Quantus's ``explain_func`` that explains by one of our methods.

    Args:
        method: gives the method of a model: a class of :mod:`convviz_cuda.attr`, for instance, or a function of the
            model that names layers by their names.
        batch_size: images in one call of the method; None: a number for the device.
        options: passed on to the method's ``attribute``.

    Returns:
        A function ``(model, inputs, targets, **kwargs)`` of a module, images (N, C, H, W) and N classes, both arrays or
        tensors; it gives maps as the method does, (N, C, H, W) or (N, 1, H, W), float32 (float64 of float64 maps). The
        images are given to the method in the dtype and on the device of the model's parameters. Its ``kwargs`` (what
        stands in ``explain_func_kwargs``) go to ``attribute`` too, without ``device``, ``method`` and ``softmax``.

    Raises TypeError for what is not callable.
    """
    if not callable(method):
        raise TypeError(
            f"method must make a method of a model, a class of attribution methods for instance, but it is {method!r}."
        )
    check_at_once("batch_size", batch_size)

    def explain(model: nn.Module, inputs: Any, targets: Any, **kwargs: Any) -> np.ndarray:
        check_module(model)
        like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
        images = torch.as_tensor(inputs).detach().to(like.device, like.dtype)
        classes = None if targets is None else torch.as_tensor(targets).flatten().tolist()
        if classes is not None and len(classes) != len(images):
            raise ValueError(
                f"targets must name a class for each of {len(images)} images, but it has {len(classes)}."
            )
        explained = method(model)
        given = {**options, **{name: value for name, value in kwargs.items() if name not in OF_QUANTUS}}
        at_once = batch_size or EXAMPLES.get(images.device.type, EXAMPLES["cuda"])
        parts = []
        # An empty batch goes through too: it is the method that knows the maps' shape.
        for start in range(0, max(1, len(images)), at_once):
            target = None if classes is None else [int(c) for c in classes[start : start + at_once]]
            found = getattr(explained, "attribute", explained)(
                images[start : start + at_once], target=target, **given
            )
            parts.append(found.detach().to(torch.promote_types(found.dtype, torch.float32)).cpu())
        return torch.cat(parts).numpy()

    return explain


def quantus_metric(
    metric: Any,
    model: nn.Module,
    images: Tensor,
    maps: Tensor | None,
    target: Any,
    *,
    masks: Tensor | None = None,
    method: Callable[[nn.Module], Any] | None = None,
    seed: int = 0,
    **kwargs: Any,
) -> Metric:
    """What a Quantus metric says about our maps.

    Args:
        metric: a metric of Quantus, an object that is called with ``model``, ``x_batch``, ``y_batch``, ``a_batch``,
            ...; with ``return_aggregate=False``, because there has to be a value for each image.
        model: the classifier. Its modes, gradients and values are as before afterwards.
        images: (N, C, H, W), float.
        maps: (N, C, H, W), (N, 1, H, W) or (N, H, W); None: the metric explains itself, by ``method``.
        target: an int or N classes.
        masks: (N, H, W), bool: where the objects are, for metrics of localisation.
        method: as of :func:`explain_func`, for metrics that explain other images too.
        seed: of NumPy's global generator, which Quantus draws from: it is seeded for the call, and restored.
        kwargs: passed on to the metric's call (``explain_func_kwargs``, ``softmax``, ``batch_size``, ...).

    Returns:
        A :class:`Metric` named as the metric's class.

    Raises ValueError if the metric gives no number for each image, and whatever it raises itself.
    """
    check_module(model)
    check_images("images", images)
    classes = torch.as_tensor(target).flatten()
    classes = classes.expand(len(images)) if classes.numel() == 1 else classes
    if len(classes) != len(images):
        raise ValueError(
            f"target must name a class for each of {len(images)} images, but it has {len(classes)}."
        )
    given: dict[str, Any] = {
        "a_batch": None,
        "s_batch": None,
        "channel_first": True,
        "device": str(images.device),
    }
    if maps is not None:
        wide = maps[:, None] if maps.dim() == 3 else maps
        given["a_batch"] = _array(wide)
    if masks is not None:
        given["s_batch"] = _array(masks[:, None] if masks.dim() == 3 else masks)
    if method is not None:
        given["explain_func"] = explain_func(method)
    given.update(kwargs)
    with _untouched(model), _numpy_seeded(seed):
        scores = metric(model=model, x_batch=_array(images), y_batch=classes.cpu().numpy(), **given)
    try:
        values = torch.as_tensor(np.asarray(scores, dtype=np.float64)).flatten()
    except (TypeError, ValueError):
        values = torch.zeros(0)
    if len(values) != len(images):
        found = repr(scores)[:200]
        raise ValueError(
            f"{type(metric).__name__} must give a number for each of {len(images)} images, but it gave {found}. "
            "Ask it for scores per sample, without an aggregate."
        )
    settings = {
        "library": "quantus",
        "target": classes.tolist(),
        "seed": int(seed),
        "metric": {name: _plain(value) for name, value in sorted(vars(metric).items()) if _recorded(name)},
        "arguments": {name: _plain(value) for name, value in kwargs.items()},
        "method": getattr(method, "__qualname__", None),
    }
    return Metric(type(metric).__name__, values, settings)


def _array(tensor: Tensor) -> np.ndarray:
    """A copy, because Quantus normalises in place."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor).numpy().copy()


def _recorded(name: str) -> bool:
    return not name.startswith("_") and not name.endswith("evaluation_scores") and name != "explain_func"


def _plain(value: Any) -> Any:
    if isinstance(value, str | int | float | bool | type(None)):
        return value
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {str(name): _plain(one) for name, one in value.items()}
    return getattr(value, "__name__", type(value).__name__)


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Modes and gradients of a model stay as they were."""
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(p, p.grad) for p in model.parameters()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, gradient in gradients:
            parameter.grad = gradient


@contextlib.contextmanager
def _numpy_seeded(seed: int) -> Iterator[None]:
    state = np.random.get_state()
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        np.random.set_state(state)
