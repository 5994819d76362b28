"""Whether maps point at the object: the pointing games, boxes and their overlap.

Boxes are ``(x0, y0, x1, y1)`` in pixels, half open: a pixel belongs to a box if its centre lies inside, and the area is
``(x1 - x0) * (y1 - y0)``, without the devkits' additional pixel.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import check_real
from ._presets import check_preset
from ._result import Metric, check_maps
from .confidence import NORMALISE, normalised

Truth = Tensor | Sequence[Tensor] | Sequence[Sequence[float]] | Sequence[Sequence[Sequence[float]]]
PRESETS = {"ebp2016": {"tolerance": 15, "per_class": True}}


@dataclasses.dataclass
class PointingGame(Metric):
    """Hits (1.0) and misses (0.0) of each image.

    labels: the images' classes, if they were given.  per_class: the accuracy of each class; its mean over the classes
    is :attr:`mean` then, else that over the images.
    """

    labels: list[Any] | None = None
    per_class: dict[Any, float] | None = None

    @property
    def mean(self) -> float:
        """The accuracy: mean over the classes of each one's share of hits where labels were given, else over images."""
        if self.per_class is None:
            return super().mean
        return sum(self.per_class.values()) / len(self.per_class) if self.per_class else math.nan


def pointing_game(
    maps: Tensor,
    truth: Truth,
    tolerance: float = 15,
    labels: Sequence[Any] | Tensor | None = None,
    *,
    preset: str | None = None,
) -> PointingGame:
    """Whether each map's maximum lies on the object or at most ``tolerance`` pixels from it.

    Source: Zhang, Lin, Brandt, Shen & Sclaroff, "Top-down neural attention by excitation backprop" (ECCV 2016), section
    4.1. The distance is Euclidean, from the pixel of the maximum to the nearest pixel of the object; exactly at the
    tolerance is a hit.

    Args:
        maps: (N, H, W) or (N, 1, H, W), float.
        truth: where the objects are: masks (N, H, W), bool, one for each image; boxes (N, 4), a tensor or a list; or N
            tensors or lists of boxes, (K, 4) each, for images with several objects of the class.
        tolerance: in pixels, at least 0.
        labels: the class of each image: the accuracy is taken per class then, and its mean over the classes.
        preset: "ebp2016": 15 pixels and accuracy per class, so that labels are needed.

    Where several pixels share the maximum, all of them must be hits: none is preferred, so neither the order of the
    pixels nor luck decides. A constant map points nowhere: it is a miss.

    Raises ValueError for an object without a pixel inside the image, TypeError or ValueError for what does not fit.
    """
    check_preset(preset, PRESETS, {"tolerance": tolerance, "per_class": labels is not None})
    check_real("tolerance", tolerance)
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance must be at least 0 and finite, but it is {tolerance!r}.")
    maps, masks = _maps_and_masks(maps, truth)
    classes = None if labels is None else _labels(labels, len(maps))
    near = _within(masks, tolerance)
    flat = maps.flatten(1)
    if len(flat):
        largest = flat.amax(1, keepdim=True)
        hits = ((flat < largest) | near.flatten(1)).all(1) & (flat < largest).any(1)
    else:
        hits = flat.new_zeros(0)
    values = hits.double().cpu()
    per_class = None
    if classes is not None:
        per_class = {
            label: float(values[[i for i, other in enumerate(classes) if other == label]].mean())
            for label in sorted(set(classes), key=str)
        }
    settings = {
        "tolerance": tolerance,
        "distance": "euclidean, inclusive",
        "ties": "all must hit",
        "constant": "miss",
        "per_class": classes is not None,
        "preset": preset,
    }
    return PointingGame("pointing_game", values, settings, classes, per_class)


