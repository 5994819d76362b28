"""What curves over masked images share: orders of pixels, fills made image by image, the scores of all steps."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..attr._inputs import Target
from ..attr._masked import memory_format
from ..attr._masked_images import MaskedImages
from ..checks import DTYPES, check_callable, check_int
from ..fills import BLUR_KERNEL, BLUR_SIGMA, Fill, fill_values
from ..mask_ops import philox, replace_ranked_
from ..results import new_figure
from ._evaluated import scored
from ._result import Metric, check_finite

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SORTED_AT_ONCE = 1 << 22  # numbers: their order is an int64 each
TIES = "stable: equal values in scan order"
MOST_REPETITIONS = 1000  # so that seeds of repetitions are those of no other seed


@dataclasses.dataclass
class Curve(Metric):
    """A score of each image while more and more of it is replaced, and one number about it.

    values: (N,), named by ``name``; ``settings`` says how.  fractions: (S + 1,), from 0 to 1, float64: how much is
    inserted, deleted or perturbed.  curves: (N, S + 1) float64, the scores there.
    """

    fractions: Tensor
    curves: Tensor

    @property
    def targets(self) -> list[Any] | None:
        """The class whose score it is, of each image; None where an image has one score only."""
        return self.settings["targets"]

    def figure(self) -> Figure:
        """Each image's curve, thin, and their mean."""
        return curve_figure([self])


def curve_figure(curves: Sequence[Curve]) -> Figure:
    """Panels side by side, one for each kind of curve."""
    figure = new_figure(4.2 * len(curves), 3.4)
    panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for panel, curve in zip(panels, curves, strict=True):
        x = curve.fractions.numpy()
        for each in curve.curves:
            panel.plot(x, each.numpy(), color="0.8", linewidth=0.8, zorder=1)
        if len(curve.curves):
            panel.plot(x, curve.curves.mean(0).numpy(), color="#0072b2", linewidth=2.0, zorder=2)
        panel.set_title(f"{curve.name}: {curve.mean:.4g}")
        panel.set_xlabel(curve.settings["axis"])
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(
        {"softmax": "probability", "output": "score"}[curves[0].settings["score"]] + " of the target"
    )
    return figure


# ------------------------------------------------------------------------------------------------ order


