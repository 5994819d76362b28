"""An adapter to Quantus (Hedström et al. 2023): it calls our methods, and its metrics take our maps.

Quantus itself is not needed to import this module, nor by :func:`explain_func`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..attr._gradient import check_at_once, check_module
from ..checks import check_images, check_int, check_tensor
from ._explain import examples, explained, name_of, recorded, recorded_target
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

    Raises TypeError for what is not callable. The function raises AssertionError for targets that are no ints,
    ValueError for another number of them, and TypeError or ValueError if the method does not return maps of floats.
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
        classes = None if targets is None else _classes("targets", targets, len(images)).tolist()
        of_model = method(model)
        given = {**options, **{name: value for name, value in kwargs.items() if name not in OF_QUANTUS}}
        at_once = examples([images], batch_size)
        parts = []
        # An empty batch goes through too: it is the method that knows the maps' shape.
        for start in range(0, max(1, len(images)), at_once):
            target = None if classes is None else classes[start : start + at_once]
            found = explained(of_model, images[start : start + at_once], {"target": target, **given})
            parts.append(found.to(torch.promote_types(found.dtype, torch.float32)).cpu())
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
        model: the classifier. The metric gets a copy, so that whatever it does to modes, gradients and weights stays
            its own.
        images: (N, C, H, W), float.
        maps: (N, C, H, W), (N, 1, H, W) or (N, H, W); None: the metric explains itself, by ``method``.
        target: an int or N classes.
        masks: (N, H, W), bool: where the objects are, for metrics of localisation.
        method: as of :func:`explain_func`, for metrics that explain other images too.
        seed: of the global generators of NumPy and PyTorch, which Quantus draws from: both are seeded for the call,
            and restored.
        kwargs: passed on to the metric's call (``explain_func_kwargs``, ``softmax``, ``batch_size``, ...).

    Returns:
        A :class:`Metric` named as the metric's class.

    Raises AssertionError for a target that is neither an int nor ints, TypeError or ValueError for other arguments that
    make no sense and if the metric gives no number for each image, and whatever it raises itself.
    """
    check_module(model)
    check_images("images", images)
    check_int("seed", seed, 0, 2**32 - 1)
    if isinstance(metric, type) or not callable(metric):
        raise TypeError(f"metric must be an object that can be called, but it is {metric!r}.")
    if maps is None and method is None and "explain_func" not in kwargs:
        raise ValueError("maps=None needs method, by which the metric explains itself.")
    classes = _classes("target", target, len(images), one_for_all=True)
    given: dict[str, Any] = {
        "a_batch": None,
        "s_batch": None,
        "channel_first": True,
        "device": str(images.device),
    }
    if maps is not None:
        given["a_batch"] = _with_channels("maps", maps, len(images))
    if masks is not None:
        given["s_batch"] = _with_channels("masks", masks, len(images))
    if method is not None:
        given["explain_func"] = explain_func(method)
    given.update(kwargs)
    # A copy: metrics call backward(), switch modes and write weights.
    given["model"] = copy.deepcopy(model)
    with _seeded(seed, images.device):
        scores = metric(x_batch=_array(images), y_batch=classes.cpu().numpy(), **given)
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
        **recorded_target(classes, len(images)),
        "seed": int(seed),
        "metric": recorded(
            {name: value for name, value in sorted(vars(metric).items()) if _is_setting(name)}
        ),
        "arguments": recorded(kwargs),
        "method": None if method is None else name_of(method),
    }
    return Metric(type(metric).__name__, values, settings)


def _classes(name: str, target: Any, count: int, one_for_all: bool = False) -> Tensor:
    """A class of each image, (N,) int64; AssertionError, as of the methods, for what names none."""
    try:
        classes = torch.as_tensor(target).flatten()
        whole = not classes.numel() or not (
            classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool
        )
    except (TypeError, ValueError, RuntimeError):
        whole = False
    assert whole, f"{name} must be an int or ints, but it is {target!r:.200}."
    if one_for_all and classes.numel() == 1:
        classes = classes.expand(count)
    if len(classes) != count:
        raise ValueError(f"{name} must name a class for each of {count} images, but it has {len(classes)}.")
    return classes.long()


def _with_channels(name: str, tensor: Tensor, count: int) -> np.ndarray:
    check_tensor(name, tensor)
    if tensor.dim() not in (3, 4) or len(tensor) != count:
        raise ValueError(
            f"{name} must have the shape (N, H, W) or (N, C, H, W) with {count} images, but it has the shape "
            f"{tuple(tensor.shape)}."
        )
    return _array(tensor[:, None] if tensor.dim() == 3 else tensor)


def _array(tensor: Tensor) -> np.ndarray:
    """A copy, because Quantus normalises in place."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor).numpy().copy()


def _is_setting(name: str) -> bool:
    return not name.startswith("_") and not name.endswith("evaluation_scores") and name != "explain_func"


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """The global generators of NumPy and PyTorch, which Quantus draws from and seeds, are put back afterwards."""
    state = np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            np.random.set_state(state)