def energy_pointing_game(maps: Tensor, truth: Truth) -> Metric:
    """The share of each map's positive energy that lies on the object: the sum inside divided by the sum.

    Source: Wang et al., "Score-CAM" (CVPR Workshops 2020), section 4.3. Values below 0 count as 0. A constant positive
    map gets the object's share of the image; a map without anything positive has no share: NaN.

    Args:
        maps, truth: as of :func:`pointing_game`.

    Raises ValueError for an object without a pixel inside the image, TypeError or ValueError for what does not fit.
    """
    maps, masks = _maps_and_masks(maps, truth)
    energy = normalised(maps.double(), "max")  # or the sum may overflow
    values = (energy * masks).sum((1, 2)) / energy.sum((1, 2))  # 0 / 0 is NaN
    return Metric("energy_pointing_game", values.cpu(), {"energy": "positive part"})


def loc_delta(maps: Tensor, truth: Truth, delta: float = 0.0, *, normalise: str | None = "max") -> Metric:
    """Loc(delta) of Grad-CAM++: pixels inside the box, divided by the box's area plus the pixels outside.

    Source: Chattopadhyay et al., "Grad-CAM++" (WACV 2018), section 4.3; the paper has delta 0, 0.25 and 0.5. A map's
    pixels are those of at least ``delta`` that are above 0, after it was brought to [0, 1]. 1 is a map whose pixels are
    exactly the box.

    Args:
        maps, truth: as of :func:`pointing_game`. Of a box only what lies inside the image counts.
        delta: from 0 to 1.
        normalise: "max" (negative values become 0, divided by the maximum), "minmax", as the paper says of its maps,
            which are not negative, or None. Where a map's minimum is not 0, the two select different pixels.

    Raises ValueError for an object without a pixel inside the image, TypeError or ValueError for what does not fit.
    """
    _check_share("delta", delta)
    if normalise not in NORMALISE:
        raise ValueError(
            f"normalise must be one of {', '.join(map(repr, NORMALISE))}, but it is {normalise!r}."
        )
    maps, masks = _maps_and_masks(maps, truth)
    maps = normalised(maps, normalise)
    marked = (maps >= delta) & (maps > 0)
    inside, outside = ((marked & where).sum((1, 2)).double() for where in (masks, ~masks))
    values = inside / (masks.sum((1, 2)) + outside)
    return Metric("loc_delta", values.cpu(), {"delta": float(delta), "normalise": normalise})


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes (..., 4), which broadcast: float64 (...).

    Boxes of two lists are compared in pairs; ``box_iou(a[:, None], b)`` compares each with each. Boxes that only touch
    share nothing: 0. A box without area has 0 with any.

    Raises TypeError for what are no tensors of numbers, ValueError for another shape, boxes that end before they begin,
    NaN and infinite ones.
    """
    a, b = _boxes("a", a), _boxes("b", b)
    try:
        a, b = torch.broadcast_tensors(a, b.to(a.device))
    except RuntimeError:
        raise ValueError(
            f"The boxes must broadcast, but their shapes are {tuple(a.shape)} and {tuple(b.shape)}."
        ) from None
    # Areas of such boxes would overflow; a power of two rounds nothing.
    large = torch.maximum(a.abs(), b.abs()).amax(-1, keepdim=True) > 2.0**500
    a, b = (torch.where(large, one * 2.0**-600, one) for one in (a, b))
    shared = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    overlap, areas = shared.prod(-1), [(one[..., 2:] - one[..., :2]).prod(-1) for one in (a, b)]
    union = areas[0] + areas[1] - overlap
    return torch.where(union > 0, overlap / union, 0.0)


@dataclasses.dataclass
class LocalizationAccuracy(Metric):
    """Hits (1.0) and misses (0.0) of each image.

    iou: (N,) float64 on the CPU, the intersection over union with the object that fits best.
    """

    iou: Tensor


def localization_accuracy(
    predicted: Any, truth: Truth, threshold: float = 0.5, *, rule: Any = "gradcam15"
) -> LocalizationAccuracy:
    """1.0 where the box found for an image and the object's have an intersection over union of at least ``threshold``.

    Source: the localisation task of ILSVRC (Russakovsky et al. 2015), for a box of a given class. Of several objects
    the one that fits best counts.

    Args:
        predicted: boxes (N, 4), a tensor or a list; what :func:`convviz_cuda.localization.localize` gave; or maps
            (N, H, W) or (N, 1, H, W), which it is called with. A box without area, which a map without anything
            positive gives, is a miss.
        truth: boxes (N, 4), or N lists or tensors of boxes (K, 4).
        threshold: from 0 to 1.
        rule: how a map becomes a box, if maps are given: "gradcam15", "cam20" or a share of the maximum. A graph cut
            needs the images: call ``localize`` with them.

    Raises ValueError for an object's box without area or an image without one, and for shares not from 0 to 1;
    TypeError for what are no boxes; ImportError for maps where SciPy is not installed.
    """
    _check_share("threshold", threshold)
    settings: dict[str, Any] = {"threshold": float(threshold), "localization": "given boxes"}
    if isinstance(predicted, Tensor) and predicted.dim() > 2:
        from ..localization import localize  # which imports this package

        predicted = localize(predicted, rule)
    if not isinstance(predicted, Tensor) and isinstance(getattr(predicted, "boxes", None), Tensor):
        settings["localization"] = dict(predicted.settings)
        predicted = predicted.boxes
    found = _boxes("predicted", _tensor("predicted", predicted))
    if found.dim() != 2:
        raise ValueError(f"predicted must be boxes (N, 4) or maps, but its shape is {tuple(found.shape)}.")
    objects = _objects(truth, len(found))
    best = [float(box_iou(box, each.to(box.device)).amax()) for box, each in zip(found, objects, strict=True)]
    iou = torch.tensor(best, dtype=torch.float64)
    hits = (iou >= threshold) & (found[:, 2:] > found[:, :2]).all(1).cpu()
    return LocalizationAccuracy("localization_accuracy", hits.double(), settings, iou)


# ------------------------------------------------------------------------------------------------------------


def _size(maps: Any) -> tuple[int, ...]:
    return tuple(maps.shape[-2:]) if isinstance(maps, Tensor) else (0, 0)


def _maps_and_masks(maps: Any, truth: Any) -> tuple[Tensor, Tensor]:
    """The maps (N, H, W) and where the objects are, bool (N, H, W) on the maps' device, none empty."""
    maps = check_maps(maps, _size(maps))
    size, count = tuple(maps.shape[1:]), len(maps)
    if isinstance(truth, Tensor) and truth.dim() in (3, 4):
        if truth.dtype != torch.bool:
            raise TypeError(
                f"truth must be bool masks, boxes (N, 4), or a list of boxes (K, 4), but it is {truth.dtype} in the "
                f"shape {tuple(truth.shape)}."
            )
        masks = truth[:, 0] if truth.dim() == 4 and truth.shape[1] == 1 else truth
        if tuple(masks.shape) != tuple(maps.shape):
            raise ValueError(
                f"Masks must have the maps' shape {tuple(maps.shape)}, but it is {tuple(truth.shape)}."
            )
        masks = masks.to(maps.device)
    else:
        masks = torch.zeros(maps.shape, dtype=torch.bool, device=maps.device)
        y, x = (torch.arange(n, device=maps.device) + 0.5 for n in size)
        for mask, boxes in zip(masks, _objects(truth, count), strict=True):
            for x0, y0, x1, y1 in boxes.tolist():
                mask |= ((y >= y0) & (y < y1))[:, None] & ((x >= x0) & (x < x1))
    empty = (~masks.flatten(1).any(1)).nonzero()[:, 0].tolist() if masks.numel() else list(range(count))
    if empty:
        raise ValueError(
            f"An object must have a pixel inside the image, but there is none in the truth of image {empty[0]}"
            + (f" and of {len(empty) - 1} others." if empty[1:] else ".")
        )
    return maps, masks


