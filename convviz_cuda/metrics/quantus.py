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
from ..checks import check_images, check_int
from ._explain import examples, name_of, recorded, recorded_target
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
        at_once = examples([images], batch_size)
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

    Raises ValueError if the metric gives no number for each image, and whatever it raises itself.
    """
    check_module(model)
    check_images("images", images)
    check_int("seed", seed, 0, 2**32 - 1)
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