def ranked(values: Tensor, descending: bool = True) -> Tensor:
    """(N, R) int32: the position of each of R numbers in their order; equal ones stay as they follow each other."""
    ranks = torch.empty(values.shape, dtype=torch.int32, device=values.device)
    places = torch.arange(values.shape[1], dtype=torch.int32, device=values.device)
    for part, out in zip(
        *(t.split(max(1, SORTED_AT_ONCE // values.shape[1])) for t in (values, ranks)), strict=True
    ):
        order = torch.argsort(part, dim=1, descending=descending, stable=True)
        out.scatter_(1, order, places.expand(order.shape))
    return ranks


def region_sums(maps: Tensor, region: Sequence[int]) -> Tensor:
    """(N, rows, columns) float64: the sum of each region; those at the right and the bottom may be smaller."""
    height, width = maps.shape[1:]
    whole = F.pad(maps.double(), (0, -width % region[1], 0, -height % region[0]))
    return whole.unflatten(2, (-1, region[1])).sum(3).unflatten(1, (-1, region[0])).sum(2)


def spread_over_pixels(ranks: Tensor, region: Sequence[int], size: Sequence[int]) -> Tensor:
    """(N, H, W): each pixel gets its region's rank; from (N, rows, columns)."""
    rows = ranks.repeat_interleave(region[0], 1)[:, : size[0]]
    return rows.repeat_interleave(region[1], 2)[:, :, : size[1]].contiguous()


# ------------------------------------------------------------------------------------------------ fills


class Fills:
    """What stands in the place of an image's pixels, made when it is asked for: those in use are held, no others.

    make: gives an image's fill by its number, ``(1, C or 1, H or 1, W or 1)``. It depends on nothing else, so that the
    images evaluated beside it change nothing.
    """

    def __init__(self, make: Callable[[int], Tensor]) -> None:
        self._make = make
        self._held: dict[int, Tensor] = {}
        self._joined: tuple[Any, Tensor] | None = None

    def __call__(self, first: int, last: int, layout: torch.memory_format) -> Tensor:
        """Of the images from ``first`` to before ``last``."""
        key = first, last, layout
        if self._joined is None or self._joined[0] != key:
            self._joined = None
            held = self._held
            self._held = {i: held[i] if i in held else self._make(i) for i in range(first, last)}
            fills = list(self._held.values())
            joined = fills[0] if len(fills) == 1 else torch.cat(fills)
            self._joined = key, joined.contiguous(memory_format=layout)
        return self._joined[1]


def given_fills(images: Tensor, fill: Fill, seed: int = 0) -> Fills:
    """:func:`fill_values`, image by image. Raises its errors at once, and ValueError for NaN and infinite values."""
    if isinstance(fill, Tensor):
        value = fill_values(images, fill)
        check_finite("fill", value)
        return Fills(lambda i: value[i : i + 1] if len(value) > 1 else value)
    if len(images):
        check_finite("fill", fill_values(images[:1], fill, seed))
    return Fills(lambda i: fill_values(images[i : i + 1], fill, seed, i))


def uniform_fills(images: Tensor, seed: int, repetition: int, bounds: tuple[Tensor, Tensor] | None) -> Fills:
    """Uniform noise, a stream of random numbers for each repetition and image.

    bounds: (C, 1, 1) float64 each; None: the least and the greatest value of each channel of each image.
    """

    def make(i: int) -> Tensor:
        image = images[i].double()
        low, high = bounds or (image.amin((1, 2), keepdim=True), image.amax((1, 2), keepdim=True))
        stream = torch.tensor([repetition << 32 | i], device=images.device)
        words = philox(stream, image.numel(), seed).view(image.shape)
        return (low + (high - low) * (words.double() / 2**32)).to(images.dtype)[None]

    return Fills(make)


def described(fill: Any) -> Any:
    """A fill for the record: what it is, a tensor by its shape and a digest."""
    if isinstance(fill, Tensor):
        bits = fill.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return {
            "shape": list(fill.shape),
            "dtype": str(fill.dtype),
            "sha256": hashlib.sha256(bits).hexdigest(),
        }
    if isinstance(fill, str):
        kernel = f"kernel {BLUR_KERNEL}, sigma {BLUR_SIGMA}"
        return {
            "blur": f"blur, {kernel}, borders reflected",
            "rise2018": f"blur, {kernel} reflected within the kernel, borders 0",
        }.get(fill, fill)
    return np.asarray(fill, dtype=float).tolist()


# ---------------------------------------------------------------------------------------------- scores


@dataclasses.dataclass(frozen=True)
class Pass:
    """One way through the images: at step s, pixels of the ranks from ``low[s]`` to before ``high[s]`` show the fill.

    ranks: (N, H, W) int32.
    """

    ranks: Tensor
    low: Sequence[int]
    high: Sequence[int]
    fills: Fills


def curve_scores(
    forward_func: Callable[..., Any],
    images: Tensor,
    passes: Sequence[Pass],
    target: Target,
    args: Any,
    score: str,
    batch_size: int | None,
    memory_limit: int | None,
    show_progress: bool,
    title: str,
) -> Tensor:
    """(passes, N, steps) float64 on the CPU: the target's score of each image at each step of each pass."""
    images = images.detach()
    count, steps = len(images), len(passes[0].low)
    if not count:
        return torch.zeros((len(passes), 0, steps), dtype=torch.float64)
    # Both ends and the middle come first: whether images may be evaluated together is seen where they differ.
    order = list(dict.fromkeys([0, steps - 1, steps // 2, *range(steps)]))
    tables = [
        [torch.tensor([each[s] for s in order], device=images.device) for each in (p.low, p.high)]
        for p in passes
    ]

    def mask(out: Tensor, images: Tensor, start: int, stop: int) -> tuple[Tensor, Sequence[int]]:
        number = torch.arange(start, stop, device=images.device)
        image, step = number // steps % count, number % steps
        begin = start
        while begin < stop:  # one launch, unless another pass begins
            which, place = divmod(begin, count * steps)
            end = min(stop, (which + 1) * count * steps)
            first, last = place // steps, (end - 1) // steps % count + 1
            part = slice(begin - start, end - start)
            replace_ranked_(
                out[part],
                images[first:last],
                passes[which].fills(first, last, memory_format(images)),
                passes[which].ranks[first:last],
                image[part] - first,
                *(table[step[part]] for table in tables[which]),
            )
            begin = end
        return image, [i // steps % count for i in range(start, stop)]

    many = MaskedImages(
        images, mask, len(passes) * count * steps, scored(forward_func, target, args, count, score)
    )
    found = many.scores(batch_size, memory_limit, show_progress, title).double().cpu()
    curves = torch.empty((len(passes), count, steps), dtype=torch.float64)
    curves[:, :, order] = found.view(len(passes), count, steps)
    return curves


# ---------------------------------------------------------------------------------------------- checks


def check_model_and_images(forward_func: Any, images: Any) -> Tensor:
    check_callable("model", forward_func)
    if not isinstance(images, Tensor) or images.dtype not in DTYPES:
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images must be a float64, float32, bfloat16 or float16 tensor, but it is {kind}.")
    if images.dim() != 4 or 0 in images.shape[1:]:
        raise ValueError(
            f"images must have the shape (N, C, H, W), but it has the shape {tuple(images.shape)}."
        )
    check_finite("images", images)
    return images.detach()


def check_evaluation(score: str, batch_size: int | None, memory_limit: int | None) -> None:
    if score not in ("softmax", "output"):
        raise ValueError(f"score must be 'softmax' or 'output', but it is {score!r}.")
    for name, value in (("batch_size", batch_size), ("memory_limit", memory_limit)):
        if value is not None:
            check_int(name, value, 1)


def bounds_of(noise_range: Any, images: Tensor) -> tuple[Tensor, Tensor] | None:
    """(low, high) as (C, 1, 1) float64; each may be a number or one number a channel."""
    if noise_range is None:
        return None
    try:
        low, high = (torch.as_tensor(v, dtype=torch.float64).cpu() for v in noise_range)
        fits = all(v.dim() == 0 or v.shape in ((1,), (images.shape[1],)) for v in (low, high))
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(
            f"noise_range must be a low and a high end, each one number or {images.shape[1]} (one a channel), but it "
            f"is {noise_range!r}."
        )
    if not all(bool(v.to(images.dtype).isfinite().all()) for v in (low, high)) or bool((low > high).any()):
        raise ValueError(
            f"noise_range must go from a finite low end to a high one, but it is {noise_range!r}."
        )
    return tuple(v.reshape(-1, 1, 1).to(images.device) for v in (low, high))
