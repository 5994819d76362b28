"""Sensitivity-n: whether attributions add up as the score changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from .._evaluated import evaluated
from ..attr._inputs import Target
from ..attr._masked import memory_format
from ..attr._masked_images import MaskedImages
from ..checks import check_int
from ..fills import Fill
from ..mask_ops import philox, replace_ranked_
from ..results import new_figure
from ._curves import (
    check_evaluation,
    check_model_and_images,
    described,
    given_fills,
    ranked,
)
from ._evaluated import predicted, scored, target_record
from ._result import Metric, check_maps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LARGEST = 0.8  # of the pixels, as in the paper
ROUNDING = 4  # units of rounding of an image's largest score: lost scores that differ by less are the same


@dataclasses.dataclass
class SensitivityN(Metric):
    """values: (N,), the mean of an image's correlations over the sizes for which they are defined.

    sizes: (K,), the numbers of pixels that were removed together.  correlations: (N, K) float64, NaN where the map's
    sums or the scores did not vary by more than their rounding.
    """

    sizes: list[int]
    correlations: Tensor

    @property
    def targets(self) -> list[Any] | None:
        """The class whose score it is, of each image; None where an image has one score only."""
        return self.settings["targets"]

    def figure(self) -> Figure:
        """Each image's correlations, thin, and their mean, over the number of pixels."""
        figure = new_figure(4.6, 3.4)
        panel = figure.subplots()
        for each in self.correlations:
            panel.plot(self.sizes, each.numpy(), color="0.8", linewidth=0.8, zorder=1)
        panel.plot(self.sizes, self.correlations.nanmean(0).numpy(), color="#0072b2", linewidth=2.0, zorder=2)
        panel.set_xscale("log")
        panel.set_ylim(-1.05, 1.05)
        panel.set_xlabel("pixels removed")
        panel.set_ylabel("correlation")
        panel.set_title(f"sensitivity-n: {self.mean:.4g}")
        panel.grid(alpha=0.3)
        return figure


