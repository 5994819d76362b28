"""The caller's model in a metric: its scores and the classes that it predicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..attr._inputs import Target, extra_args, select_target
from ..attr._masked import memory_format
from ..attr._masked_images import Evaluate, args_of_each_image, image_scores, of_each_image


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
