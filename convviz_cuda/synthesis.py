"""Images made by gradient ascent: the class model, and what a unit, a channel or a layer answers to most.

Source: Simonyan, Vedaldi & Zisserman, "Deep Inside Convolutional Networks: Visualising Image Classification Models and
Saliency Maps" (2013), section 2. The paper gives neither step nor regularisation; the defaults are those in common use.
"""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .activations import LayerReader
from .attr._gradient import GradientAttribution, NeuronAttribution, check_module, evaluation_copy, gradients
from .checks import integer
from .fills import gaussian_blur
from .imaging import colour_limit, denormalised, number, signed_rgb, three_channels
from .journal import digest
from .progress import Progress
from .results import Result, new_figure, picture, write_picture
from .sheets import Panel, Row, sheet

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

INITS = ("zero", "noise")
KEEPS = ("best", "last")
NOISE = 0.1  # deviation of the start "noise": enough to tell pixels apart, little beside what the ascent adds

One = int | tuple[int, ...] | None
Targets = One | Sequence[One] | Tensor | np.ndarray
Score = Callable[[Tensor], Tensor]


@dataclass
class Synthesis(Result):
    """K images that a network answers to.

    layer: whose output was maximised; None: the model's.  targets: K of them, as in :meth:`ClassModel.generate`,
        counted from 0.
    scores: (K, steps + 1), the score of the image at the start and after each step, without penalty.
    kept: (K,) int64, the number of steps after which the image was taken.
    probabilities: (K,), of the target by softmax for the image; None where a score is not a class's.
    settings: all that the images depend on, besides the model and a start or a mean that are tensors.
    images: (K, C, H, W), as the network sees them.
    mean, std: broadcast to an image; for :attr:`pictures`.
    """

    layer: str | None
    targets: list[One]
    scores: Tensor
    kept: Tensor
    probabilities: Tensor | None
    settings: dict[str, Any]
    images: Tensor = picture()
    mean: Tensor | None = picture(default=None)
    std: Tensor | None = picture(default=None)

    @property
    def pictures(self) -> Tensor:
        """(K, C, H, W), ``images * std + mean``: the training mean added, in the units of the pixels before they were
        normalised. Not clipped to what a screen shows."""
        shown = self.images if self.std is None else self.images * self.std
        return shown if self.mean is None else shown + self.mean

    def figure(self) -> Figure:
        """The scores over the steps; a dot where the image was taken."""
        figure = new_figure(6.4, 3.6)
        axes = figure.subplots()
        few = len(self.targets) <= 12
        for k, (curve, at) in enumerate(zip(self.scores.tolist(), self.kept.tolist(), strict=True)):
            colour = f"C{k % 10}" if few else "0.5"
            line = "-" if k < 10 else "--"
            label = self._title(k, None) if few else None
            axes.plot(curve, line, color=colour, label=label, linewidth=1.2 if few else 0.6)
            axes.plot(at, curve[at], "o", color=colour, markersize=4)
        axes.set_xlabel("Steps")
        axes.set_ylabel("Score")
        if few and self.targets:
            axes.legend(fontsize=7, ncols=2)
        return figure

    def sheet(
        self,
        names: Sequence[str] | None = None,
        *,
        white: float = 1.0,
        columns: int = 6,
        width: int = 128,
        title: str = "",
        note: str = "",
    ) -> Image:
        """The pictures, each with its target and the probability or the score.

        names: of the classes or channels.  white: what the pictures' white is, 1 or 255, where a mean was given;
        without one, grey is 0 and each picture has a scale of its own.
        """
        shown = self.pictures.float().cpu().numpy()
        panels = []
        for k, values in enumerate(shown):
            if self.mean is None:
                values = three_channels(values)
                pixels = signed_rgb(values, colour_limit(values))
            else:
                channels = len(values)
                pixels = denormalised(values, [0.0] * channels, [1.0 / white] * channels)
            value = float(self.scores[k, self.kept[k]])
            caption = f"score {number(value)}"
            if self.probabilities is not None:
                caption = f"{_share(float(self.probabilities[k]))}\n{caption}"
            panels.append(Panel(pixels, f"{self._title(k, names)}\n{caption}", photograph=True))
        rows = [Row(panels[start : start + columns]) for start in range(0, len(panels), columns)]
        return sheet(rows, title=title, note=note, width=width)

    def plot_sheet(self, path: str | Path, **options: Any) -> None:
        """Write :meth:`sheet` into a file."""
        write_picture(path, self.sheet(**options))

    def _title(self, k: int, names: Sequence[str] | None) -> str:
        target = self.targets[k]
        if target is None:
            return self.layer or "output"
        first, *rest = (target,) if isinstance(target, int) else target
        name = f"{'class' if self.layer is None else 'channel'} {first}"
        if names is not None and first < len(names):
            name = names[first]
        return f"{name} at {', '.join(map(str, rest))}" if rest else name


