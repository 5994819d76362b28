"""Maps of any method for some images at a time, brought to the images' size, and what the record says of it."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attr._gradient import EXAMPLES
from ..attr._inputs import Target, extra_args
from ..attr._masked import INPUT_BYTES
from ..attr._masked_images import args_of_each_image, of_each_image
from ._curves import described
from ._evaluated import predicted as best
from ._evaluated import target_record


class Explainer:
    """What calls a method for the images of some numbers.

    method: an object with ``attribute(inputs, target=..., ...)`` or a function called so.
    target, additional_forward_args: of all images; those of the numbers asked for go with them, and are left out where
    they are None.
    kwargs: passed on as they are.
    size: of the images; maps of another one are upsampled bilinearly, which :attr:`record` says.
    """

    def __init__(
        self, target: Target, additional_forward_args: Any, kwargs: dict[str, Any], count: int, size: Any
    ) -> None:
        self.each, self.none = of_each_image(target, count), target is None
        self.args, self.kwargs, self.count, self.size = additional_forward_args, kwargs, count, tuple(size)
        self.record: dict[str, Any] = {"resize": None, "map_size": list(self.size)}

    def __call__(self, method: Any, images: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """(n, H, W) float64 twice: the channels' sum, and the sum of their magnitudes; of images from ``start`` on."""
        numbers = range(start, start + len(images))
        given = dict(self.kwargs)
        if not self.none:
            given["target"] = self.each(numbers)
        if self.args is not None:
            image = torch.arange(numbers.start, numbers.stop)
            given["additional_forward_args"] = args_of_each_image(extra_args(self.args), image, self.count)
        maps = explained(method, images, given).double()
        if tuple(maps.shape[2:]) != self.size:
            self.record = {"resize": "bilinear", "map_size": list(maps.shape[2:])}
            maps = F.interpolate(maps, self.size, mode="bilinear", align_corners=False)
        return maps.sum(1), maps.abs().sum(1)


def explained(method: Any, images: Tensor, given: dict[str, Any]) -> Tensor:
    """A method's maps (N, C, H, W), detached; it gets a copy of the images, which it may write on.

    Raises TypeError and ValueError for a result that is none.
    """
    found = getattr(method, "attribute", method)(images.clone(), **given)
    found = found[0] if isinstance(found, tuple) and len(found) == 1 else found
    if not isinstance(found, Tensor) or not found.is_floating_point():
        kind = found.dtype if isinstance(found, Tensor) else type(found).__name__
        raise TypeError(f"The method must return a tensor of floats, but it returned {kind}.")
    if found.dim() == 3:
        found = found[:, None]
    if found.dim() != 4 or len(found) != len(images):
        raise ValueError(
            f"The method must return maps (N, C, H, W) or (N, H, W) of {len(images)} images, but its result has "
            f"the shape {tuple(found.shape)}."
        )
    return found.detach()


def check_method(name: str, method: Any) -> None:
    if not callable(getattr(method, "attribute", method)):
        raise TypeError(f"{name} must be callable or have a method attribute, but it is {method!r}.")


def examples(tensors: Sequence[Tensor], given: int | None = None) -> int:
    """How many examples go through a method at once: what the device takes well, of large ones fewer."""
    device = tensors[0].device.type
    each = max(1, sum(x.nbytes for x in tensors) // max(1, len(tensors[0])))
    most = INPUT_BYTES.get(device, INPUT_BYTES["cuda"]) // each
    return given or max(1, min(EXAMPLES.get(device, EXAMPLES["cuda"]), most))


def name_of(function: Any) -> str:
    """The qualified name of a function, a class, or the method of an object."""
    owner = getattr(function, "__self__", None)
    if owner is not None and not isinstance(owner, type):
        return f"{type(owner).__qualname__}.{function.__name__}"
    return getattr(function, "__qualname__", type(function).__qualname__)


def recorded(value: Any) -> Any:
    """An argument for the record, as plain values: a tensor by its shape and a digest, an object by its name."""
    if isinstance(value, str | bool | type(None)):
        return value
    if isinstance(value, Tensor):
        return described(value) if value.dim() else value.item()
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, list | tuple):
        return [recorded(one) for one in value]
    if isinstance(value, Mapping):
        return {str(name): recorded(one) for name, one in value.items()}
    if hasattr(value, "__array__") and not isinstance(value, nn.Module):
        return described(torch.as_tensor(value))
    return name_of(value)


def recorded_target(target: Target, count: int) -> dict[str, Any]:
    """Whether targets were given, and those of each image."""
    return target_record(target, target, count)


def predicted(model: Callable[..., Any], images: Tensor, args: Any, batch_size: int) -> list[int]:
    """The class of the largest score of each image."""
    classes = best(model, images, args, batch_size)
    if classes is None:
        raise ValueError("target=None needs a model that gives class scores (N, classes): name the target.")
    return classes
