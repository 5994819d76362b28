"""Curves of a score while an image is taken apart in the order that a map gives: insertion, deletion, perturbation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from .._evaluated import evaluated
from ..attr._inputs import Target
from ..checks import Pair, check_int, pair
from ..fills import Fill
from ..results import Result
from ._curves import (
    MOST_REPETITIONS,
    TIES,
    Curve,
    Pass,
    bounds_of,
    check_evaluation,
    check_model_and_images,
    curve_figure,
    curve_scores,
    described,
    given_fills,
    ranked,
    region_sums,
    spread_over_pixels,
    uniform_fills,
)
from ._evaluated import predicted, target_record
from ._presets import settled
from ._result import Metric, check_maps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Score = Literal["softmax", "output"]
INSERTION_DELETION = {
    "rise2018": {
        "pixels_per_step": 224,
        "deletion_fill": 0.0,
        "insertion_fill": "rise2018",
        "score": "softmax",
    }
}
PERTURBATION = {"samek2017": {"region": 9, "steps": 100, "fill": "uniform", "repetitions": 10}}


@dataclasses.dataclass
class InsertionDeletion(Result):
    """Both curves of :func:`insertion_deletion`; a good map has a large area under one, a small one under the other."""

    insertion: Curve
    deletion: Curve

    def figure(self) -> Figure:
        """Both, side by side."""
        return curve_figure([self.insertion, self.deletion])


@dataclasses.dataclass
class Perturbation(Result):
    """Both orders of :func:`perturbation_curve`, and the area between the curves, ``lerf`` above ``morf``."""

    morf: Curve
    lerf: Curve
    abpc: Metric

    def figure(self) -> Figure:
        """Both, side by side."""
        return curve_figure([self.morf, self.lerf])


def insertion_deletion(
    model: Callable[..., Any],
    images: Tensor,
    maps: Tensor,
    target: Target = None,
    *,
    mode: Literal["both", "insertion", "deletion"] = "both",
    preset: Literal["rise2018"] | None = None,
    steps: int | None = None,
    pixels_per_step: int | None = None,
    deletion_fill: Fill | None = None,
    insertion_fill: Fill | None = None,
    score: Score | None = None,
    resize: str | None = None,
    seed: int = 0,
    additional_forward_args: Any = None,
    batch_size: int | None = None,
    memory_limit: int | None = None,
    show_progress: bool = False,
) -> InsertionDeletion | Curve:
    """How fast the target's score rises as pixels are shown, and falls as they are hidden, the most important first.

    Deletion starts with the image and puts the fill in the place of more and more pixels; insertion starts with its
    fill and shows more and more of the image. The value is the area under the curve by the trapezoid rule, over the
    fraction of pixels: a mean of the score along the way, whatever the number of steps. Both ends of each curve are
    evaluated: they are the scores of the image and of the fill.

    Args:
        model: a module or function from images ``(N, C, H, W)`` to scores ``(N, classes)``, evaluated as it is. An
            example's scores must depend on it alone. Batch norm and dropout in training mode are warned about
            (UserWarning); a module's buffers stay what they were, and so does PyTorch's random state, unless it is
            compiled.
        images: ``(N, C, H, W)``, as the model takes them.
        maps: ``(N, H, W)`` or ``(N, 1, H, W)``, of any sign; the largest value is the most important. Pixels of equal
            value follow each other as they are scanned.
        target: which score: an int for all images, a list or tensor of N ints, or what else Captum's methods take; None
            is the class that each image is predicted as.
        mode: which of the two.
        preset: "rise2018", the settings of the paper and its authors' code: 224 pixels a step, deletion to 0, insertion
            over the image under their blur (see :func:`convviz_cuda.fills.rise_blur`), softmax. Others beside it are
            refused.
        steps: of about equal size, from 1 to the number of pixels. Default 224; or
        pixels_per_step: the pixels of each step; the last one takes what is left.
        deletion_fill: what hides pixels: a number, one number a channel, "mean", "grey", "blur", "rise2018", "noise" or
            a tensor that broadcasts to the images (see :func:`convviz_cuda.fills.fill_values`). Default 0: in the
            images as the model takes them, so that it is the mean colour, not black, where they are normalised.
        insertion_fill: what is there before pixels are shown, likewise. Default "blur", a Gaussian of 11 pixels and
            sigma 5 with reflected borders: it blurs less than the authors' kernel, and its borders are not dark.
        score: "softmax", the probability, for models that return logits (default), or "output", what they return. The
            area is in [0, 1] for probabilities.
        resize: how maps of another size are brought to the images', see :func:`check_maps`.
        seed: of "noise", from 0 to ``2**31 - 1``.
        additional_forward_args: passed on behind the images; of tensors with N rows, the row of each image.
        batch_size: masked images in one forward; None leaves the choice to us. Masked images are the same whatever it
            is; scores are, as far as the model's rounding does not depend on the batch.
        memory_limit: bytes of tensors that a forward may hold at once, as far as the choice can keep to it.
        show_progress: count the masked images on stderr, with the time left.

    Returns:
        :class:`InsertionDeletion` with two curves, or the one that ``mode`` names.

    Raises TypeError and ValueError for arguments that do not fit, AssertionError and IndexError for targets as the
    attribution methods do.

    Petsiuk, Das & Saenko 2018, "RISE: Randomized Input Sampling for Explanation of Black-box Models", section 4.2.
    """
    images = check_model_and_images(model, images)
    count, (height, width) = len(images), images.shape[2:]
    maps = check_maps(maps, (height, width), count, resize).to(images.device)
    if mode not in ("both", "insertion", "deletion"):
        raise ValueError(f"mode must be 'both', 'insertion' or 'deletion', but it is {mode!r}.")
    if steps is not None and (pixels_per_step is not None or preset is not None):
        other = "pixels_per_step" if preset is None else f"preset={preset!r}"
        raise ValueError(f"steps and {other} both say how many steps there are: leave one out.")
    given = {
        "pixels_per_step": pixels_per_step,
        "deletion_fill": deletion_fill,
        "insertion_fill": insertion_fill,
        "score": score,
    }
    usual = {"pixels_per_step": None, "deletion_fill": 0.0, "insertion_fill": "blur", "score": "softmax"}
    settings = settled(preset, INSERTION_DELETION, given, usual)
    score = settings["score"]
    check_evaluation(score, batch_size, memory_limit)
    check_int("seed", seed, 0, 2**31 - 1)
    pixels = height * width
    if settings["pixels_per_step"] is not None:
        each = check_int("pixels_per_step", settings["pixels_per_step"], 1)
        shown = [*range(0, pixels, each), pixels]
    else:
        whole = check_int("steps", min(224, pixels) if steps is None else steps, 1, pixels)
        shown = [(2 * i * pixels + whole) // (2 * whole) for i in range(whole + 1)]

    kinds = ["insertion", "deletion"] if mode == "both" else [mode]
    passes = []
    ranks = ranked(maps.flatten(1)).view(maps.shape)
    for kind in kinds:
        fills = given_fills(images, settings[f"{kind}_fill"], seed)
        low = shown if kind == "insertion" else [0] * len(shown)
        passes.append(Pass(ranks, low, [pixels] * len(shown) if kind == "insertion" else shown, fills))
    with evaluated(model) as run:
        targets = predicted(run, images, additional_forward_args) if target is None else target
        scores = curve_scores(
            run, images, passes, targets, additional_forward_args, score, batch_size, memory_limit, show_progress,
            " and ".join(kinds),
        )  # fmt: skip
    fractions = torch.tensor(shown, dtype=torch.float64) / pixels
    curves = {}
    for kind, scores_now in zip(kinds, scores, strict=True):
        fill = settings[f"{kind}_fill"]
        curves[kind] = Curve(
            kind,
            torch.trapezoid(scores_now, fractions, dim=1),
            {
                "value": "area under the curve over the fraction of pixels, trapezoid rule",
                "axis": f"fraction of pixels {'shown' if kind == 'insertion' else 'hidden'}",
                "preset": preset,
                "steps": len(shown) - 1,
                "pixels_per_step": settings["pixels_per_step"],
                "fill": described(fill),
                "seed": seed if fill_is(fill, "noise") else None,
                "score": score,
                **target_record(target, targets, count),
                "order": "descending",
                "ties": TIES,
                "resize": resize,
            },
            fractions,
            scores_now,
        )
    return InsertionDeletion(**curves) if mode == "both" else curves[mode]


def perturbation_curve(
    model: Callable[..., Any],
    images: Tensor,
    maps: Tensor,
    target: Target = None,
    *,
    order: Literal["both", "morf", "lerf"] = "both",
    preset: Literal["samek2017"] | None = None,
    region: Pair | None = None,
    steps: int | None = None,
    fill: Fill | None = None,
    noise_range: Sequence[Any] | None = None,
    repetitions: int | None = None,
    seed: int = 0,
    score: Score = "softmax",
    resize: str | None = None,
    additional_forward_args: Any = None,
    batch_size: int | None = None,
    memory_limit: int | None = None,
    show_progress: bool = False,
) -> Perturbation | Curve:
    """Region perturbation: how the target's score falls as regions are replaced, one after the other.

    The image is cut into regions from its upper left corner; regions are replaced in the order of the map's sum over
    them, the most relevant first ("morf") or the least relevant first ("lerf"), regions of equal sums in scan order.
    Where the image's size is no multiple of a region's, those at the right and the bottom edge are smaller, and are
    compared by their sums like the others, so that they come late in "morf" for maps without negative values.

    The value of a curve is the area over it, AOPC: ``1 / (L + 1) * sum of f(x_0) - f(x_k) over k = 0..L``, the term of
    k = 0, which is 0, included, averaged over repetitions. ABPC, the area between both curves, is the AOPC of "morf"
    minus that of "lerf".

    Args:
        model, images, maps, target, resize, additional_forward_args, batch_size, memory_limit, show_progress: as in
            :func:`insertion_deletion`.
        order: which order, or both.
        preset: "samek2017", the settings of the paper: regions of 9 x 9 pixels, 100 steps, uniform noise, 10
            repetitions. Others beside it are refused.
        region: pixels of a region, an int or (vertical, horizontal). Default 9.
        steps: L, how many regions are replaced. Default 100; at most the number of regions.
        fill: "uniform" (default): uniform noise within ``noise_range``, drawn anew for each image and repetition (but
            the same for both orders); or what else :func:`insertion_deletion` takes.
        noise_range: ends of the uniform noise, each one number or one a channel, in the images' units. None: the least
            and the greatest value of each channel of each image.
        repetitions: how often noise is drawn; curves are means. Default 10, and 1 for fills that are not random.
        seed: of the noise, from 0 to ``2**31 - 1``. It depends on the seed and the numbers of image and repetition.
        score: "softmax" (default) or "output". The paper leaves open which output its f is.

    Returns:
        :class:`Perturbation` with both curves and the area between them, or the curve that ``order`` names. Their
        fractions are of the regions in the image.

    Raises TypeError and ValueError for arguments that do not fit, AssertionError and IndexError for targets as the
    attribution methods do.

    Samek, Binder, Montavon, Lapuschkin & Müller 2017, "Evaluating the Visualization of What a Deep Neural Network Has
    Learned", section III.
    """
    images = check_model_and_images(model, images)
    count, (height, width) = len(images), images.shape[2:]
    maps = check_maps(maps, (height, width), count, resize).to(images.device)
    if order not in ("both", "morf", "lerf"):
        raise ValueError(f"order must be 'both', 'morf' or 'lerf', but it is {order!r}.")
    given = {"region": region, "steps": steps, "fill": fill, "repetitions": repetitions}
    usual = {"region": 9, "steps": 100, "fill": "uniform", "repetitions": None}
    settings = settled(preset, PERTURBATION, given, usual)
    check_evaluation(score, batch_size, memory_limit)
    check_int("seed", seed, 0, 2**31 - 1)
    region, fill = pair("region", settings["region"], 1), settings["fill"]
    grid = -(-height // region[0]), -(-width // region[1])
    most = grid[0] * grid[1]
    if check_int("steps", settings["steps"], 1) > most:
        raise ValueError(
            f"steps must be at most the {most} regions of {region[0]} x {region[1]} pixels in images of {height} x "
            f"{width}, but it is {settings['steps']}."
        )
    steps = int(settings["steps"])
    random = fill_is(fill, "uniform") or fill_is(fill, "noise")
    repeats = settings["repetitions"]
    repeats = check_int(
        "repetitions", (10 if random else 1) if repeats is None else repeats, 1, MOST_REPETITIONS
    )
    if repeats > 1 and not random:
        raise ValueError(f"repetitions must be 1 for a fill that is not random, but it is {repeats}.")
    if noise_range is not None and not fill_is(fill, "uniform"):
        raise ValueError("noise_range is of fill='uniform', but another fill was given.")
    bounds = bounds_of(noise_range, images)

    def fills(repetition: int) -> Any:
        if fill_is(fill, "uniform"):
            return uniform_fills(images, seed, repetition, bounds)
        return given_fills(images, fill, seed * (MOST_REPETITIONS + 1) + repetition)

    sums = region_sums(maps, region)
    kinds = ["morf", "lerf"] if order == "both" else [order]
    passes = []
    for kind in kinds:
        ranks = ranked(sums.flatten(1), descending=kind == "morf").view(sums.shape)
        pixels = spread_over_pixels(ranks, region, (height, width))
        passes += [Pass(pixels, [0] * (steps + 1), range(steps + 1), fills(i)) for i in range(repeats)]
    with evaluated(model) as run:
        targets = predicted(run, images, additional_forward_args) if target is None else target
        scores = curve_scores(
            run, images, passes, targets, additional_forward_args, score, batch_size, memory_limit, show_progress,
            "perturbation",
        )  # fmt: skip
    scores = scores.view(len(kinds), repeats, count, steps + 1).mean(1)
    fractions = torch.arange(steps + 1, dtype=torch.float64) / most
    record = {
        "value": "AOPC: mean of f(x_0) - f(x_k) over k = 0..L",
        "axis": "fraction of regions replaced",
        "preset": preset,
        "region": region,
        "regions": most,
        "edges": "smaller regions at the right and the bottom, compared by their sums",
        "steps": steps,
        "fill": described(fill),
        "noise_range": None if bounds is None else [b.flatten().tolist() for b in bounds],
        "repetitions": repeats,
        "seed": seed if random else None,
        "score": score,
        **target_record(target, targets, count),
        "ties": TIES,
        "resize": resize,
    }
    if fill_is(fill, "uniform") and bounds is None:
        record["noise_range"] = "each image's and channel's own"
    curves = {
        kind: Curve(
            kind,
            (found[:, :1] - found).mean(1),
            record | {"order": kind},
            fractions,
            found,
        )
        for kind, found in zip(kinds, scores, strict=True)
    }
    if order != "both":
        return curves[order]
    between = curves["morf"].values - curves["lerf"].values
    meaning = "ABPC: mean of f(x_k, lerf) - f(x_k, morf) over k = 0..L"
    return Perturbation(**curves, abpc=Metric("abpc", between, record | {"value": meaning, "order": "both"}))


def fill_is(fill: Fill, name: str) -> bool:
    return isinstance(fill, str) and fill == name