def _share(probability: float) -> str:
    """Three decimals, and never 1."""
    return f"p = {probability:.3f}" if probability < 0.9995 else "p > 0.999"


class _Options(NamedTuple):
    steps: int
    lr: float
    l2: float
    jitter: int
    blur_every: int
    blur_sigma: float
    normalise: bool
    keep: str


class ClassModel:
    """Makes images that maximise scores of a model, or the activations of one of its layers.

    Args:
        model: a module whose output is one tensor of unnormalised scores ``(N, classes)``. Its parameters are
            constants; one in training mode is evaluated in evaluation mode without being changed.
        layer: a module of it or its name, to maximise its output instead.

    Raises AssertionError for what is no module, ValueError for an unknown layer.
    """

    def __init__(self, model: nn.Module, layer: nn.Module | str | None = None) -> None:
        check_module(model)
        self.model = model
        self.layer: str | None = None
        self._module = None
        if layer is not None:
            reader = LayerReader(model, [layer])
            self.layer, self._module = reader.names[0], reader.modules[0]

    def generate(
        self,
        targets: Targets,
        steps: int = 100,
        lr: float = 25.0,
        l2: float = 1e-3,
        jitter: int = 16,
        blur_every: int | None = 10,
        blur_sigma: float = 0.5,
        init: str | Tensor = "zero",
        mean: float | Sequence[float] | Tensor | None = None,
        seed: int = 0,
        *,
        std: float | Sequence[float] | None = None,
        size: Sequence[int] | None = None,
        normalise: bool = True,
        keep: str = "best",
        batch_size: int = 32,
        progress: bool = False,
    ) -> Synthesis:
        """Ascends score(I) - l2 * ||I||^2 from the zero image, for each of K targets.

        Each step shifts the image by a random offset (what leaves one border enters at the other), takes the
        gradient there, shifts it back and adds it, less the penalty's, at a length of its own; now and then the image
        is blurred. An image depends on the seed and its target alone (and on how often the target stands before it,
        so that equal targets give different images), not on the others of its batch, but for rounding. The forward ends
        at the layer; the backward is that of ``backward_rule("gradient")``.

        Args:
            targets: one target or a list of K. Of the model: classes (an integer tensor, too). Of a layer, or of a
                model with maps as output: a channel, whose mean over positions is maximised; a tuple, the index of a
                unit, such as ``(channel, y, x)``; None: the sum of the squares of the whole layer, which is DeepDream's
                objective. Negative indices count from the end.
            steps: at least 1.
            lr: length of a step (Euclidean, over all values of an image), in the units of the network's input.
            l2: the penalty's weight, at least 0.
            jitter: greatest offset in pixels, up, down, left and right; 0 for none. The offsets of step t of T are
                drawn from those up to jitter * (t / T)**2, so that the first steps agree on where things are.
            blur_every: after every so many steps but the last the image is blurred; 0 or None for never.
            blur_sigma: of the Gaussian, in pixels, cut off at 4 sigma.
            init: "zero"; "noise", normal of deviation 0.1, seeded as the offsets are; or a tensor ``(C, H, W)``, or
                ``(K, C, H, W)`` with an image for each target (a single target then serves all).
            mean, std: of the network's preprocessing ``(x - mean) / std``, for ``pictures``, which are
                ``images * std + mean``: a number or one a channel, the mean also an image ``(C, H, W)``, all in the
                units of x. For networks that were only freed of the mean, as in the paper, leave ``std`` out.
                They do not change the ascent: the zero image is the mean picture in either case. (The penalty weighs
                the network's input, so in the units of x it weighs a channel of small deviation more.)
            size: ``(C, H, W)`` of an image; None: that of ``init``, else (3, 224, 224).
            normalise: whether a step is ``lr`` long whatever the gradient, so that networks of any scale of scores
                behave alike; False: the step is ``lr`` times the gradient, plain gradient ascent, which converges where
                ``lr`` is small enough.
            keep: "last": the image after all steps. "best": that of the second half of the steps whose class has the
                greatest odds, p / (1 - p) by softmax, or, where the score is not a class's, the greatest objective.
                Under shifts the score does not rise at each step, and a similar class may come up with it for a few.
            batch_size: images at once.
            progress: show the steps, summed over images, and the time left on stderr.

        Returns:
            The images and scores in float64 for a model in float64, else in float32.

        Raises TypeError or ValueError for arguments that make no sense, IndexError for a target out of range, all
        before the first step; AssertionError for a layer that does not run; FloatingPointError for a score
        that is not finite. Warns (UserWarning) if outputs look like probabilities, and about targets whose score has no
        gradient.
        """
        options = _Options(
            steps=integer("steps", steps, 1),
            lr=_real("lr", lr, positive=True),
            l2=_real("l2", l2),
            jitter=integer("jitter", jitter, 0),
            blur_every=integer("blur_every", blur_every or 0, 0),
            blur_sigma=_real("blur_sigma", blur_sigma),
            normalise=bool(normalise),
            keep=keep,
        )
        if not isinstance(keep, str) or keep not in KEEPS:
            raise ValueError(f"keep must be one of {', '.join(map(repr, KEEPS))}, but it is {keep!r}.")
        seed, batch_size = integer("seed", seed, 0), integer("batch_size", batch_size, 1)
        given = _target_list(targets)
        device, dtype = self._kind(init)
        shape, start = _start(init, size, given)
        if start is not None and start.dim() == 4 and len(given) == 1:
            given = given * len(start)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        mean_shown = _shown("mean", mean, shape, wide, device)
        std_shown = _shown("std", std, shape, wide, device)

        with evaluation_copy(self.model, [] if self._module is None else [self._module]) as (model, layers):
            ascent = _Ascent(model, layers[0] if layers else None, dtype, options)
            found = ascent.output(torch.zeros(1, *shape, dtype=wide, device=device))
            resolved = _resolve(given, found.shape[1:])
            classes = self.layer is None and found.dim() == 2 and found.shape[1] > 1 and bool(resolved)
            if classes and (found >= 0).all() and abs(float(found.sum()) - 1) < 1e-3:
                warnings.warn(
                    "The model's outputs look like probabilities: they are maximised also by what lowers the other "
                    "classes. A class model is made of the unnormalised scores before the softmax.",
                    UserWarning,
                    stacklevel=2,
                )
            seeds = _seeds(resolved, seed)
            parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
            with Progress(len(resolved) * options.steps, "steps", progress, "synthesis") as bar:
                for first in range(0, len(resolved), batch_size):
                    rows = slice(first, first + batch_size)
                    select = _Select(resolved[rows], found.shape[1:], classes, device)
                    begin = _begin(start, shape, rows, seeds[rows], init, wide, device)
                    parts.append(ascent.run(begin, _offsets(seeds[rows], options), select, bar))
        if parts:
            images, curves, kept, probabilities = map(torch.cat, zip(*parts, strict=True))
        else:
            images, curves = torch.empty(0, *shape), torch.empty(0, options.steps + 1)
            kept, probabilities = torch.empty(0, dtype=torch.int64), torch.empty(0)
        _check_finite(curves, resolved)
        settings = {**options._asdict(), "init": init if isinstance(init, str) else "tensor", "seed": seed}
        settings |= {"size": list(shape), "mean": _listed(mean), "std": _listed(std)}
        return Synthesis(
            layer=self.layer,
            targets=resolved,
            scores=curves,
            kept=kept,
            probabilities=probabilities if classes else None,
            settings=settings,
            images=images,
            mean=mean_shown,
            std=std_shown,
        )

    def _kind(self, init: Any) -> tuple[torch.device, torch.dtype]:
        """Of the images: the model's, or those of the start for a model without floating parameters."""
        tensors = (*self.model.parameters(), *self.model.buffers(), init)
        found = next((t for t in tensors if isinstance(t, Tensor) and t.is_floating_point()), torch.empty(0))
        return found.device, found.dtype


