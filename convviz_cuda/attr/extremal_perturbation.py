"""Extremal perturbations: the region of a given area that, shown alone or hidden, changes a score most.

Source: Fong, Patrick & Vedaldi, "Understanding Deep Networks via Extremal Perturbations and Smooth Masks" (ICCV 2019).
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .._chunks import Chunks
from ..checks import check_int, check_real
from ..progress import Progress
from ..results import Result, picture
from ._gradient import EXAMPLES, GradientAttribution, check_at_once, gradients, score_seeds
from ._inputs import Inputs, Target, extra_args, leaves, select_target, target_list
from ._masked import PeakBytes, memory_format
from ._masked_images import args_of_each_image, checked_images, image_scores, of_each_image

Areas = float | Sequence[float]
Perturbation = Literal["blur", "fade"] | Tensor
Variant = Literal["preservation", "deletion", "dual"]
Score = Literal["output", "softmax"]

AREAS = (0.025, 0.05, 0.1, 0.2)
VARIANTS = ("preservation", "deletion", "dual")
SCORES = ("output", "softmax")
# The defaults in pixels are for images of this short side, and others in proportion.
SIDE, STEP, SIGMA, BLUR_SIGMA = 224, 7, 21.0, 20.0
# Mask values that are the same in steps of 1 / TIES count as equal: rounding must not rank pixels.
TIES = 2.0**16


@dataclass
class ExtremalMasks(Result):
    """The masks of N images for A areas, and what they do to the score.

    variant: "preservation", "deletion" or "dual".
    areas: A parts of the image, as they were asked for.
    clean: (N,), the score of each image as it is.
    kept, removed: (A, N), the score of the image that shows what the mask marks and hides the rest, and of the image
        that hides what the mask marks.
    curve: (A, N, steps + 1), what the variant maximises, at the start and after each step: ``kept``, ``-removed`` or
        ``kept - removed``, each as log-odds where the score is a probability.
    settings: all that the masks depend on, besides the function and the images.
    masks: (A, N, 1, H, W), from 0 to 1, in float32 (float64 for float64 images).
    """

    variant: str
    areas: list[float]
    clean: Tensor
    kept: Tensor
    removed: Tensor
    curve: Tensor
    settings: dict[str, Any]
    masks: Tensor = picture()

    @property
    def summary(self) -> Tensor:
        """(N, 1, H, W), the sum of the masks over the areas: what :meth:`ExtremalPerturbation.attribute` returns."""
        return self.masks.sum(0)

    def extremal_areas(self, threshold: float = 0.9) -> Tensor:
        """(N,) float64: the smallest of the areas that is enough for each image, NaN where none is.

        Enough is, where the marked region is preserved (also by "dual"), a score of at least ``threshold`` times the
        clean one, and where it is deleted, one of at most ``1 - threshold`` times the clean one. That has a meaning for
        clean scores above 0 only: for others the area is NaN.

        Raises TypeError or ValueError for a threshold that is no number from 0 to 1.
        """
        check_real("threshold", threshold)
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must be from 0 to 1, but it is {threshold!r}.")
        if self.variant == "deletion":
            enough = self.removed <= (1 - threshold) * self.clean
        else:
            enough = self.kept >= threshold * self.clean
        areas = torch.tensor(self.areas, dtype=torch.float64, device=enough.device)[:, None]
        smallest = torch.where(enough & (self.clean > 0), areas, math.inf).amin(0)
        return torch.where(smallest.isinf(), math.nan, smallest)


class ExtremalPerturbation(GradientAttribution):
    """Extremal perturbations (Fong, Patrick & Vedaldi 2019, section 3).

    For each area a smooth mask is sought, by gradient ascent on its parameters, that covers so much of the image and
    maximises the score of what it shows (or minimises that of what it leaves). Masks that differ in their area alone
    are comparable, and their sum over some areas ranks the pixels. No random numbers are drawn: equal calls give equal
    masks. Each mask is optimised by itself: it depends on the others of a batch by rounding alone (which many steps can
    make visible, where two regions are as good as each other).

    Args:
        forward_func: a model or any callable that takes images ``(N, C, H, W)`` and returns scores ``(N, ...)``, of
            which an example's must depend on it alone. It is called many times with as many images as fit. Its
            parameters are constants. A module runs in the mode it is in.
    """

    def attribute(
        self, inputs: Inputs, target: Target = None, additional_forward_args: Any = None, *,
        areas: Areas = AREAS, steps: int = 200, variant: Variant = "preservation",
        perturbation: Perturbation = "blur", blur_sigma: float | None = None, levels: int = 8,
        step: int | None = None, sigma: float | None = None, temperature: float = 0.05, lr: float = 0.02,
        momentum: float = 0.9, weight: float = 300.0, growth: float = 10.0, score: Score = "output",
        batch_size: int | None = None, memory_limit: int | None = None, show_progress: bool = False,
    ) -> Inputs:  # fmt: skip
        """The sum over the areas of each example's masks: how early, as the area grows, a pixel is marked.

        In the paper the mask of area a maximises ``score(m * x) - lambda * R_a(m)``, where ``m * x`` shows the image
        where the mask m is 1 and hides it where m is 0, and ``R_a`` is the squared distance of the sorted mask to a
        vector of zeros followed by as many ones as the area has pixels. What we decided ourselves: R is the mean over
        pixels, so that its weight does not depend on the image's size; equal values share what their ranks ask for;
        lambda grows geometrically; the ascent begins with parameters of 1, which show nearly all of the image (for
        "deletion" of 0, which hide nothing), as of a blurred image the score hardly says which place would help; the
        gradient by a parameter is divided by how much of the first mask hangs on it (the sum of its pixels'
        derivatives, relative to the mean over parameters), or the border would be pushed unlike the middle; and all
        defaults but ``step`` and ``sigma``. The area is a penalty: the means of the masks, which are soft at their
        borders, come near it, but do not equal it.

        Args:
            inputs: float images ``(N, C, H, W)``, or a tuple of one such tensor.
            target: which score: an int for all examples, a list or 1-D tensor of N ints, a tuple as trailing index, a
                list of N tuples; None only where each example has a single score.
            additional_forward_args: passed on behind the images; of tensors with N rows, the row of each image.
            areas: parts of the image, above 0 and at most 1: a number or several.
            steps: of the optimisation, at least 1.
            variant: "preservation" seeks the region that, shown alone, gives the highest score; "deletion" the one
                that, hidden, leaves the lowest; "dual" the greatest difference of both, which takes twice the time.
            perturbation: what hides. "blur": at a mask's value m the image is blurred by a Gaussian of deviation
                ``blur_sigma * (1 - m)`` pixels (normalised over what of it lies in the image); "fade": it is multiplied
                by m, so that 0 hides; a tensor that broadcasts to the images: they turn into it in proportion.
            blur_sigma: in pixels; None: 20 for images whose shorter side has 224, in proportion for others.
            levels: blurred images that are made, at equal steps of the deviation, from ``blur_sigma`` to 0; between
                them the blur is interpolated linearly. At least 2.
            step: pixels from one of the mask's parameters to the next; None: 7 at 224 pixels, in proportion.
            sigma: of the mask's smoothness, in pixels; None: 21 at 224 pixels, in proportion. See :class:`SmoothMasks`.
            temperature: of the smooth maximum, above 0.
            lr, momentum: of the gradient steps on the parameters, which are kept in [0, 1].
            weight, growth: lambda at the first step, and by how many times it is larger at the last. The default suits
                scores of about 10, as logits are; of larger ones it must be larger, or areas are not kept to.
            score: "output" takes what the function returns; "softmax" takes the probability, for functions that return
                logits ``(N, classes, ...)``. Of a probability the log-odds are maximised: they rise with it, and have a
                gradient also where it is nearly 0 or 1. A mask that keeps a class's logit may raise those of other
                classes more, so that the prediction is lost; "softmax" seeks one that keeps the prediction.
            batch_size: masks that are optimised together; None chooses for the device. The result depends on it by
                rounding alone.
            memory_limit: bytes of tensors that a step may hold at once, as far as the number of masks can keep to it:
                one mask is always taken. None: a default number of masks.
            show_progress: count the steps, summed over masks, on stderr, with the time left.

        Returns:
            ``(N, 1, H, W)``, float32 (float64 for float64 images), contiguous, on the images' device, in [0, areas].

        Raises AssertionError for a target that does not fit the output or a function without a score for each image,
        IndexError for a target out of range, TypeError or ValueError for what else is wrong, all before the first step;
        FloatingPointError for scores or gradients that are not finite.
        """
        plan = _Plan.checked(
            inputs, areas, steps, variant, perturbation, blur_sigma, levels, step, sigma, temperature, lr, momentum,
            weight, growth, score,
        )  # fmt: skip
        found = self._found(
            plan, [target], additional_forward_args, batch_size, memory_limit, show_progress
        ).masks.sum(2)
        found = found[0][:, None]
        return (found,) if isinstance(inputs, tuple) else found

    def attribute_many(
        self, inputs: Inputs, targets: Any, additional_forward_args: Any = None, *,
        areas: Areas = AREAS, steps: int = 200, variant: Variant = "preservation",
        perturbation: Perturbation = "blur", blur_sigma: float | None = None, levels: int = 8,
        step: int | None = None, sigma: float | None = None, temperature: float = 0.05, lr: float = 0.02,
        momentum: float = 0.9, weight: float = 300.0, growth: float = 10.0, score: Score = "output",
        batch_size: int | None = None, memory_limit: int | None = None, show_progress: bool = False,
    ) -> Inputs:  # fmt: skip
        """:meth:`attribute` for K targets; the masks of all targets, images and areas are optimised together.

        Args:
            targets: K targets, each as in :meth:`attribute`; or an integer tensor ``(K,)`` or ``(K, N)``.

        Returns:
            ``(K, N, 1, H, W)``.
        """
        plan = _Plan.checked(
            inputs, areas, steps, variant, perturbation, blur_sigma, levels, step, sigma, temperature, lr, momentum,
            weight, growth, score,
        )  # fmt: skip
        every = target_list(targets)
        found = self._found(plan, every, additional_forward_args, batch_size, memory_limit, show_progress)
        maps = found.masks.sum(2)[:, :, None]
        return (maps,) if isinstance(inputs, tuple) else maps

    def masks(
        self, inputs: Inputs, target: Target = None, additional_forward_args: Any = None, *,
        areas: Areas = AREAS, steps: int = 200, variant: Variant = "preservation",
        perturbation: Perturbation = "blur", blur_sigma: float | None = None, levels: int = 8,
        step: int | None = None, sigma: float | None = None, temperature: float = 0.05, lr: float = 0.02,
        momentum: float = 0.9, weight: float = 300.0, growth: float = 10.0, score: Score = "output",
        batch_size: int | None = None, memory_limit: int | None = None, show_progress: bool = False,
    ) -> ExtremalMasks:  # fmt: skip
        """:meth:`attribute`, with the mask of each area, their scores and the smallest area that is enough.

        What keeps most of a score can be as large as the object, which areas then have to reach: the default ones end
        at a fifth of the image.
        """
        plan = _Plan.checked(
            inputs, areas, steps, variant, perturbation, blur_sigma, levels, step, sigma, temperature, lr, momentum,
            weight, growth, score,
        )  # fmt: skip
        found = self._found(plan, [target], additional_forward_args, batch_size, memory_limit, show_progress)
        return ExtremalMasks(
            variant=plan.variant,
            areas=list(plan.areas),
            clean=found.clean[0],
            kept=found.kept[0].T.contiguous(),
            removed=found.removed[0].T.contiguous(),
            curve=found.curve[0].transpose(0, 1).contiguous(),
            settings=plan.settings(),
            masks=found.masks[0].transpose(0, 1)[:, :, None].contiguous(),
        )

    def _found(
        self,
        plan: _Plan,
        targets: list[Target],
        args: Any,
        batch_size: int | None,
        memory_limit: int | None,
        show_progress: bool,
    ) -> _Found:
        check_at_once("batch_size", batch_size)
        check_at_once("memory_limit", memory_limit)
        leaves((plan.images,))  # refused before the long work, where autograd is off for good
        picks = [of_each_image(target, len(plan.images)) for target in targets]
        found = _Found.empty(len(targets), plan)
        if not plan.images.numel() or not targets:
            return found
        search = _Search(self, plan, picks, extra_args(args))
        found.clean[:] = search.clean()
        search.fill(found, batch_size, memory_limit, show_progress)
        return found


# ------------------------------------------------------------------------------------------ the parts


class SmoothMasks:
    """Smooth masks of images from coarse grids of parameters (section 3).

    A mask is ``max over v of k(u - v) * p(v)``, the maximum taken smoothly: the mean of these products under the
    weights ``exp(product / temperature)``. So it is nowhere less smooth than the kernel k. Where the paper leaves a
    choice: k is 1 up to a distance of ``sigma / 2``, falls as a Gaussian of deviation ``sigma / 2`` from there on and
    ends at ``2 * sigma``; parameters lie ``step`` pixels apart, centred on the image; beyond its border the outermost
    ones go on, so that equal parameters are an even mask; the maximum is taken at the places of the parameters, and
    pixels between them read it bilinearly.

    Args:
        size: (H, W) of the images.
        like: gives the dtype and the device.
    """

    def __init__(
        self, size: Sequence[int], step: int, sigma: float, temperature: float, like: Tensor
    ) -> None:
        self.reach = int(2 * sigma / step)
        self.temperature = temperature
        self.grid = tuple(-(-(extent - 1) // step) + 1 for extent in size)  # the image lies between them
        along = torch.arange(-self.reach, self.reach + 1, dtype=torch.float64) * step
        distance = torch.hypot(along[:, None], along[None]).flatten() / sigma
        self._near = (distance <= 2).nonzero()[:, 0].to(like.device)
        kernel = torch.exp(-2 * (distance - 0.5).clamp(min=0).square())
        self._kernel = kernel.to(like)[self._near, None]
        self._down, self._across = (
            _readings(extent, count, step).to(like) for extent, count in zip(size, self.grid, strict=True)
        )
        # As products, whose gradients are sums in one order on every device; those of a padding are not.
        self._above, self._beside = (
            F.one_hot(torch.arange(-self.reach, count + self.reach).clamp(0, count - 1), count).to(like)
            for count in self.grid
        )

    def __call__(self, parameters: Tensor) -> Tensor:
        """(n, H, W), from parameters (n, *grid) in [0, 1]."""
        width = 2 * self.reach + 1
        wide = self._above @ parameters @ self._beside.T
        around = F.unfold(wide[:, None], width)[:, self._near] * self._kernel
        smooth = (F.softmax(around / self.temperature, 1) * around).sum(1)
        return self._down @ smooth.unflatten(1, self.grid) @ self._across.T

    def sums(self, value: float) -> Tensor:
        """(*grid): the derivatives of the sum of an even mask's pixels, at a value of all its parameters."""
        with torch.enable_grad():
            even = self._down.new_full((1, *self.grid), value, requires_grad=True)
            return torch.autograd.grad(self(even).sum(), even)[0][0]