def _tensor(name: str, boxes: Any) -> Any:
    """Lists and arrays of boxes as a tensor; what is neither stays as it is."""
    if not isinstance(boxes, list | tuple | np.ndarray):
        return boxes
    rows = [each.tolist() if isinstance(each, Tensor) else each for each in boxes]
    try:
        return torch.tensor(np.asarray(rows, dtype=np.float64)) if len(rows) else torch.zeros(0, 4)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must hold boxes of four numbers, but it is {boxes!r}.") from None


def _boxes(name: str, boxes: Any) -> Tensor:
    """Boxes as float64 (..., 4)."""
    if not isinstance(boxes, Tensor) or boxes.is_complex() or boxes.dtype == torch.bool:
        kind = boxes.dtype if isinstance(boxes, Tensor) else type(boxes).__name__
        raise TypeError(f"{name} must be a tensor of numbers, but it is {kind}.")
    if not boxes.dim() or boxes.shape[-1] != 4:
        raise ValueError(f"{name} must hold boxes (..., 4), but its shape is {tuple(boxes.shape)}.")
    boxes = boxes.detach().double()
    wrong = (~torch.isfinite(boxes)).any(-1) | (boxes[..., 2:] < boxes[..., :2]).any(-1)
    if bool(wrong.any()):
        raise ValueError(
            f"{name} must hold finite boxes (x0, y0, x1, y1) that end where they begin or later, but one is "
            f"{boxes[wrong][0].tolist()}."
        )
    return boxes


