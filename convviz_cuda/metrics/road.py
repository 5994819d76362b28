"""ROAD: remove and debias. Removed pixels are imputed from those around them, so that their outline tells nothing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from .._draws import normal
from .._evaluated import evaluated
from ..attr._inputs import Target
from ..attr._masked import INPUT_BYTES
from ..attr._masked_images import MaskedImages
from ..checks import check_int, check_real
from ..results import Result
from ._curves import TIES, Curve, check_evaluation, check_model_and_images, curve_figure, ranked
from ._evaluated import predicted, scored, target_record
from ._imputation import TOLERANCE, imputed
from ._result import Metric, check_maps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WORKING = 16  # times the bytes of an image in float64: what its imputation holds


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
    1/12 for those at its corners, all of them at once: a sparse system of linear equations, solved to about
    1e-4 of the range of the pixels that are left. At the border of the image the weights of those that are there are
    scaled up to 1. Then a little noise is added. The value of an image is the mean of its scores over the fractions.

    Args:
        model, images, maps, target, score, resize, additional_forward_args, batch_size, memory_limit, show_progress: as
            in :func:`insertion_deletion`.
        order: which order, or both.
        fractions: of the pixels that are removed, each above 0 and below 1.
        noise: its standard deviation, in the images' units; 0 for none. The authors take 0.01 and impute images in
            [0, 1], before the mean is subtracted and the deviation divided by; of images that are normalised it is
            then 0.01 divided by that deviation.
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
    check_real("noise", noise)
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise must be at least 0 and finite, but it is {noise!r}.")
    check_evaluation(score, batch_size, memory_limit)
    check_int("seed", seed, 0, 2**31 - 1)
    removed = torch.tensor([min(pixels - 1, round(f * pixels)) for f in fractions], device=images.device)
    kinds = ["morf", "lerf"] if order == "both" else [order]
    ranks = torch.stack([ranked(maps.flatten(1), kind == "morf") for kind in kinds]).view(-1, height, width)
    steps, many_bytes = len(fractions), INPUT_BYTES.get(images.device.type, INPUT_BYTES["cuda"])
    if memory_limit is not None:
        many_bytes = min(many_bytes, memory_limit)
    together = max(1, many_bytes // (WORKING * 8 * max(1, images[:1].numel())))

    def mask(out: Tensor, images: Tensor, start: int, stop: int) -> tuple[Tensor, Sequence[int]]:
        number = torch.arange(start, stop, device=images.device)
        image, step = number // steps % count, number % steps
        for first in range(0, stop - start, together):
            part = slice(first, first + together)
            given = images[image[part]]
            hidden = (ranks[number[part] // steps] < removed[step[part]].view(-1, 1, 1))[:, None]
            shown = imputed(given.double(), hidden)
            if noise:
                streams = (step[part] << 32) + image[part]  # the same for both orders
                shown += noise * normal(streams, images[0].numel(), seed).view(shown.shape)
            out[part].copy_(torch.where(hidden, shown.to(images.dtype), given))
        return image, [i // steps % count for i in range(start, stop)]

    scores = torch.zeros((len(kinds), count, steps), dtype=torch.float64)
    with evaluated(model) as run:
        targets = predicted(run, images, additional_forward_args) if target is None else target
        evaluate = scored(run, targets, additional_forward_args, count, score)
        if count:
            many = MaskedImages(images, mask, scores.numel(), evaluate)
            found = many.scores(batch_size, memory_limit, show_progress, "ROAD")
            scores = found.double().cpu().view(scores.shape)
    record = {
        "value": "mean of the score over the fractions",
        "axis": "fraction of pixels imputed",
        "fractions": fractions,
        "imputation": f"weighted mean of 8 neighbours, solved jointly to corrections of {TOLERANCE} of the range",
        "noise": float(noise),
        "seed": seed,
        "score": score,
        **target_record(target, targets, count),
        "ties": TIES,
        "resize": resize,
    }
    curves = {
        kind: Curve(
            kind,
            found.mean(1),
            record | {"order": kind},
            torch.tensor(fractions, dtype=torch.float64),
            found,
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


def _checked_fractions(fractions: Any) -> list[float]:
    if isinstance(fractions, Tensor | np.ndarray):
        fractions = fractions.tolist()
    if not isinstance(fractions, Sequence) or isinstance(fractions, str):
        raise TypeError(f"fractions must be a list of numbers, but it is {fractions!r}.")
    for fraction in fractions:
        check_real("each of fractions", fraction)
    values = [float(f) for f in fractions]
    if not values or not all(0 < f < 1 for f in values):
        raise ValueError(
            f"fractions must be one or more numbers above 0 and below 1, but it is {fractions!r}."
        )
    return values