def _readings(extent: int, count: int, step: int) -> Tensor:
    """(extent, count) float64: what each pixel reads of each node, bilinearly; the nodes are centred on the pixels."""
    places = (torch.arange(extent, dtype=torch.float64) - (extent - 1) / 2) / step + (count - 1) / 2
    return (1 - (places[:, None] - torch.arange(count)).abs()).clamp(min=0)


class AreaLoss:
    """(n,): the mean squared distance of each sorted mask (n, H, W) to zeros followed by ones (section 3).

    Pixels of equal values (to :data:`TIES`) have equal gradients: the mean of what their ranks ask for, however a sort
    would order them.

    Args:
        areas: n parts of the image, rounded to pixels (at least one), of which there are ones.
        pixels: of a mask.
    """

    def __init__(self, areas: Sequence[float], pixels: int, device: torch.device) -> None:
        counts = [min(max(1, round(area * pixels)), pixels) for area in areas]
        self._ones = torch.tensor(counts, device=device)[:, None]
        self._rows = {
            count: torch.tensor([row for row, each in enumerate(counts) if each == count], device=device)
            for count in set(counts)
        }

    def __call__(self, masks: Tensor) -> Tensor:
        values = masks.flatten(1)
        ones = self._ones.to(values)
        with torch.no_grad():
            ranked = (values * TIES).round()
            least = torch.empty_like(
                ones
            )  # of the values that ought to be 1; to sort all of them takes longer
            for count, rows in self._rows.items():
                least[rows] = ranked[rows].topk(count, 1, sorted=False).values.amin(1, keepdim=True)
            above, equal = ranked > least, ranked == least
            share = (ones - above.sum(1, keepdim=True)) / equal.sum(1, keepdim=True)
            wanted = above + equal * share
        # As a one is its own square, this is the mean of (value - wanted)^2 over any order of equal values.
        return (values * (values - 2 * wanted)).mean(1) + ones[:, 0] / values.shape[1]


