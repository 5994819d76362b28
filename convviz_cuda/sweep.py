"""The occlusion sweep: the scores of a model for every image with an occluder at every position, exact and
incremental.

An occluder changes a rectangle of the image, and each layer needs only the rectangle that this change
reaches. The clean images run once, and their activations are kept; for each window only rectangles are
computed, many windows at a time, with what surrounds them read from the clean activations. Models that
cannot be captured run on whole masked images: the same numbers, only slower.

Source: Zeiler & Fergus, "Visualizing and Understanding Convolutional Networks" (2013), section 4.2.
"""

from __future__ import annotations

import contextlib
import copy
import math
import numbers
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from . import window_ops as ops
from ._evaluated import evaluated, modules_behind, warn_of_training
from ._peak_bytes import PeakBytes
from ._sweep_engines import BruteForce, Incremental, Part, check_limit
from ._sweep_plan import window_spans
from .checks import check_images, check_int, check_real
from .fills import Fill, fill_values
from .network import CannotCapture, Network, capture, is_current, rows_agree, sampled
from .progress import Progress

MEMORY = {"cpu": 1 << 30, "cuda": 4 << 30}


class Maps(NamedTuple):
    """Zeiler & Fergus's three maps, each (B, R, Q)."""

    probability: Tensor
    label: Tensor
    activation: Tensor


def occlusion_sweep(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    window: int | tuple[int, int] | list[int | tuple[int, int]],
    stride: int | tuple[int, int],
    *,
    fill: Fill = 0.0,
    targets: Sequence[int] | None = None,
    border: str = "clip",
    seed: int = 0,
    memory_limit: int | None = None,
    dtype: torch.dtype | None = None,
    tf32: bool = False,
    refine: int | None = None,
    refine_tolerance: float = 0.1,
    incremental: bool = True,
    progress: bool = False,
) -> OcclusionSweep | list[OcclusionSweep]:
    """Slide an occluder over images: the model's scores for every image and every position of the window.

    Only the clean images run now, with ``refine`` the coarse grid's windows too, and with ``dtype`` a sample of 16.
    The windows run when the result's first map or score is asked for, in chunks; what the result was asked for
    before is remembered, and an interrupted pass goes on where it stopped.

    A model that is changed in between is refused with a RuntimeError, as far as that shows: by its parameters'
    versions, by some of their values (writes through ``.data`` have no version; of a parameter of more than 1024
    values only so many are looked at), and by the clean scores of what runs on masked images.

    Args:
        model: images (N, C, H, W) -> scores (N, K) or (N,), each image's scores independent of the others'.
            A module in evaluation mode is captured and swept incrementally (see
            :meth:`OcclusionSweep.explain`); any other callable runs on masked images. In training mode, of
            which a UserWarning tells, it runs as it is, on one position of all images at a time; its buffers
            (also behind a partial or a method) and PyTorch's random state are put back, and random layers
            draw the same numbers in each forward.
        images: (B, C, H, W), floating point, on the model's device.
        window: the occluder's side or (height, width) in pixels; a *list* of these gives a list of sweeps.
        stride: between windows in pixels, an int or (vertical, horizontal).
        fill: what the occluder shows (see :func:`fill_values`).
        targets: compute these classes only, each once (negative ones count from the end): less work, less to
            keep.
        border: "clip": the last window of a row or column is cut off at the image's border, as Captum does
            it; "inside": whole windows only.
        seed: of the "noise" fill, from 0 to ``2**31 - 1``.
        memory_limit: bytes that the sweep may hold besides the images, the network's weights and the
            results, but for the model's own first run on the clean images, which takes them all at once. None: 1 GiB
            on the CPU and 4 GiB on a GPU, or what one window needs.
        dtype: torch.bfloat16 or torch.float16: compute in that dtype; ``.error`` then says what it cost.
        tf32: allow TF32 on the GPU (the error of single precision is 1e3 times smaller).
        refine: opt in to sampling: evaluate every ``refine``-th window first, all windows only where the
            coarse map varies by more than ``refine_tolerance`` of its range, and interpolate the rest;
            ``.evaluated`` says which were evaluated. The map that decides is that of the class which the clean
            image is taken for, or with ``targets`` those of all of them: the maps of other classes, labels and
            activations may vary where it does not, and are interpolated there all the same.
        incremental: False forces whole masked images.
        progress: show windows done and the time left on stderr.

    Raises:
        TypeError, ValueError: arguments of the wrong kind, a window larger than the image, an unknown fill
            or border, a memory limit that not even one window fits into; the model's output is not (N, K).
        IndexError: a target out of range.
    """
    sizes = window if isinstance(window, list) else [window]
    if not sizes:
        raise ValueError("window must name at least one size, but it is an empty list.")
    for module in modules_behind((model,)):
        warn_of_training(module, "a position's scores belong to all images together", stacklevel=3)
    sweeps = [
        OcclusionSweep(
            model, images, each, stride, fill, targets, border, seed, memory_limit, dtype, tf32, refine,
            refine_tolerance, incremental, progress,
        )
        for each in sizes
    ]  # fmt: skip
    return sweeps if isinstance(window, list) else sweeps[0]