def _objects(truth: Any, count: int) -> list[Tensor]:
    """For each image its objects' boxes (K, 4), float64, K at least 1, each with an area."""
    many = isinstance(truth, Tensor | Sequence | np.ndarray) and not isinstance(truth, str)
    if not many or getattr(truth, "ndim", 1) == 0:
        raise TypeError(f"truth must be a tensor or a list of boxes, or bool masks, but it is {truth!r}.")
    every = truth if isinstance(truth, Tensor) else list(truth)
    if len(every) != count:
        raise ValueError(f"truth must hold the objects of each of {count} images, but it holds {len(every)}.")
    if isinstance(every, Tensor) and every.dim() != 2:
        raise ValueError(
            f"truth must hold a box (N, 4) for each image, but its shape is {tuple(every.shape)}."
        )
    objects = [_boxes("truth", _tensor("truth", each)) for each in every]
    objects = [each[None] if each.dim() == 1 else each for each in objects]
    for image, boxes in enumerate(objects):
        if boxes.dim() != 2 or not len(boxes):
            raise ValueError(f"Image {image} must have an object, but its boxes are {boxes.tolist()}.")
        if not bool((boxes[:, 2:] > boxes[:, :2]).all()):
            raise ValueError(f"Objects must have an area, but image {image} has the boxes {boxes.tolist()}.")
    return objects


def _within(masks: Tensor, tolerance: float) -> Tensor:
    """Where a pixel of the mask (N, H, W) is at most ``tolerance`` away: row by row of a disc, by sums along rows."""
    height, width = masks.shape[1:]
    sums = torch.nn.functional.pad(masks.to(torch.int32).cumsum(2, dtype=torch.int32), (1, 0))
    x = torch.arange(width, device=masks.device)
    near = masks.clone()
    for down in range(min(math.floor(tolerance), height - 1) + 1):
        reach = math.floor(min(tolerance, width))
        while math.hypot(reach, down) > tolerance:
            reach -= 1
        touched = sums[:, :, (x + reach + 1).clamp(max=width)] > sums[:, :, (x - reach).clamp(min=0)]
        near[:, down:] |= touched[:, : height - down]
        near[:, : height - down] |= touched[:, down:]
    return near


def _labels(labels: Any, count: int) -> list[Any]:
    if not isinstance(labels, Sequence | Tensor | np.ndarray) or isinstance(labels, str):
        raise TypeError(f"labels must be a list or a tensor of classes, but it is {labels!r}.")
    labels = labels.tolist() if isinstance(labels, Tensor | np.ndarray) else list(labels)
    wrong = [label for label in labels if not isinstance(label, Hashable) or label != label]
    if wrong:
        raise TypeError(f"labels must be ints or names, but one is {wrong[0]!r}.")
    if len(labels) != count:
        raise ValueError(
            f"labels must name the class of each of {count} images, but there are {len(labels)}."
        )
    return labels


def _check_share(name: str, value: Any) -> None:
    check_real(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be from 0 to 1, but it is {value!r}.")
