"""How a class's score changes when only what a map marks is shown: average drop, increase and win rate.

Source: Chattopadhyay, Sarkar, Howlader & Balasubramanian, "Grad-CAM++" (WACV 2018), section 4.1: the explanation map
times the image, and the model's confidence in the class for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .._chunks import Chunks
from .._evaluated import evaluated
from ..attr._inputs import Target, extra_args
from ..attr._masked import EXAMPLES, INPUT_BYTES
from ..attr._masked_images import args_of_each_image, image_scores, of_each_image
from ..attr.rise import Score
from ..progress import Progress
from ..results import Result
from ._curves import check_evaluation, check_model_and_images
from ._evaluated import best_classes, check_targets, target_record
from ._presets import check_preset
from ._result import Metric, check_maps

NORMALISE = (None, "minmax", "max")
PRESETS = {"gradcampp2018": {"score": "softmax", "normalise": "max"}}


def normalised(maps: Tensor, how: str | None) -> Tensor:
    """Maps (N, H, W) brought to [0, 1], each by itself.

    how: "minmax": less the map's minimum, divided by what is then its maximum; "max": what is below 0 becomes 0,
    divided by the maximum; None: as they are. A map that leaves nothing above 0 becomes 0.
    """
    if how not in NORMALISE:
        raise ValueError(f"normalise must be one of {', '.join(map(repr, NORMALISE))}, but it is {how!r}.")
    if how is None or not maps.numel():
        return maps
    if how == "minmax":
        largest = maps.abs().amax((1, 2), keepdim=True)
        maps = torch.where(largest > 0, maps / largest, 0)  # or maximum less minimum may overflow
        maps = maps - maps.amin((1, 2), keepdim=True)
    else:
        maps = maps.clamp(min=0)
    largest = maps.amax((1, 2), keepdim=True)
    return torch.where(largest > 0, maps / largest, 0)


@dataclasses.dataclass
class Confidence(Result):
    """The scores of N images, and of the same images times the maps of some methods.

    full: (N,) float64 on the CPU, of the whole images.  masked: for each method (N,), of its map times the image.
    settings: what the scores depend on, with the class of each image.
    """

    name: str
    full: Tensor
    masked: dict[str, Tensor]
    settings: dict[str, Any]

    @property
    def targets(self) -> list[Any] | None:
        """The class whose score it is, of each image; None where an image has one score only."""
        return self.settings["targets"]

    def average_drop(self, method: str) -> Metric:
        """``100 * max(0, Y - O) / Y`` of each image; see :func:`average_drop`."""
        fall = (self.full - self.masked[method]).clamp(min=0)
        values = torch.where(self.full > 0, 100 * fall / self.full, torch.nan)
        return Metric("average_drop", values, {"method": method, **self.settings})

    def increase(self, method: str) -> Metric:
        """``100 * [Y < O]`` of each image; see :func:`increase_in_confidence`."""
        values = self._share(self.full < self.masked[method], method)
        return Metric("increase_in_confidence", values, {"method": method, **self.settings})

    def win_rate(self, method: str, other: str) -> Metric:
        """100 where the score falls less under ``method`` than under ``other``, else 0; see :func:`win_rate`."""
        values = self._share(self.masked[method] > self.masked[other], method, other)
        return Metric(
            "win_rate", values, {"method": method, "against": other, **self.settings, "ties": "no win"}
        )

    def _share(self, holds: Tensor, *methods: str) -> Tensor:
        defined = torch.stack([self.full, *(self.masked[name] for name in methods)]).isfinite().all(0)
        return torch.where(defined, 100 * holds.double(), torch.nan)


@torch.no_grad()
def confidence(
    model: Callable[..., Any],
    images: Tensor,
    maps: Mapping[str, Tensor],
    target: Target = None,
    additional_forward_args: Any = None,
    *,
    score: Score = "softmax",
    normalise: str | None = "max",
    resize: str | None = None,
    preset: str | None = None,
    batch_size: int | None = None,
    show_progress: bool = False,
) -> Confidence:
    """The scores of images and of the images times each method's maps, in one pass: what the three metrics share.

    Args:
        model: a model or any callable that takes images (N, C, H, W) and returns scores (N, classes). It runs as it is;
            an example's score must depend on it alone. Batch norm and dropout in training mode are warned about
            (UserWarning); a module's buffers stay what they were, and so does PyTorch's random state, unless it is
            compiled.
        images: (N, C, H, W), float.
        maps: for each method's name its maps, (N, H, W) or (N, 1, H, W), of any sign.
        target: the class of each image, with the attribution methods' meanings; None is the class of the largest score
            of the whole image.
        additional_forward_args: passed on behind the images; tensors with a row for each image go with them.
        score: "softmax", the class's probability, or "output", the model's output as it is: for a model that ends in
            probabilities. Of logits the metrics are not those of the paper.
        normalise: how each map is brought to [0, 1]: "max" (default): negative values become 0, then divided by the
            maximum, as the paper's authors do; "minmax": less the minimum, then divided by the maximum, so that a map
            with negative values shows much where it says nothing, and a constant map shows nothing; None: as it is.
        resize: how maps of another size are brought to the images': "bilinear" or "nearest"; None: they are refused.
        preset: "gradcampp2018": softmax, max.
        batch_size: images in one forward; None: as many as suit the device, its memory too. The result depends on it
            only as far as the model's rounding does.
        show_progress: count the images on stderr, with the time left.

    What is hidden becomes 0, in the space of the model's input: for a normalised input that is the mean colour, not
    black.

    Raises TypeError or ValueError for images, maps and settings that do not fit, or a preset that other settings
    contradict; AssertionError and IndexError for targets that do not fit the output.
    """
    images = check_model_and_images(model, images)
    settings = _settings(preset, score=score, normalise=normalise, resize=resize)
    check_evaluation(score, batch_size, None)
    if not isinstance(maps, Mapping):
        raise TypeError(f"maps must be a dict from methods' names to maps, but it is {type(maps).__name__}.")
    if not maps:
        raise ValueError("maps must hold the maps of at least one method, but it is empty.")
    count, size = len(images), tuple(images.shape[2:])
    masks = {name: check_maps(one, size, count, resize) for name, one in maps.items()}
    args, each = extra_args(additional_forward_args), of_each_image(target, count)
    found = torch.zeros((1 + len(masks), count), dtype=torch.float64)
    classes: list[int] | None = []

    def scores(run: Callable[..., Any], start: int, stop: int) -> tuple[Tensor, list[int] | None]:
        """(1 + methods, n) of the whole images and of each method's, and the classes predicted for the former."""
        numbers, x = range(start, stop), images[start:stop]
        given, which = args_of_each_image(args, torch.arange(start, stop), count), each
        output = run(x.clone(), *given)  # a clone, because a model may change its input in place
        if not start:
            check_targets(output, len(x), target, count)
        best = best_classes(output, len(x)) if target is None else None
        if best is not None:
            which = lambda _: best  # noqa: E731
        found = [image_scores(output, score, [which], numbers)]
        for mask in masks.values():
            shown = x * normalised(mask[start:stop], normalise)[:, None].to(x.device)
            found.append(image_scores(run(shown.to(x.dtype), *given), score, [which], numbers))
        return torch.stack([each[:, 0].double().cpu() for each in found]), best

    device = images.device.type
    at_once = batch_size or min(
        EXAMPLES.get(device, EXAMPLES["cuda"]),
        max(1, INPUT_BYTES.get(device, INPUT_BYTES["cuda"]) // max(1, images[:1].nbytes)),
    )
    chunks = Chunks(count, at_once, batch_size is not None)
    with evaluated(model) as run, Progress(found.numel(), "images", show_progress, "confidence") as progress:
        for start, stop in chunks:
            with chunks:
                found[:, start:stop], best = scores(run, start, stop)
            if chunks.failed:
                continue
            classes = None if best is None or classes is None else classes + best
            progress.advance((stop - start) * len(found))
    settings |= target_record(target, classes if target is None else target, count)
    return Confidence("confidence", found[0], dict(zip(masks, found[1:], strict=True)), settings)


def average_drop(
    model: Callable[..., Any], images: Tensor, maps: Tensor, target: Target = None, *args: Any, **kwargs: Any
) -> Metric:
    """By how many percent the score falls when each pixel is shown as far as the map marks it: less is better.

    ``100 * max(0, Y - O) / Y`` of each image, with Y the score of the image and O that of the map times the image; the
    published number is the mean. Arguments as of :func:`confidence`, ``maps`` of one method. NaN where Y is not above
    0, which a probability is.
    """
    return confidence(model, images, {"maps": maps}, target, *args, **kwargs).average_drop("maps")


def increase_in_confidence(
    model: Callable[..., Any], images: Tensor, maps: Tensor, target: Target = None, *args: Any, **kwargs: Any
) -> Metric:
    """100 where the map times the image has a higher score than the image, else 0: the mean is a percentage.

    Arguments as of :func:`confidence`, ``maps`` of one method.
    """
    return confidence(model, images, {"maps": maps}, target, *args, **kwargs).increase("maps")


def win_rate(
    model: Callable[..., Any],
    images: Tensor,
    maps_a: Tensor,
    maps_b: Tensor,
    target: Target = None,
    *args: Any,
    **kwargs: Any,
) -> Metric:
    """100 where the score falls less under the maps ``a`` than under ``b``, else 0: the mean is a percentage.

    A rise counts as a negative fall, so of two rises the larger wins. A tie is nobody's win: the rates of a against b
    and of b against a may add up to less than 100. Other arguments as of :func:`confidence`.
    """
    return confidence(model, images, {"a": maps_a, "b": maps_b}, target, *args, **kwargs).win_rate("a", "b")


def _settings(preset: str | None, **given: Any) -> dict[str, Any]:
    if given["score"] not in ("softmax", "output"):
        raise ValueError(f"score must be 'softmax' or 'output', but it is {given['score']!r}.")
    if given["normalise"] not in NORMALISE:
        raise ValueError(
            f"normalise must be one of {', '.join(map(repr, NORMALISE))}, but it is {given['normalise']!r}."
        )
    check_preset(preset, PRESETS, given)
    return {**given, "fill": 0.0, "preset": preset}