class _Select:
    """The scores (n,) of n examples in an output (n, ...), one target each, all of one kind."""

    def __init__(
        self, targets: Sequence[One], shape: Sequence[int], classes: bool, device: torch.device
    ) -> None:
        self.targets, self.classes = targets, classes
        self._rows = torch.arange(len(targets), device=device)
        self._places: Tensor | None = None
        self._units = isinstance(targets[0], tuple)
        self._single = math.prod(shape) == 1
        if self._units:
            places = [int(np.ravel_multi_index(target, tuple(shape))) for target in targets]
            self._places = torch.tensor(places, device=device)
        elif targets[0] is not None:
            self._places = torch.tensor(targets, device=device)

    def __call__(self, output: Tensor) -> Tensor:
        count = len(self._rows)
        output = output if output.dtype == torch.float64 else output.float()
        if self._places is None:
            values = output.reshape(count, -1)
            return values[:, 0] if self._single else values.square().sum(1)
        if self._units:
            return output.reshape(count, -1)[self._rows, self._places]
        return output[self._rows, self._places].reshape(count, -1).mean(1)

    def log_odds(self, output: Tensor) -> Tensor:
        """log(p / (1 - p)) of the targets by softmax, which goes on rising where p is 1 in floating point."""
        output = output if output.dtype == torch.float64 else output.float()
        assert self._places is not None
        others = output.scatter(1, self._places[:, None], -math.inf).logsumexp(1)
        return self(output) - others