class OcclusionSweep:
    """The scores of images under a sliding occluder; made by :func:`occlusion_sweep`.

    Attributes:
        shape: (B, R, Q): images, rows and columns of the window grid.
        spans: the rows (R, 2) and columns (Q, 2) that the windows cover: first pixel, and the one behind the
            last.
        clean: (B, K), the scores of the clean images.
        evaluated: (B, R, Q), bool: which positions were evaluated (all, unless ``refine`` was given).
        error: with a ``dtype``: the largest difference to the images' own dtype over a sample of windows, as
            a part of the scores' range.
    """

    def __init__(
        self, model, images, window, stride, fill, targets, border, seed, memory_limit, dtype, tf32, refine,
        refine_tolerance, incremental, progress,
    ) -> None:  # fmt: skip
        _check_arguments(model, images, border, memory_limit, dtype, refine, refine_tolerance)
        check_int("seed", seed, 0, 2**31 - 1)
        height, width = _two_ints("window", window)
        self.window, self.stride, self.border = (height, width), tuple(_two_ints("stride", stride)), border
        for name, side, most in (("high", height, images.shape[2]), ("wide", width, images.shape[3])):
            if side > most:
                raise ValueError(
                    f"window must fit into the image, but it is {side} pixels {name} and the image {most}."
                )
        self.spans = tuple(
            window_spans(size, side, step, border)
            for size, side, step in zip(images.shape[2:], self.window, self.stride, strict=True)
        )
        self.shape = (images.shape[0], len(self.spans[0]), len(self.spans[1]))
        self._original = images.detach().clone()  # what the caller does to his later changes nothing
        fill = fill_values(self._original, fill, seed).clone()
        dtype = None if dtype == images.dtype else dtype
        self._images = self._original if dtype is None else self._original.to(dtype)
        self._fill = fill
        self._model, self._tf32, self._progress = model, tf32, progress
        limit = memory_limit if memory_limit is not None else MEMORY.get(images.device.type, 1 << 30)
        self.memory_limit = int(limit)
        self._limited = memory_limit is not None  # or else it may be exceeded, where one window needs more
        self._results: dict[Any, Tensor] = {}
        self._passes: dict[Any, _Pass] = {}
        self._known: list[Part] = []  # the scores of the coarse grid, with ``refine``
        self._lock = threading.RLock()
        self._captured: Network | None = None
        self._whole: BruteForce | None = None  # for layers that the captured network does not have
        device = images.device.type
        self._autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        self.error: float | None = None
        with torch.no_grad(), _precision(tf32):
            self._engine: Incremental | BruteForce = self._choose(incremental, targets, dtype)
        self._refined = refine
        if refine is not None:
            self._refine(int(refine), refine_tolerance)
        else:
            self.evaluated = torch.ones(self.shape, dtype=torch.bool)
        if dtype is not None:
            self._measure_error()

    # -- what serves the sweep

    def _choose(self, incremental: bool, targets: Sequence[int] | None, dtype: torch.dtype | None) -> Any:
        images = self._original
        why = "incremental=False" if not incremental else ""
        if incremental and torch.is_autocast_enabled(images.device.type):
            why = "autocast is on"
        tried = not why and isinstance(self._model, nn.Module) and images.numel() > 0
        reference = self._own_scores(self._under_a_window() if tried else None)
        classes = reference.shape[1]
        self.classes = _class_list(targets, classes)
        self._column = None if self.classes is None else {c: i for i, c in enumerate(self.classes)}
        self._count = classes
        engine: Any = None
        if not why and images.shape[0] and images.numel():
            try:
                engine = self._incremental(reference, dtype)
            except CannotCapture as error:
                why = str(error)
        if engine is None:
            self._captured = None
            if dtype is not None and len(images):
                raise ValueError(
                    f"dtype={dtype} needs a model that can be captured, but here it cannot: {why}"
                )
            reference = self._own_scores() if tried else reference
            reference = reference if dtype is None else reference.to(dtype)
            engine = self._brute_force(reference, why or "there are no images")
        self.clean = engine.clean if isinstance(engine, Incremental) else self._select(reference)
        self._weights = self._weights_now()
        return engine

    def _own_scores(self, images: Tensor | None = None) -> Tensor:
        """The model's scores of the clean or these images, in the layout in which it is faster if it bears that."""
        model, images = self._model, self._original if images is None else images
        evaluates = isinstance(model, nn.Module) and not any(m.training for m in model.modules())
        if evaluates and self._original.device.type == "cpu" and self._original.numel():
            try:
                return self._measured(images, torch.channels_last)
            except Exception:  # if it is broken, its error comes again
                pass
        return self._measured(images, torch.preserve_format)

    def _measured(self, images: Tensor, layout: torch.memory_format) -> Tensor:
        """The model's scores of images; ``_bytes_each``: what it holds for one of them besides."""
        with PeakBytes(self._limited) as peak:
            scores = self._forward(self._model, images.clone(memory_format=layout))
        # Not measured, forty times its input is common.
        own = images[:1].nbytes
        self._bytes_each = own - (-peak.bytes // max(1, len(images))) if self._limited else 40 * own
        return scores

    def _incremental(self, reference: Tensor, dtype: torch.dtype | None) -> Incremental:
        for again in (False, True):
            self._captured = network = capture(self._model, self._original, again=again)
            # What was captured must give the model's own scores; a forward of the clean images is needed
            # anyway.
            engine = None if dtype is not None else Incremental(self, network)
            clean = self._as_scores(network.run(self._original)[0]) if engine is None else engine.clean
            if self._agrees(network, engine, clean, reference):
                break
        else:
            raise CannotCapture(
                "The captured layers do not give the model's own scores (does it change from call to call?)."
            )
        if engine is None:
            narrow = network.remember(
                ("dtype", dtype), lambda: capture(copy.deepcopy(self._model).to(dtype), self._images)
            )
            engine = Incremental(self, narrow)
        return engine

    def _under_a_window(self) -> Tensor:
        """The clean images, the first one with its middle window hidden: clean images do not show everything."""
        images = self._original.clone()
        (top, bottom), (left, right) = (spans[len(spans) // 2].tolist() for spans in self.spans)
        fill = self._fill[:1].expand_as(images[:1])
        images[:1, :, top:bottom, left:right] = fill[:, :, top:bottom, left:right]
        return images

    def _agrees(self, network: Network, engine: Incremental | None, clean: Tensor, reference: Tensor) -> bool:
        """Whether what was captured gives the model's scores of the images :meth:`_under_a_window`."""
        if engine is None:
            shown = self._as_scores(network.run(self._under_a_window()[:1])[0], 1)
        else:
            mask = torch.zeros(self.shape, dtype=torch.bool)
            mask[0, self.shape[1] // 2, self.shape[2] // 2] = True
            shown = engine.scores_of(mask)
        select = self._select if engine is not None else lambda scores: scores
        # A window over most of the image hides what changed elsewhere.
        large = 2 * math.prod(self.window) > math.prod(self._original.shape[2:])
        return rows_agree(torch.cat([shown, clean[1:]]), select(reference)) and (
            not large or rows_agree(clean, select(self._own_scores()))
        )

    def _crowd_agrees(self, reference: Tensor, layout: torch.memory_format) -> bool:
        """Whether images in this layout may be evaluated together with others: quite different neighbours
        change nothing."""
        images = self._images
        count = 2 * len(images)
        if self._limited:
            count = max(1, min(count, self.memory_limit // max(1, self._bytes_each)))
        own = -(-count // 2)
        crowd = torch.cat([images[:own], images.flip(0)[: count - own] * -2]).contiguous(memory_format=layout)
        try:
            return rows_agree(self._forward(self._model, crowd)[:own], reference[:own])
        except Exception:  # whatever the model makes of a larger batch
            return False

    def _brute_force(self, reference: Tensor, why: str) -> BruteForce:
        engine = self._whole_images(reference, why)
        if self._limited:
            check_limit(self.memory_limit, self._bytes_each * (1 if engine.together else len(self._images)))
        return engine

    def _whole_images(self, reference: Tensor, why: str) -> BruteForce:
        modules = self._model.modules() if isinstance(self._model, nn.Module) else ()
        if any(module.training for module in modules):  # another batch would go into its statistics
            return BruteForce(self, self._model, False, why)
        layouts = [torch.contiguous_format]
        if self._images.device.type == "cpu":  # where convolutions are much faster in the other one
            layouts.insert(0, torch.channels_last)
        for layout in layouts:
            if self._crowd_agrees(reference, layout):
                return BruteForce(self, self._model, True, why, self._images.contiguous(memory_format=layout))
        return BruteForce(self, self._model, False, why)

    def _forward(self, model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """Scores (N, K); the model may write to its input, so that images which are still needed come as a copy.

        Its buffers and PyTorch's random state stay as they are; random numbers are the same in each forward.
        """
        with evaluated(model, so=None) as run:
            return self._as_scores(run(images), len(images))

    def _as_scores(self, scores: Any, count: int | None = None) -> Tensor:
        count = self.shape[0] if count is None else count
        if not isinstance(scores, Tensor):
            raise TypeError(
                f"The model must return a tensor of scores, but it returned a {type(scores).__name__}."
            )
        if scores.dim() not in (1, 2) or scores.shape[0] != count:
            raise ValueError(
                f"The model must return scores (N, K) or (N,) for N = {count} images, "
                f"but it returned {tuple(scores.shape)}."
            )
        return scores.detach().unsqueeze(1) if scores.dim() == 1 else scores.detach()

    def _select(self, scores: Tensor) -> Tensor:
        return scores if self.classes is None else scores[:, self.classes]

    # -- results

    def scores(self) -> Tensor:
        """(B, R, Q, K): all scores of all positions (of the classes in ``targets`` where given), on the
        images' device."""
        return self._gather(_SCORES)[0]

    def reduce(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """(B, R, Q, ...): ``function`` of each chunk's scores, (n, K) -> (n, ...), without ever holding all
        scores. ValueError where its result is not one of n windows.

        The result is not remembered. An interrupted pass goes on where the next call has the same function object.
        """
        return self._gather({function: _Reduction(lambda part: _each_window(function, part.scores))})[0]

    def score_map(self, target: int | Sequence[int] | Tensor) -> Tensor:
        """(B, R, Q): the score of the target class (one for all images, or one an image)."""
        column = self._target_columns(target)
        return self._gather(
            {("score", *column.tolist()): _Reduction(lambda p: _pick(p.scores, column, p.image))}
        )[0]

    def probability_map(self, target: int | Sequence[int] | Tensor) -> Tensor:
        """(B, R, Q): the softmax probability of the target class at each position: Zeiler & Fergus, figure 7
        (d)."""
        return self._gather(self._probability(target))[0]

    def label_map(self) -> Tensor:
        """(B, R, Q), int64: the class of the highest score at each position: Zeiler & Fergus, figure 7
        (e)."""
        return self._gather(self._label())[0]

    def activation_map(self, layer: str, channel: int | str | Sequence[int] = "strongest") -> Tensor:
        """(B, R, Q): a feature map's summed activation at each position: Zeiler & Fergus, figure 7 (b).

        layer: the name of a module (as in ``named_modules``); channel: one for all images, one an image, or
        "strongest": the one whose sum is largest on the clean image. A module whose output is not among the captured
        layers' runs on whole masked images, slower.
        """
        return self._gather(self._activation(layer, channel))[0]

    def maps(
        self,
        target: int | Sequence[int] | Tensor,
        layer: str,
        channel: int | str | Sequence[int] = "strongest",
    ) -> Maps:
        """Zeiler & Fergus's three maps out of one pass."""
        wanted = {**self._probability(target), **self._label(), **self._activation(layer, channel)}
        return Maps(*self._gather(wanted))

    def attribution(self, target: int | Sequence[int] | Tensor = 0) -> Tensor:
        """(B, H, W): for each pixel the mean, over the windows that cover it, of f(x) - f(x occluded):
        Captum's ``Occlusion``.

        float64 for float64 scores, else float32. Pixels that no window covers are 0: beyond the last window with
        border="inside", between windows with a stride larger than they are.
        """
        column = self._target_columns(target)
        scores = self.score_map(target)
        drop = (
            _pick(self.clean, column, torch.arange(self.shape[0], device=column.device)).view(-1, 1, 1)
            - scores
        )
        drop = drop if drop.dtype == torch.float64 else drop.float()
        return ops.window_mean(drop.contiguous(), self._images.shape[2:], self.window, self.stride)

    def explain(self) -> str:
        """How the sweep is computed: what was chosen for each layer and why, in lines of text."""
        if not self._refined:
            return self._engine.explain()
        watched = "the class of the clean image" if self.classes is None else f"the classes {self.classes}"
        return (
            f"{self._engine.explain()}\nSampled: every {self._refined}th window, and all where the map of {watched} "
            f"varies: {int(self.evaluated.sum())} of {self.evaluated.numel()} windows; the rest is interpolated."
        )

    # -- one pass, many results

    def _probability(self, target: Any) -> dict[Any, _Reduction]:
        if self.classes is not None:
            raise ValueError(
                f"A probability needs the scores of all classes, but targets={self.classes} were chosen."
            )
        column = self._target_columns(target)
        return {
            ("probability", *column.tolist()): _Reduction(
                lambda p: _pick(_softmax(p.scores), column, p.image)
            )
        }

    def _label(self) -> dict[Any, _Reduction]:
        if self.classes is not None:
            raise ValueError(
                f"The most probable label needs the scores of all classes, but targets={self.classes} were chosen."
            )
        return {"label": _Reduction(lambda p: p.scores.argmax(1))}

    def _activation(self, layer: str, channel: int | str | Sequence[int]) -> dict[Any, _Reduction]:
        with self._conditions():
            clean = self._serving((layer,)).channel_sums(layer)
        if isinstance(channel, str):
            if channel != "strongest":
                raise ValueError(
                    f"channel must be an int, one an image, or 'strongest', but it is {channel!r}."
                )
            chosen = clean.argmax(1)
        else:
            chosen = _per_image("channel", channel, self.shape[0], clean.shape[1], clean.device)
        return {
            ("activation", layer, *chosen.tolist()): _Reduction(
                lambda p: _pick(p.probes[layer], chosen, p.image), layer
            )
        }

    def _serving(self, layers: Sequence[str]) -> Incremental | BruteForce:
        """The engine; or whole masked images, where the captured network has not what a module returns: one without an
        operation of its own, one whose output nobody reads, one that returns something else than its last map."""
        if isinstance(self._engine, BruteForce) or self._engine.narrow:
            return self._engine
        try:
            for layer in layers:
                self._engine.channel_sums(layer)
        except ValueError:
            if self._whole is None:
                self._whole = self._brute_force(self._own_scores(), "asked for a layer that was not captured")
            return self._whole
        return self._engine

    def _target_columns(self, target: Any) -> Tensor:
        chosen = _per_image("target", target, self.shape[0], self._count, self._images.device)
        if self._column is None:
            return chosen
        missing = [c for c in chosen.tolist() if c not in self._column]
        if missing:
            raise ValueError(
                f"The class {missing[0]} was not computed: the sweep's targets are {self.classes}."
            )
        return torch.tensor([self._column[c] for c in chosen.tolist()], device=chosen.device)

    def _gather(self, wanted: dict[Any, _Reduction]) -> list[Tensor]:
        """The results of some reductions: remembered, out of the remembered scores, or out of a pass."""
        with self._lock:
            small = self.memory_limit // 64  # of this size results are remembered
            if "scores" in self._results and not any(each.layer for each in wanted.values()):
                return [self._from_stored(each, self._results["scores"]) for each in wanted.values()]
            missing = {name: each for name, each in wanted.items() if name not in self._results}
            found: dict[Any, Tensor] = {}
            if missing:
                self._check_unchanged()
                size = math.prod(self.shape) * self.clean.shape[1] * self.clean.element_size()
                if size <= small and "scores" not in self._results:
                    missing = {**_SCORES, **missing}
                found = self._run(missing)
            known = {**self._results, **found}
            for name, result in found.items():
                # What follows from remembered scores is not held again.
                if name == "scores" or missing[name].layer or "scores" not in missing:
                    self._remember(name, result, small)
            results = [(known[name], self._completed(known[name])) for name in wanted]
            # What is remembered is not the caller's to change.
            return [whole.clone() if whole is known else whole for known, whole in results]

    def _remember(self, name: Any, result: Tensor, most: int) -> None:
        """Keep a result of a pass for the next call: the scores, and of the others the last ones, in ``most`` bytes.

        What a caller's own function gave is not kept: the next call has another one, or wants it called.
        """
        if callable(name) or result.nbytes > most:
            return
        self._results[name] = result
        others = [each for each in self._results if each != "scores"]
        while sum(self._results[each].nbytes for each in others) > most:
            del self._results[others.pop(0)]

    def _check_unchanged(self) -> None:
        """A model that changed since the sweep was made would give numbers of two models."""
        if self._captured is not None:
            same = is_current(self._captured, self._model, self._original)
        else:
            same = self._weights == self._weights_now() and self._still_gives_clean()
        if not same:
            raise RuntimeError("The model was changed after the sweep was made: make a new sweep.")

    def _weights_now(self) -> list[Any]:
        """The state of the parameters. Buffers may change with each forward, and show in the scores."""
        parameters = [p for module in modules_behind((self._model,)) for p in module.parameters()]
        versions = [None if p.is_inference() else (id(p), p._version) for p in parameters]
        return [versions, sampled(parameters)]

    def _still_gives_clean(self) -> bool:
        engine = self._engine
        if isinstance(engine, Incremental) or not self._original.numel():
            return True
        with self._conditions():
            now = engine.clean_scores()
            # A function that is random in its own way gives something else each time: it was not changed.
            return rows_agree(now, self.clean) or not rows_agree(engine.clean_scores(), now)

    @contextlib.contextmanager
    def _conditions(self) -> Iterator[None]:
        """As it was when the sweep was made; the captured layers ran without autocast."""
        device = self._images.device.type
        with (
            torch.no_grad(),
            _precision(self._tf32),
            torch.autocast(device, dtype=self._autocast[1], enabled=self._autocast[0]),
        ):
            yield

    def _from_stored(self, wanted: _Reduction, stored: Tensor) -> Tensor:
        evaluated = self.evaluated.to(stored.device)
        flat, image = stored[evaluated], evaluated.nonzero()[:, 0]
        pieces = [slice(begin, begin + 8192) for begin in range(0, max(len(flat), 1), 8192)]
        values = torch.cat([wanted.function(Part(image[p], image[p], image[p], flat[p], {})) for p in pieces])
        result = values.new_zeros((*self.shape, *values.shape[1:]))
        result[evaluated] = values
        return self._completed(result)

    def _run(self, wanted: dict[Any, _Reduction]) -> dict[Any, Tensor]:
        layers = tuple(dict.fromkeys(each.layer for each in wanted.values() if each.layer is not None))
        with self._conditions():
            engine = self._serving(layers)
        key = tuple(wanted)
        state = self._passes.pop(key, None) or _Pass({}, self.evaluated.clone())
        total = int(self.evaluated.sum())

        def take(part: Part) -> None:
            place = (part.image, part.row, part.col)
            for name, each in wanted.items():
                value = each.function(part)
                if name not in state.results:
                    state.results[name] = value.new_zeros((*self.shape, *value.shape[1:]))
                state.results[name][place] = value
            state.left[part.image.cpu(), part.row.cpu(), part.col.cpu()] = False

        try:
            with self._conditions():
                if not layers and not state.results:
                    for part in self._known:
                        take(part)
                skipped = total - int(state.left.sum())
                left = None if bool(state.left.all()) else state.left.clone()
                with Progress(total, "windows", self._progress, "occlusion", skipped=skipped) as bar:
                    for part in engine.parts(layers, left, bar):
                        take(part)
        except BaseException:
            self._passes = {key: state}  # only the last one
            raise
        if not state.results:  # not a single window
            none = torch.zeros(0, dtype=torch.long, device=self.clean.device)
            sums = {layer: engine.channel_sums(layer)[:0] for layer in layers}
            for name, each in wanted.items():
                value = each.function(Part(none, none, none, self.clean[:0], sums))
                state.results[name] = value.new_zeros((*self.shape, *value.shape[1:]))
        return state.results

    def _completed(self, result: Tensor) -> Tensor:
        """What was evaluated, and between it what is interpolated from the coarse grid: of the result itself, whichever
        way it was found, and not of what it is made of."""
        if bool(self.evaluated.all()):
            return result
        mask = self.evaluated.to(result.device)
        whole = _interpolated(result, self._coarse)
        whole[mask] = result[mask]
        return whole

    # -- sampling and precision

    def _refine(self, factor: int, tolerance: float) -> None:
        """Evaluate a coarse grid; then mark the windows of the cells in which the coarse map varies."""
        coarse = [np.unique(np.append(np.arange(0, n, factor), n - 1)) for n in self.shape[1:]]
        self._coarse = [torch.as_tensor(each) for each in coarse]
        mask = torch.zeros(self.shape, dtype=torch.bool)
        mask[:, self._coarse[0][:, None], self._coarse[1][None, :]] = True
        self.evaluated = mask
        best = self.clean.argmax(1)
        kept: list[Part] = []
        few = int(mask.sum()) * self.clean.shape[1] * self.clean.element_size() <= self.memory_limit // 64

        def watched(part: Part) -> Tensor:
            """The scores of the classes that were asked for, or of the one that the clean image is taken for."""
            if few:  # no later pass needs to evaluate them again
                kept.append(part._replace(scores=part.scores.clone()))
            return part.scores if self.classes is not None else _pick(part.scores, best, part.image)[:, None]

        seen = self._run({"watched": _Reduction(watched)})["watched"]
        self._known = kept
        seen = seen.float().cpu()[:, self._coarse[0]][:, :, self._coarse[1]]
        low, high = seen.amin((1, 2), keepdim=True), seen.amax((1, 2), keepdim=True)
        spread = (high - low).clamp_min(1e-30)
        # A grid of one row or column has cells all the same.
        coarse = [np.append(each, each) if len(each) == 1 else each for each in coarse]
        seen = seen.repeat_interleave(2, 1) if seen.shape[1] == 1 else seen
        seen = seen.repeat_interleave(2, 2) if seen.shape[2] == 1 else seen
        corners = torch.stack([seen[:, :-1, :-1], seen[:, 1:, :-1], seen[:, :-1, 1:], seen[:, 1:, 1:]])
        # NaN counts as varying.
        varies = ~((corners.amax(0) - corners.amin(0)) / spread <= tolerance).all(-1)
        marked = mask.clone()
        rows, cols = coarse
        for image, row, col in varies.nonzero().tolist():
            marked[image, rows[row] : rows[row + 1] + 1, cols[col] : cols[col + 1] + 1] = True
        self.evaluated = marked

    def _measure_error(self) -> None:
        """The scores of up to 16 windows in the images' own dtype, against those of the reduced one."""
        generator = torch.Generator().manual_seed(0)
        places = torch.nonzero(self.evaluated)
        places = places[torch.randperm(len(places), generator=generator)[:16]]
        mask = torch.zeros_like(self.evaluated)
        mask[tuple(places.T)] = True
        if not len(places):
            self.error = 0.0
            return
        found: list[Tensor] = []
        full = BruteForce(self, self._model, True, "", self._original)
        with torch.no_grad(), _precision(False):
            for engine in (self._engine, full):
                table = None
                for part in engine.parts((), mask, Progress(0, show=False)):
                    if table is None:
                        table = torch.zeros(*self.shape, part.scores.shape[1], dtype=torch.float64)
                    table[part.image.cpu(), part.row.cpu(), part.col.cpu()] = part.scores.double().cpu()
                assert table is not None
                found.append(table[mask])
        clean = self._select(self._forward(self._model, self._original.clone())).double().cpu()
        spread = float(torch.cat([found[1], clean]).max() - torch.cat([found[1], clean]).min())
        self.error = float((found[0] - found[1]).abs().max()) / max(spread, 1e-30)


class _Reduction(NamedTuple):
    function: Callable[[Part], Tensor]
    layer: str | None = None


class _Pass(NamedTuple):
    """What an interrupted pass has done, and the windows that it has left."""

    results: dict[Any, Tensor]
    left: Tensor


_SCORES = {"scores": _Reduction(lambda part: part.scores)}


def _each_window(function: Callable[[Tensor], Tensor], scores: Tensor) -> Tensor:
    """What a caller's function makes of scores (n, K): (n, ...), or else it would depend on the chunks."""
    value = function(scores.clone())
    if not isinstance(value, Tensor) or value.dim() < 1 or len(value) != len(scores):
        found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
        raise ValueError(
            f"function must make (n, ...) of scores (n, K), but for n = {len(scores)} windows it gave a result "
            f"of {found}."
        )
    return value


def _softmax(scores: Tensor) -> Tensor:
    return scores.softmax(1) if scores.dtype in (torch.float64, torch.float32) else scores.float().softmax(1)


def _pick(table: Tensor, column: Tensor, image: Tensor) -> Tensor:
    """table[i, column[image[i]]]."""
    return table.gather(1, column[image].view(-1, 1)).squeeze(1)


def _interpolated(values: Tensor, coarse: Sequence[Tensor]) -> Tensor:
    """Bilinear interpolation of (B, R, Q, ...) between the rows and columns of the coarse grid."""
    if not values.is_floating_point():
        near = [_nearest(c, values.shape[i + 1]).to(values.device) for i, c in enumerate(coarse)]
        return values[:, near[0]][:, :, near[1]]
    for dim, places in enumerate(coarse, start=1):
        count = values.shape[dim]
        at = torch.arange(count)
        after = torch.searchsorted(places, at).clamp(0, len(places) - 1)
        before = (after - (places[after] != at).long()).clamp_min(0)
        gap = (places[after] - places[before]).clamp_min(1)
        weight = ((at - places[before]) / gap).to(values)
        shape = [1] * values.dim()
        shape[dim] = count
        first, second = (values.index_select(dim, places[i].to(values.device)) for i in (before, after))
        values = first + (second - first) * weight.view(shape)
    return values


def _nearest(places: Tensor, count: int) -> Tensor:
    at = torch.arange(count)
    return places[(at[:, None] - places[None, :]).abs().argmin(1)]


# -- arguments


@contextlib.contextmanager
def _precision(tf32: bool) -> Iterator[None]:
    """TF32 on or off for the block, in matrix products and convolutions."""
    if not torch.cuda.is_available():
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = bool(tf32)
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def _two_ints(name: str, value: Any) -> tuple[int, int]:
    values = (value, value) if isinstance(value, numbers.Integral) else value
    if not isinstance(values, tuple | list | torch.Size) or len(values) != 2:
        raise TypeError(f"{name} must be an int or two ints, but it is {value!r}.")
    if any(isinstance(v, bool) or not isinstance(v, numbers.Integral) for v in values):
        raise TypeError(f"{name} must be an int or two ints, but it is {value!r}.")
    if min(values) < 1:
        raise ValueError(f"{name} must be at least 1, but it is {value!r}.")
    return int(values[0]), int(values[1])


def _check_arguments(model, images, border, memory_limit, dtype, refine, tolerance) -> None:
    if not callable(model):
        raise TypeError(f"model must be callable, but it is a {type(model).__name__}.")
    check_images("images", images)
    if min(images.shape[1:]) < 1:
        raise ValueError(f"images must have pixels, but their shape is {tuple(images.shape)}.")
    if border not in ("clip", "inside"):
        raise ValueError(f"border must be 'clip' or 'inside', but it is {border!r}.")
    if memory_limit is not None and (
        isinstance(memory_limit, bool) or not isinstance(memory_limit, numbers.Integral)
    ):
        raise TypeError(f"memory_limit must be an int (bytes), but it is {memory_limit!r}.")
    if memory_limit is not None and memory_limit < 1:
        raise ValueError(f"memory_limit must be at least 1 byte, but it is {memory_limit}.")
    if dtype not in (None, torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ValueError(f"dtype must be a floating-point torch dtype, but it is {dtype!r}.")
    if refine is not None and (isinstance(refine, bool) or not isinstance(refine, numbers.Integral)):
        raise TypeError(f"refine must be an int (every n-th window), but it is {refine!r}.")
    if refine is not None and refine < 2:
        raise ValueError(f"refine must be at least 2, but it is {refine}.")
    check_real("refine_tolerance", tolerance)
    if not 0 <= tolerance <= 1:
        raise ValueError(f"refine_tolerance must lie between 0 and 1, but it is {tolerance}.")


def _class_list(targets: Sequence[int] | None, classes: int) -> list[int] | None:
    if targets is None:
        return None
    values = targets.tolist() if isinstance(targets, Tensor) else targets
    values = [values] if isinstance(values, numbers.Integral) else values
    if not isinstance(values, Iterable):
        raise TypeError(f"targets must be a list of classes, but it is {targets!r}.")
    values = list(values)
    if not values:
        raise ValueError("targets must name at least one class, but it is empty.")
    return list(dict.fromkeys(_index("targets", value, classes) for value in values))


def _index(name: str, value: Any, count: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be ints, but one is {value!r}.")
    if not -count <= value < count:
        raise IndexError(f"{name} {value} is out of range: there are {count}.")
    return int(value) % count


def _per_image(name: str, value: Any, images: int, count: int, device: torch.device) -> Tensor:
    """One index an image, (B,) int64, from one for all or one each."""
    values = value.tolist() if isinstance(value, Tensor | np.ndarray) else value
    values = [values] * images if not isinstance(values, list | tuple) else list(values)
    if len(values) == 1 and images != 1:
        values = values * images
    if len(values) != images:
        raise ValueError(
            f"{name} must be one number or one an image ({images}), but there are {len(values)}."
        )
    return torch.tensor([_index(name, each, count) for each in values], dtype=torch.long, device=device)