def sensitivity_n(
    model: Callable[..., Any],
    images: Tensor,
    maps: Tensor,
    target: Target = None,
    *,
    sizes: Sequence[int] | int = 16,
    samples: int = 100,
    fill: Fill = 0.0,
    seed: int = 0,
    score: Literal["softmax", "output"] = "output",
    resize: str | None = None,
    additional_forward_args: Any = None,
    batch_size: int | None = None,
    memory_limit: int | None = None,
    show_progress: bool = False,
) -> SensitivityN:
    """The correlation between what random sets of pixels add up to in the map and what the score loses without them.

    For each size n, ``samples`` sets of n pixels are drawn. Each is replaced by the fill, and Pearson's correlation is
    taken over the sets between ``f(x) - f(x without the set)`` and the map's sum over the set. It is 1 where the map
    has the property sensitivity-n.

    Args:
        model, images, target, resize, additional_forward_args, batch_size, memory_limit, show_progress: as in
            :func:`insertion_deletion`.
        maps: ``(N, H, W)`` or ``(N, 1, H, W)``: signed attributions, summed over channels.
        sizes: numbers of pixels, each from 1 to H * W; or how many numbers there are (at most 16 or H * W), from 1 to
            80 % of the pixels in equal ratios. Such numbers that coincide count once.
        samples: sets of each size, at least 2.
        fill: what stands in the place of removed pixels (see :func:`convviz_cuda.fills.fill_values`).
        seed: of the sets, from 0 to ``2**31 - 1``. They are the same for all images, and sample i of a larger size
            holds that of a smaller one.
        score: "output" (default), as in the paper, or "softmax".

    Raises as :func:`insertion_deletion` does.

    Ancona, Ceolini, Öztireli & Gross 2018, "Towards better understanding of gradient-based attribution methods for Deep
    Neural Networks", section 4.
    """
    images = check_model_and_images(model, images)
    count, (height, width) = len(images), images.shape[2:]
    maps = check_maps(maps, (height, width), count, resize).to(images.device)
    check_evaluation(score, batch_size, memory_limit)
    check_int("seed", seed, 0, 2**31 - 1)
    samples = check_int("samples", samples, 2)
    pixels = height * width
    if isinstance(sizes, Sequence) and not isinstance(sizes, str):
        chosen = [check_int("each of sizes", n, 1, pixels) for n in sizes]
        if not chosen:
            raise ValueError("sizes must hold a number of pixels, but it is empty.")
    else:
        chosen = _in_equal_ratios(
            check_int("sizes", sizes, 1, max(16, pixels)), max(1, int(LARGEST * pixels))
        )
    fills = given_fills(images, fill, seed)

    # The first variant of an image is the image itself.
    per_image = samples * len(chosen) + 1
    words = [philox(torch.tensor([s], device=images.device), pixels, seed) for s in range(samples)]
    ranks = torch.cat([ranked(w) for w in words]).view(samples, height, width)
    highs = torch.tensor(chosen, device=images.device)

    def mask(out: Tensor, images: Tensor, start: int, stop: int) -> tuple[Tensor, Sequence[int]]:
        layout = memory_format(images)
        for image in range(start // per_image, (stop - 1) // per_image + 1):
            begin, end = max(start, image * per_image), min(stop, (image + 1) * per_image)
            part = out[begin - start : end - start]
            if begin == image * per_image:
                part[:1].copy_(images[image : image + 1])
                begin, part = begin + 1, part[1:]
            if begin == end:
                continue
            variant = torch.arange(begin, end, device=images.device) - image * per_image - 1
            sample, high = variant // len(chosen), highs[variant % len(chosen)]
            first = (begin - image * per_image - 1) // len(chosen)
            last = (end - image * per_image - 2) // len(chosen) + 1
            same = images[image : image + 1].expand(last - first, -1, -1, -1)
            shown = fills(image, image + 1, layout)
            replace_ranked_(
                part, same, shown, ranks[first:last], sample - first, torch.zeros_like(high), high
            )
        numbers = [i // per_image for i in range(start, stop)]
        return torch.tensor(numbers, device=images.device), numbers

    correlations = torch.zeros((0, len(chosen)), dtype=torch.float64)
    with evaluated(model) as run:
        targets = predicted(run, images, additional_forward_args) if target is None else target
        evaluate = scored(run, targets, additional_forward_args, count, score)
        if count:
            many = MaskedImages(images, mask, count * per_image, evaluate)
            found = many.scores(batch_size, memory_limit, show_progress, "sensitivity-n").cpu()
    if count:
        scores = found.double().view(count, per_image)
        lost = (scores[:, :1] - scores[:, 1:]).view(count, samples, len(chosen))
        noise = ROUNDING * _precision(images, found) * scores.abs().amax(1, keepdim=True)
        sums = _sums(maps, ranks, highs).cpu()
        correlations = _correlation(lost, sums, noise, 1e-12 * sums.abs().amax(1))
    settings = {
        "value": "mean over sizes of Pearson's correlation between lost score and the map's sum",
        "sizes": chosen,
        "samples": samples,
        "fill": described(fill),
        "seed": seed,
        "score": score,
        **target_record(target, targets, count),
        "resize": resize,
    }
    return SensitivityN(
        "sensitivity_n",
        correlations.nanmean(1),
        settings,
        chosen,
        correlations,
    )


def _in_equal_ratios(count: int, most: int) -> list[int]:
    ratio = most ** (1 / (count - 1)) if count > 1 else 1.0
    return sorted({min(most, round(ratio**i)) for i in range(count)})


def _sums(maps: Tensor, ranks: Tensor, sizes: Tensor) -> Tensor:
    """(N, samples, sizes) float64: each map's sum over the pixels of each set."""
    flat = maps.flatten(1).double()
    sums = []
    for rank in ranks.flatten(1):
        order = torch.empty_like(rank, dtype=torch.int64)
        order[rank.long()] = torch.arange(len(rank), device=rank.device)
        sums.append(flat[:, order].cumsum(1)[:, sizes - 1])
    return torch.stack(sums, 1)


def _precision(images: Tensor, scores: Tensor) -> float:
    """The unit of rounding of the coarsest dtype in which scores were computed."""
    dtypes = [images.dtype, scores.dtype]
    if torch.is_autocast_enabled(images.device.type):
        dtypes.append(torch.get_autocast_dtype(images.device.type))
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def _correlation(a: Tensor, b: Tensor, a_noise: Tensor, b_noise: Tensor) -> Tensor:
    """(N, K): Pearson's, over the second dimension; NaN where one of both varies by no more than its rounding."""
    flat = torch.zeros(a.shape[::2], dtype=torch.bool)
    for each, noise in ((a, a_noise), (b, b_noise)):
        flat |= (each.amax(1) - each.amin(1)) <= noise
    a, b = (each - each.mean(1, keepdim=True) for each in (a, b))
    both = (a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt()
    return torch.where(flat, torch.nan, both)