class _Ascent:
    """Gradient ascent of one model or layer."""

    def __init__(
        self, model: nn.Module, layer: nn.Module | None, dtype: torch.dtype, options: _Options
    ) -> None:
        self.options, self._dtype = options, dtype
        self._engine: GradientAttribution
        if layer is None:
            self._engine = GradientAttribution(model)
            self._forward = self._engine._forward
        else:
            self._engine = NeuronAttribution(model, layer)
            self._forward = self._engine._to_layer(False)

    def output(self, images: Tensor) -> Tensor:
        """The model's or the layer's output, without gradients."""
        found: list[Any] = []

        def forward(session: Any, xs: tuple[Tensor, ...], args: Any) -> Any:
            with torch.no_grad():
                found.append(self._forward(session, xs, args))

        self._engine._attribute(images.to(self._dtype), None, lambda _, xs: xs, forward)
        return _tensor(found[-1])

    def gradient(self, images: Tensor, score: Score) -> tuple[Tensor, Tensor]:
        """The output and the gradient of the scores by the images."""
        found: list[Tensor] = []

        def differentiate(output: Any, xs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            found.append(output.detach())
            return gradients(score(output), xs)

        gradient = self._engine._attribute(images.to(self._dtype), None, differentiate, self._forward)
        assert isinstance(gradient, Tensor)
        return found[-1], gradient.to(images.dtype)

    def run(
        self, images: Tensor, offsets: Tensor, select: _Select, bar: Progress
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """n images, their scores (n, steps + 1), the steps after which they were taken, their probabilities."""
        options, count = self.options, len(images)
        offsets = offsets.to(images.device)
        scores = images.new_empty(count, options.steps + 1)
        best, merit = images, images.new_full((count,), -math.inf)
        kept = torch.full((count,), options.steps, device=images.device)
        driven = torch.zeros(count, dtype=torch.bool, device=images.device)
        for step in range(options.steps + 1):
            last = step == options.steps
            if not last:
                seen, gradient = self.gradient(shifted(images, offsets[:, step]), select)
                gradient = shifted(gradient, -offsets[:, step])
                driven |= gradient.flatten(1).any(1)
            # The score of the image itself: the shifted one has another.
            output = self.output(images) if last or options.jitter else seen
            scores[:, step] = select(output)
            if options.keep == "best" and 2 * step >= options.steps and step:
                now = select.log_odds(output) if select.classes else self._objective(scores[:, step], images)
                better = now >= merit
                merit = torch.where(better, now, merit)
                kept = torch.where(better, step, kept)
                best = torch.where(better[:, None, None, None], images, best)
            if last:
                break
            images = images + self._step(gradient - 2 * options.l2 * images)
            if options.blur_every and (step + 1) % options.blur_every == 0 and step + 1 < options.steps:
                images = self._blurred(images)
            bar.advance(count)
        for target in (t for t, moved in zip(select.targets, driven.tolist(), strict=True) if not moved):
            warnings.warn(
                f"The score of the target {target!r} had no gradient at any step, so nothing drives its image; "
                "another init may.",
                UserWarning,
                stacklevel=3,
            )
        if options.keep == "last":
            best = images
        probabilities = scores.new_full((count,), math.nan)
        if select.classes:
            probabilities = select(self.output(best).to(scores.dtype).softmax(1))
        return best, scores, kept, probabilities

    def _objective(self, scores: Tensor, images: Tensor) -> Tensor:
        return scores - self.options.l2 * images.flatten(1).square().sum(1)

    def _step(self, direction: Tensor) -> Tensor:
        if not self.options.normalise:
            return self.options.lr * direction
        # By the greatest value first, so that the squares of small gradients do not vanish.
        greatest = direction.abs().amax((1, 2, 3), keepdim=True)
        direction = direction / torch.where(greatest > 0, greatest, 1)
        length = direction.square().sum((1, 2, 3), keepdim=True).sqrt()
        direction = direction / torch.where(length > 0, length, 1)
        return self.options.lr * direction

    def _blurred(self, images: Tensor) -> Tensor:
        sigma = self.options.blur_sigma
        half = int(4 * sigma + 0.5)
        return gaussian_blur(images, sigma, 2 * half + 1) if half else images


def shifted(images: Tensor, offsets: Tensor) -> Tensor:
    """Images (N, C, H, W), each rolled down and to the right by its own offset, (N, 2) in pixels."""
    count, channels, height, width = images.shape

    def places(size: int, by: Tensor) -> Tensor:
        return (torch.arange(size, device=images.device) - by[:, None]) % size

    examples = torch.arange(count, device=images.device)[:, None, None, None]
    maps = torch.arange(channels, device=images.device)[None, :, None, None]
    rows, columns = places(height, offsets[:, 0]), places(width, offsets[:, 1])
    return images[examples, maps, rows[:, None, :, None], columns[:, None, None, :]]


# ------------------------------------------------------------------------------------------ arguments


def _real(name: str, value: Any, positive: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, but it is {value!r}.")
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        raise ValueError(
            f"{name} must be finite and {'above' if positive else 'at least'} 0, but it is {value}."
        )
    return float(value)


def _target_list(targets: Any) -> list[Any]:
    """Targets as a list; what is in it is looked at in :func:`_resolve`, once the output's shape is known."""
    if isinstance(targets, Tensor | np.ndarray):
        kind = str(targets.dtype)
        if "int" not in kind or targets.ndim > 1:
            raise TypeError(
                "Targets in a tensor are integers in the shape (K,), "
                f"but they are {kind} in the shape {tuple(targets.shape)}."
            )
        targets = targets.tolist()
    several = isinstance(targets, Sequence) and not isinstance(targets, str | tuple)
    targets = list(targets) if several else [targets]
    for target in targets:
        parts = target if isinstance(target, tuple) else () if target is None else (target,)
        if any(isinstance(p, bool) or not isinstance(p, numbers.Integral) for p in parts) or target == ():
            raise TypeError(f"A target is an int, a tuple of ints or None, but one is {target!r}.")
    if len({type(target) if target is None or isinstance(target, tuple) else int for target in targets}) > 1:
        raise ValueError(f"Targets must be of one kind (ints, tuples or None), but they are {targets!r}.")
    return targets


def _resolve(targets: list[Any], shape: Sequence[int]) -> list[One]:
    """Targets counted from 0, of an output of one example with ``shape``. Raises ValueError or IndexError."""
    resolved: list[One] = []
    for target in targets:
        if target is None:
            resolved.append(None)
            continue
        index = target if isinstance(target, tuple) else (target,)
        if isinstance(target, tuple) and len(target) != len(shape):
            raise ValueError(
                f"A unit's index in an output of the shape {tuple(shape)} takes {len(shape)} ints, "
                f"but it is {target!r}."
            )
        if not shape:
            raise ValueError(
                f"The output is one score an example, which has no target {target!r}: give None."
            )
        for part, extent in zip(index, shape, strict=False):
            if not -extent <= part < extent:
                raise IndexError(f"Target {target!r} is out of range: an example's output is {tuple(shape)}.")
        index = tuple(int(part) % extent for part, extent in zip(index, shape, strict=False))
        resolved.append(index if isinstance(target, tuple) else index[0])
    return resolved


def _start(init: Any, size: Any, targets: list[Any]) -> tuple[tuple[int, ...], Tensor | None]:
    """An image's shape, and the start where it is given."""
    shape = None
    if size is not None:
        if not isinstance(size, Sequence) or isinstance(size, str) or len(size) != 3:
            raise ValueError(f"size must be (channels, height, width), but it is {size!r}.")
        shape = tuple(integer("size", extent, 1) for extent in size)
    if isinstance(init, str):
        if init not in INITS:
            raise ValueError(
                f"init must be a tensor or one of {', '.join(map(repr, INITS))}, but it is {init!r}."
            )
        return shape or (3, 224, 224), None
    if not isinstance(init, Tensor):
        raise TypeError(f"init must be a tensor or one of {', '.join(map(repr, INITS))}, but it is {init!r}.")
    if not init.is_floating_point() or init.dim() not in (3, 4) or not math.prod(init.shape[-3:]):
        raise ValueError(
            "init must hold floating-point images in the shape (C, H, W) or (K, C, H, W), "
            f"but it is {init.dtype} in the shape {tuple(init.shape)}."
        )
    if shape is not None and tuple(init.shape[-3:]) != shape:
        raise ValueError(f"size is {shape}, but init has the shape {tuple(init.shape)}.")
    if init.dim() == 4 and len(targets) not in (1, len(init)):
        raise ValueError(f"init holds {len(init)} images for {len(targets)} targets.")
    return tuple(init.shape[-3:]), init.detach()


def _shown(
    name: str, value: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """A mean or deviation that broadcasts to an image."""
    if value is None:
        return None
    try:
        found = torch.as_tensor(value).detach().to(device, dtype)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"{name} must be a number, one number a channel or an image, but it is {value!r}."
        ) from None
    if found.dim() == 1 and len(found) in (1, shape[0]):
        found = found[:, None, None]
    elif found.dim() and tuple(found.shape) not in (shape, (shape[0], 1, 1)):
        raise ValueError(
            f"{name} must be a number, one for each of {shape[0]} channels or an image {shape}, "
            f"but its shape is {tuple(found.shape)}."
        )
    if not found.isfinite().all() or (name == "std" and not (found > 0).all()):
        raise ValueError(
            f"{name} must be {'positive and ' if name == 'std' else ''}finite, but it is {value!r}."
        )
    return found


def _listed(value: Any) -> Any:
    """Of a mean or deviation for the settings: numbers, but of an image its shape alone."""
    if value is None:
        return None
    found = value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64)
    return found.tolist() if found.numel() <= 16 else f"an image of the shape {tuple(found.shape)}"


# ------------------------------------------------------------------------------------------ random numbers


def _seeds(targets: Sequence[One], seed: int) -> list[tuple[Any, ...]]:
    """What each item's random numbers hang on: the seed, its target and how many equal ones come before it."""
    before: dict[One, int] = {}
    found = []
    for target in targets:
        found.append((seed, target, before.setdefault(target, 0)))
        before[target] += 1
    return found


def _generator(what: str, item: tuple[Any, ...]) -> torch.Generator:
    return torch.Generator().manual_seed(int(digest(what, item), 16))


def _offsets(items: Sequence[tuple[Any, ...]], options: _Options) -> Tensor:
    """(n, steps, 2), drawn on the CPU and so the same on every device."""
    # Near the zero image the gradients at far offsets disagree, and steps of one length undo each other.
    part = torch.arange(1, options.steps + 1, dtype=torch.float64)[:, None] / options.steps
    reach = (options.jitter * part.square()).round()
    draws = [
        torch.rand(options.steps, 2, generator=_generator("jitter", item), dtype=torch.float64)
        for item in items
    ]
    return ((2 * reach + 1) * torch.stack(draws)).floor().long() - reach.long()


def _begin(
    start: Tensor | None,
    shape: tuple[int, ...],
    rows: slice,
    items: Sequence[tuple[Any, ...]],
    init: Any,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """The images (n, C, H, W) of these items before the first step."""
    if start is not None:
        own = start[rows] if start.dim() == 4 else start.expand(len(items), *shape)
        return own.to(device, dtype).clone(memory_format=torch.contiguous_format)
    if init == "zero":
        return torch.zeros(len(items), *shape, dtype=dtype, device=device)
    draws = [torch.randn(shape, generator=_generator("noise", item)) for item in items]
    return NOISE * torch.stack(draws).to(device, dtype)


def _tensor(output: Any) -> Tensor:
    if not isinstance(output, Tensor) or output.dim() < 1 or not output.is_floating_point():
        raise TypeError(
            f"The model or layer must give one floating-point tensor (N, ...), but it gave {type(output)}."
        )
    return output


def _check_finite(scores: Tensor, targets: Sequence[One]) -> None:
    for target, steps in zip(targets, (~scores.isfinite()).cpu(), strict=True):
        if steps.any():
            first = int(steps.nonzero()[0, 0])
            raise FloatingPointError(
                f"The score of the target {target!r} is not finite after {first} steps: lower lr or l2."
            )
