"""ROAD: remove and debias. Removed pixels are imputed from those around them, so that their outline tells nothing."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .._draws import normal
from ..attr._inputs import Target, extra_args
from ..attr._masked_images import MaskedImages, args_of_each_image, image_scores, of_each_image
from ..checks import check_int
from ..results import Result
from ._curves import (
    Curve,
    check_evaluation,
    check_model_and_images,
    curve_figure,
    predicted,
    ranked,
    target_of_each,
)
from ._result import Metric, check_maps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOLERANCE = 1e-9  # of the imputation: its residual, relative to the right-hand side
ITERATIONS = 5000
LOOKED_AT = 8  # iterations between two looks at whether all is done, which a GPU has to wait for


@dataclasses.dataclass
class Road(Result):
    """Both orders of :func:`road`, and half the difference of their values, which is large for a good map."""

    morf: Curve
    lerf: Curve
    combined: Metric

    def figure(self) -> Figure:
        """Both, side by side."""
        return curve_figure([self.morf, self.lerf])


def road(
    model: Callable[..., Any],
    images: Tensor,
    maps: Tensor,
    target: Target = None,
    *,
    order: Literal["both", "morf", "lerf"] = "both",
    fractions: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9),
    noise: float = 0.01,
    seed: int = 0,
    score: Literal["softmax", "output"] = "softmax",
    resize: str | None = None,
    additional_forward_args: Any = None,
    batch_size: int | None = None,
    memory_limit: int | None = None,
    show_progress: bool = False,
) -> Road | Curve:
    """The target's score after the most ("morf") or the least ("lerf") relevant pixels were imputed.

    Each removed pixel becomes the weighted mean of its eight neighbours, 1/6 for those beside, above and below it and
    1/12 for those at its corners, all of them at once: a sparse system of linear equations, solved by conjugate
    gradients to a residual of 1e-9. At the border of the image the weights of those that are there are scaled up to 1.
    Then a little noise is added. The value of an image is the mean of its scores over the fractions.

    Args:
        model, images, maps, target, score, resize, additional_forward_args, batch_size, memory_limit, show_progress: as
            in :func:`insertion_deletion`.
        order: which order, or both.
        fractions: of the pixels that are removed, each above 0 and below 1.
        noise: its standard deviation, in the images' units; 0 for none. The paper's code takes 0.01.
        seed: of the noise, from 0 to ``2**31 - 1``. It depends on the seed, the image's number and the fraction's.

    Returns:
        :class:`Road`, or the curve that ``order`` names.

    Raises as :func:`insertion_deletion` does.

    Rong, Leemann, Borisov, Kasneci & Kasneci 2022, "A Consistent and Efficient Evaluation Strategy for Attribution
    Methods", sections 4 and 5.
    """
    images = check_model_and_images(model, images)
    count, (height, width) = len(images), images.shape[2:]
    maps = check_maps(maps, (height, width), count, resize).to(images.device)
    if order not in ("both", "morf", "lerf"):
        raise ValueError(f"order must be 'both', 'morf' or 'lerf', but it is {order!r}.")
    pixels = height * width
    fractions = _checked_fractions(fractions)
    if isinstance(noise, bool) or not isinstance(noise, numbers.Real) or not 0 <= noise < math.inf:
        raise ValueError(f"noise must be a number of at least 0, but it is {noise!r}.")
    check_evaluation(score, batch_size, memory_limit)
    check_int("seed", seed, 0, 2**31 - 1)
    removed = torch.tensor([min(pixels - 1, round(f * pixels)) for f in fractions], device=images.device)
    targets = predicted(model, images, additional_forward_args) if target is None else target
    kinds = ["morf", "lerf"] if order == "both" else [order]
    ranks = torch.stack([ranked(maps.flatten(1), kind == "morf") for kind in kinds]).view(-1, height, width)
    each, args, steps = [of_each_image(targets, count)], extra_args(additional_forward_args), len(fractions)

    def mask(out: Tensor, images: Tensor, start: int, stop: int) -> tuple[Tensor, Sequence[int]]:
        number = torch.arange(start, stop, device=images.device)
        image, step = number // steps % count, number % steps
        hidden = ranks[number // steps] < removed[step].view(-1, 1, 1)
        shown = imputed(images[image].double(), hidden[:, None])
        if noise:
            # The same for both orders.
            streams = (step << 32) + image
            shown = shown + noise * normal(streams, images[0].numel(), seed).view(shown.shape)
        out.copy_(torch.where(hidden[:, None], shown.to(images.dtype), images[image]))
        return image, [i // steps % count for i in range(start, stop)]

    def evaluate(given: Tensor, image: Tensor, numbers: Sequence[int]) -> Tensor:
        return image_scores(model(given, *args_of_each_image(args, image, count)), score, each, numbers)

    scores = torch.zeros((len(kinds), count, steps), dtype=torch.float64)
    if count:
        many = MaskedImages(images, mask, scores.numel(), evaluate)
        scores = (
            many.scores(batch_size, memory_limit, show_progress, "ROAD").double().cpu().view(scores.shape)
        )
    record = {
        "value": "mean of the score over the fractions",
        "axis": "fraction of pixels imputed",
        "fractions": fractions,
        "imputation": "weighted mean of 8 neighbours, solved jointly",
        "noise": float(noise),
        "seed": seed,
        "score": score,
        "target": "predicted" if target is None else "given",
        "ties": "stable: equal values in scan order",
        "resize": resize,
    }
    curves = {
        kind: Curve(
            kind,
            found.mean(1),
            record | {"order": kind},
            torch.tensor(fractions, dtype=torch.float64),
            found,
            target_of_each(targets, count),
        )
        for kind, found in zip(kinds, scores, strict=True)
    }
    if order != "both":
        return curves[order]
    combined = (curves["lerf"].values - curves["morf"].values) / 2
    meaning = "half of the value of lerf minus that of morf"
    return Road(
        **curves, combined=Metric("road_combined", combined, record | {"value": meaning, "order": "both"})
    )


def imputed(images: Tensor, hidden: Tensor) -> Tensor:
    """Images (n, C, H, W) float64 in which each hidden pixel is the weighted mean of its neighbours.

    hidden: (n, 1, H, W) bool, not all of an image. Conjugate gradients, each image and channel on its own: the matrix
    is symmetric and positive definite, and it is never stored.
    """
    inside = hidden.double()
    whole = _neighbours(torch.ones_like(inside))  # less than 1 at the border
    known = torch.where(hidden, 0.0, images)
    right = torch.where(hidden, _neighbours(known), 0.0)
    found = torch.zeros_like(right)
    rest, direction = right.clone(), right.clone()
    square = (rest * rest).sum((2, 3), keepdim=True)
    enough = square * TOLERANCE**2
    for i in range(ITERATIONS):
        busy = square > enough
        if i % LOOKED_AT == 0 and not bool(busy.any()):
            break
        moved = inside * (whole * direction - _neighbours(direction))
        along = (direction * moved).sum((2, 3), keepdim=True)
        # What is done stays as it is, whatever is beside it in the batch.
        step = torch.where(busy, square / torch.where(busy, along, 1.0), 0.0)
        found += step * direction
        rest -= step * moved
        now = torch.where(busy, (rest * rest).sum((2, 3), keepdim=True), square)
        direction = rest + torch.where(busy, now / torch.where(busy, square, 1.0), 0.0) * direction
        square = now
    return torch.where(hidden, found, images)


def _neighbours(x: Tensor) -> Tensor:
    """Each pixel's neighbours under their weights; nothing lies beyond the border."""
    rows = F.pad(x, (1, 1, 0, 0))
    rows = rows[..., :-2] + rows[..., 2:] + 2 * x
    both = F.pad(rows, (0, 0, 1, 1))
    return (both[..., :-2, :] + both[..., 2:, :] + 2 * rows - 4 * x) / 12


def _checked_fractions(fractions: Any) -> list[float]:
    try:
        values = [float(f) for f in fractions]
    except (TypeError, ValueError):
        raise TypeError(f"fractions must be numbers, but it is {fractions!r}.") from None
    if not values or not all(0 < f < 1 for f in values):
        raise ValueError(
            f"fractions must be one or more numbers above 0 and below 1, but it is {fractions!r}."
        )
    return values