def blurred(images: Tensor, sigma: float) -> Tensor:
    """Images (..., H, W) under a Gaussian of a deviation in pixels, normalised over its part inside of the image."""
    height, width = images.shape[-2:]
    return _gaussian(height, sigma).to(images) @ images @ _gaussian(width, sigma).to(images).T


def _gaussian(extent: int, sigma: float) -> Tensor:
    places = torch.arange(extent, dtype=torch.float64)
    if sigma == 0:
        return torch.eye(extent, dtype=torch.float64)
    weights = torch.exp(-((places[:, None] - places) ** 2) / (2 * sigma**2))
    return weights / weights.sum(1, keepdim=True)


class Levels:
    """What masked images are mixed of: for a mask's values 0 to 1 the images from hidden to clear, at equal steps.

    images (N, C, H, W); perturbation, blur_sigma, levels: as in :meth:`ExtremalPerturbation.attribute`.
    """

    def __init__(
        self, images: Tensor, perturbation: Perturbation, blur_sigma: float | None, levels: int
    ) -> None:
        if isinstance(perturbation, Tensor):
            stack = [perturbation.to(images).expand(images.shape), images]
        elif perturbation == "fade":
            stack = [torch.zeros_like(images), images]
        else:
            deviations = [blur_sigma * (1 - level / (levels - 1)) for level in range(levels - 1)]
            stack = [*(blurred(images, deviation) for deviation in deviations), images]
        self._steps = len(stack) - 1
        levels = torch.stack([level.permute(0, 2, 3, 1) for level in stack])  # (L, N, H, W, C)
        _, self._count, height, width, _ = levels.shape
        # As a table of pixels: its rows are read in less time than the stack is indexed in all dimensions.
        self._table = levels.flatten(0, 3)
        self._pixel = torch.arange(height * width, device=images.device).view(height, width)

    def mixed(self, image: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """The images (n, C, H, W) of these numbers (n,) under masks (n, H, W), and their derivative by the masks."""
        steps = self._steps
        place = masks * steps
        level = place.floor().clamp(0, steps - 1).long()
        row = (level * self._count + image[:, None, None]) * self._pixel.numel() + self._pixel
        low = F.embedding(row, self._table)
        slope = F.embedding(row + self._count * self._pixel.numel(), self._table) - low
        mixed = low + (place - level)[..., None] * slope
        return mixed.permute(0, 3, 1, 2), slope.permute(0, 3, 1, 2) * steps


# ------------------------------------------------------------------------------------------ the optimisation


@dataclass(frozen=True)
class _Plan:
    """The images and checked settings."""

    images: Tensor
    areas: tuple[float, ...]
    steps: int
    variant: str
    perturbation: Any
    blur_sigma: float
    levels: int
    step: int
    sigma: float
    temperature: float
    lr: float
    momentum: float
    weight: float
    growth: float
    score: str

    @staticmethod
    def checked(
        inputs: Inputs, areas: Any, steps: Any, variant: Any, perturbation: Any, blur_sigma: Any, levels: Any,
        step: Any, sigma: Any, temperature: Any, lr: Any, momentum: Any, weight: Any, growth: Any, score: Any,
    ) -> _Plan:  # fmt: skip
        """The settings with their defaults for these images; TypeError or ValueError for those that make no sense."""
        images = checked_images(inputs, "Extremal perturbation")
        given = list(areas) if isinstance(areas, Sequence) and not isinstance(areas, str) else [areas]
        for area in given:
            check_real("areas", area)
            if not 0 < area <= 1:
                raise ValueError(f"areas must be above 0 and at most 1, but one is {area!r}.")
        if not given:
            raise ValueError("areas must name at least one area, but there is none.")
        for name, value, known in (("variant", variant, VARIANTS), ("score", score, SCORES)):
            if not isinstance(value, str) or value not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, but it is {value!r}.")
        ratio = min(images.shape[2:]) / SIDE
        return _Plan(
            images=images.detach(),
            areas=tuple(map(float, given)),
            steps=check_int("steps", steps, 1),
            variant=variant,
            perturbation=_hiding(perturbation, images),
            blur_sigma=BLUR_SIGMA * ratio if blur_sigma is None else _real("blur_sigma", blur_sigma),
            levels=check_int("levels", levels, 2),
            step=max(1, round(STEP * ratio)) if step is None else check_int("step", step, 1),
            sigma=max(1.0, SIGMA * ratio) if sigma is None else _real("sigma", sigma, above=True),
            temperature=_real("temperature", temperature, above=True),
            lr=_real("lr", lr, above=True),
            momentum=_real("momentum", momentum, below=1),
            weight=_real("weight", weight),
            growth=_real("growth", growth, above=True),
            score=score,
        )

    @property
    def wide(self) -> torch.dtype:
        return torch.float64 if self.images.dtype == torch.float64 else torch.float32

    def settings(self) -> dict[str, Any]:
        names = [name for name in self.__dataclass_fields__ if name not in ("images", "areas", "variant")]
        found = {name: getattr(self, name) for name in names}
        if isinstance(self.perturbation, Tensor):
            found["perturbation"] = f"a tensor of the shape {tuple(self.perturbation.shape)}"
        return found


def _real(name: str, value: Any, above: bool = False, below: float = math.inf) -> float:
    check_real(name, value)
    if not 0 <= value < below or (above and value == 0):
        least = "above" if above else "at least"
        raise ValueError(
            f"{name} must be {least} 0 and {'finite' if below == math.inf else f'below {below}'}, but it is {value!r}."
        )
    return float(value)


def _hiding(perturbation: Any, images: Tensor) -> Any:
    if isinstance(perturbation, Tensor):
        try:
            fits = torch.broadcast_shapes(perturbation.shape, images.shape) == images.shape
        except RuntimeError:
            fits = False
        if not fits or not perturbation.is_floating_point():
            raise ValueError(
                f"perturbation must be a float tensor that broadcasts to the images {tuple(images.shape)}, but it is "
                f"{perturbation.dtype} in the shape {tuple(perturbation.shape)}."
            )
        return perturbation.detach()
    if not isinstance(perturbation, str) or perturbation not in ("blur", "fade"):
        raise ValueError(f"perturbation must be 'blur', 'fade' or a tensor, but it is {perturbation!r}.")
    return perturbation


@dataclass
class _Found:
    """clean (K, N); kept, removed (K, N, A); curve (K, N, A, steps + 1); masks (K, N, A, H, W)."""

    clean: Tensor
    kept: Tensor
    removed: Tensor
    curve: Tensor
    masks: Tensor

    @staticmethod
    def empty(targets: int, plan: _Plan) -> _Found:
        count, areas = len(plan.images), len(plan.areas)
        shapes = [(), (areas,), (areas,), (areas, plan.steps + 1), (areas, *plan.images.shape[2:])]
        return _Found(
            *(
                torch.zeros((targets, count, *rest), dtype=plan.wide, device=plan.images.device)
                for rest in shapes
            )
        )


class _Search:
    """The optimisation of the masks of K targets, N images and A areas, which are numbered in this order."""

    def __init__(
        self,
        engine: GradientAttribution,
        plan: _Plan,
        picks: list[Callable[[Sequence[int]], Target]],
        args: tuple[Any, ...],
    ) -> None:
        self.engine, self.plan, self.picks, self.args = engine, plan, picks, args
        wide = plan.images.to(plan.wide)
        self._start = 0.0 if plan.variant == "deletion" else 1.0
        self._layout = memory_format(plan.images)
        with self._exactly():
            self._levels = Levels(wide, plan.perturbation, plan.blur_sigma, plan.levels)
            self._smooth = SmoothMasks(plan.images.shape[2:], plan.step, plan.sigma, plan.temperature, wide)
            reach = self._smooth.sums(self._start)
            self._share = reach.mean() / reach

    def _exactly(self) -> torch.autocast:
        """Our own arithmetic, which the caller's autocast is not meant for."""
        return torch.autocast(self.plan.images.device.type, enabled=False)

    @torch.no_grad()
    def clean(self) -> Tensor:
        """(K, N): the scores of the images as they are. Meets all that can be wrong with a target."""
        count, each = len(self.plan.images), []
        at_once = EXAMPLES.get(self.plan.images.device.type, EXAMPLES["cuda"])
        for start in range(0, count, at_once):
            images = range(start, min(start + at_once, count))
            image = torch.tensor(images, device=self.plan.images.device)
            given = self.plan.images[start : start + at_once].clone()
            output = self.engine.forward_func(given, *args_of_each_image(self.args, image, count))
            each.append(image_scores(output, self.plan.score, self.picks, images).T)
        return torch.cat(each, 1)

    def fill(
        self, found: _Found, batch_size: int | None, memory_limit: int | None, show_progress: bool
    ) -> None:
        """Optimises all masks, some at a time."""
        plan = self.plan
        total = found.kept.numel()
        chosen = EXAMPLES.get(plan.images.device.type, EXAMPLES["cuda"])
        at_once = batch_size or max(1, chosen // (2 if plan.variant == "dual" else 1))
        if memory_limit is not None and batch_size is None:
            with PeakBytes(True) as peak:
                self._step(*self._begin(range(1)))
            at_once = max(1, min(at_once, memory_limit // max(1, peak.bytes)))
        chunks = Chunks(total, at_once, batch_size is not None)
        with Progress(total * plan.steps, "steps", show_progress, "extremal perturbation") as progress:
            for start, stop in chunks:
                done = progress.done
                with chunks:
                    self._fill(found, range(start, stop), progress)
                if chunks.failed:
                    progress.done = done

    def _begin(self, items: range) -> tuple[_Items, Tensor]:
        """The masks of these numbers and their first parameters."""
        count, areas = len(self.plan.images), len(self.plan.areas)
        device = self.plan.images.device
        images = [item // areas % count for item in items]
        kinds = [item // areas // count for item in items]
        asked = [self.plan.areas[item % areas] for item in items]
        targets = [_of_one(self.picks[k], n) for k, n in zip(kinds, images, strict=True)]
        pixels = math.prod(self.plan.images.shape[2:])
        area_loss = AreaLoss(asked, pixels, device)
        begun = _Items(images, torch.tensor(images, device=device), area_loss, targets)
        parameters = torch.full(
            (len(items), *self._smooth.grid), self._start, dtype=self.plan.wide, device=device
        )
        return begun, parameters

    def _fill(self, found: _Found, items: range, progress: Progress) -> None:
        plan = self.plan
        begun, parameters = self._begin(items)
        speed = torch.zeros_like(parameters)
        curve = []
        for number in range(plan.steps):
            weight = plan.weight * plan.growth ** (number / max(1, plan.steps - 1))
            reward, slope = self._step(begun, parameters, weight)
            _check_finite(number, reward, slope)
            curve.append(reward)
            speed = plan.momentum * speed + slope
            parameters = (parameters + plan.lr * speed).clamp(0, 1)
            if progress.show and parameters.is_cuda:
                torch.cuda.synchronize(parameters.device)  # or progress would count what is only queued
            progress.advance(len(items))
        with torch.no_grad(), self._exactly():
            masks = self._smooth(parameters)
        (kept, shown), (removed, left) = (self._scores(begun, values) for values in (masks, 1 - masks))
        curve.append({"preservation": shown, "deletion": -left, "dual": shown - left}[plan.variant])
        values = torch.stack(curve, 1)
        _check_finite(plan.steps, values)
        where = slice(items.start, items.stop)
        for room, value in (
            (found.kept, kept), (found.removed, removed), (found.curve, values), (found.masks, masks),
        ):  # fmt: skip
            room.flatten(0, 2)[where] = value

    def _step(self, begun: _Items, parameters: Tensor, weight: float = 0.0) -> tuple[Tensor, Tensor]:
        """What the variant maximises, (n,), and the gradient of the objective by the parameters."""
        deleting, dual = self.plan.variant == "deletion", self.plan.variant == "dual"
        with torch.enable_grad(), self._exactly():
            parameters = parameters.detach().requires_grad_()
            masks = self._smooth(parameters)
            loss = weight * begun.area_loss(masks)
            (push,) = torch.autograd.grad(loss.sum(), masks, retain_graph=True)
        values = masks.detach()
        shown = torch.cat([values, 1 - values]) if dual else 1 - values if deleting else values
        begun = begun.twice() if dual else begun
        given, slope = self._given(begun, shown)
        rewards: list[Tensor] = []

        def differentiate(output: Any, xs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            merit = self._merit(output, begun)
            reward = merit.chunk(2)[0] - merit.chunk(2)[1] if dual else -merit if deleting else merit
            rewards[:] = [reward.detach().to(parameters)]
            return gradients(reward, xs)

        (gradient,) = self.engine._differentiated((given,), self._args(begun), differentiate)
        pull = (gradient.to(slope) * slope).sum(1)  # by what is shown, which deletion turns round
        if dual:
            kept, removed = pull.chunk(2)
            pull = kept - removed
        elif deleting:
            pull = -pull
        with self._exactly():
            (found,) = torch.autograd.grad(masks, parameters, pull - push)
        return rewards[0], found * self._share

    @torch.no_grad()
    def _scores(self, begun: _Items, masks: Tensor) -> tuple[Tensor, Tensor]:
        """The scores of the images under the masks, (n,), and what is maximised of them."""
        given, _ = self._given(begun, masks)
        output = self.engine.forward_func(given, *self._args(begun))
        scores = image_scores(output, self.plan.score, [lambda _: begun.target()], begun.images)[:, 0]
        return scores.to(masks), self._merit(output, begun).to(masks)

    def _merit(self, output: Any, begun: _Items) -> Tensor:
        (merit,) = image_scores(output, "output", [lambda _: begun.target()], begun.images).unbind(1)
        if self.plan.score == "output":
            return merit
        with torch.enable_grad():
            (seeds,) = score_seeds(output, [lambda x: select_target(x, begun.target())])
        others = output if output.dtype == torch.float64 else output.float()
        others = others.masked_fill(seeds != 0, -math.inf).logsumexp(1, keepdim=True).expand(output.shape)
        return merit - select_target(others, begun.target()).reshape(-1)

    def _given(self, begun: _Items, masks: Tensor) -> tuple[Tensor, Tensor]:
        """The masked images as the function gets them, and their derivative by the masks."""
        with torch.no_grad(), self._exactly():
            mixed, slope = self._levels.mixed(begun.image, masks)
            return mixed.to(self.plan.images.dtype).contiguous(memory_format=self._layout), slope

    def _args(self, begun: _Items) -> tuple[Any, ...]:
        return args_of_each_image(self.args, begun.image, len(self.plan.images))


def _check_finite(steps: int, *values: Tensor) -> None:
    """Before masks of NaN look for their blurred pixels, which on a GPU would be its end."""
    if not all(each.isfinite().all() for each in values):
        raise FloatingPointError(
            f"After {steps} steps a score or its gradient was not finite: look at what the function makes of blurred "
            "or faded images."
        )


@dataclass(frozen=True)
class _Items:
    """Some masks: of which image each is, on the host and on the device, the loss of their areas, and its target."""

    images: list[int]
    image: Tensor
    area_loss: AreaLoss
    targets: list[tuple[Any, ...] | None]

    def twice(self) -> _Items:
        return _Items(self.images * 2, self.image.repeat(2), self.area_loss, self.targets * 2)

    def target(self) -> Target:
        return None if None in self.targets else self.targets


def _of_one(pick: Callable[[Sequence[int]], Target], image: int) -> tuple[Any, ...] | None:
    """The target of one image as a trailing index, so that unlike ones can stand in one list."""
    target = pick([image])
    if isinstance(target, list):
        (target,) = target
    if isinstance(target, Tensor):
        target = target.item()
    if target is None or isinstance(target, tuple):
        return target
    return (int(target),) if isinstance(target, numbers.Integral) else target
