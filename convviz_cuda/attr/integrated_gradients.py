"""Integrated gradients: the gradient averaged along the straight path from a baseline to the input."""

from __future__ import annotations

import functools
import math
import numbers
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._chunks import Chunks
from ..progress import Progress
from ._gradient import (
    EXAMPLES,
    EXAMPLES_PER_PASS,
    GradientAttribution,
    check_at_once,
    gradients,
    many_gradients,
    target_scores,
)
from ._inputs import (
    Inputs,
    Target,
    as_tuple,
    extra_args,
    real,
    repeated_args,
    repeated_target,
    restore,
    select_scores,
    select_target,
    target_list,
)
from ._masked import PeakBytes, memory_format, room_for

Baselines = float | Tensor | tuple[float | Tensor, ...] | None
Sums = Callable[[Any, tuple[Tensor, ...], list[float]], tuple[Tensor, ...]]

METHODS = ("riemann_left", "riemann_right", "riemann_middle", "riemann_trapezoid", "gausslegendre")
# Bytes of tensors in one pass, if the choice is ours. A process on a CPU holds up to three times as much, with what
# kernels and the allocator keep: less than 1 GB.
MEMORY_LIMIT = {"cpu": 256 << 20, "cuda": 4 << 30}


@functools.lru_cache(maxsize=16)
def path_points(method: str, n_steps: int, compat: str | None = None) -> list[tuple[float, float]]:
    """The points of the path, 0 at the baseline and 1 at the input, each with its weight in the mean."""
    if method == "gausslegendre":
        points, weights = np.polynomial.legendre.leggauss(n_steps)
        return list(zip((0.5 * (1 + points)).tolist(), (0.5 * weights).tolist(), strict=True))
    if method == "riemann_trapezoid":
        weight = 1 / (n_steps if compat == "captum" else n_steps - 1)
        return [(i / (n_steps - 1), weight / 2 if i in (0, n_steps - 1) else weight) for i in range(n_steps)]
    first = {"riemann_left": 0.0, "riemann_middle": 0.5, "riemann_right": 1.0}[method]
    return [((i + first) / n_steps, 1 / n_steps) for i in range(n_steps)]


class _Path(NamedTuple):
    """The straight lines from ``starts`` to ``ends``; ``steps`` is their difference, in float32 at least."""

    ends: tuple[Tensor, ...]
    starts: tuple[Tensor, ...]
    steps: tuple[Tensor, ...]
    args: tuple[Any, ...]

    def points(self, alphas: list[float]) -> tuple[Tensor, ...]:
        """The batches at some points of the path after each other, ``(points * N, ...)``, in the inputs' dtypes."""
        batches = []
        for end, start, step in zip(self.ends, self.starts, self.steps, strict=True):
            room = room_for(end, len(alphas), end.dtype, memory_format(end))
            for batch, alpha in zip(room.unflatten(0, (len(alphas), len(end))), alphas, strict=True):
                batch.copy_(torch.add(start, step, alpha=alpha))
            batches.append(room)
        return tuple(batches)


class IntegratedGradients(GradientAttribution):
    """Integrated gradients (Sundararajan, Taly & Yan 2017, section 3), with Captum's signature.

    The path is walked some points at a time, as memory allows, and only the weighted sum of gradients is kept.

    Args:
        forward_func: a model or any callable that returns scores, ``(N, ...)``.
        multiply_by_inputs: multiply the mean gradient by the input minus the baseline, so that the attributions of an
            example sum up to the difference of its scores; False returns the mean gradient.
        compat: None, or "captum" for Captum's weights of ``riemann_trapezoid``, which sum up to (n_steps - 1) / n_steps
            instead of 1: even a linear function's attributions fall short of the difference of its scores then.

    Raises TypeError for a ``forward_func`` that is not callable, ValueError for an unknown ``compat``.
    """

    def __init__(
        self, forward_func: Callable[..., Any], multiply_by_inputs: bool = True, *, compat: str | None = None
    ) -> None:
        super().__init__(forward_func)
        if compat is not None and compat != "captum":
            raise ValueError(f"compat must be None or 'captum', but it is {compat!r}.")
        self.multiplies_by_inputs = bool(multiply_by_inputs)
        self.compat = compat

    @staticmethod
    def has_convergence_delta() -> bool:
        """Whether ``return_convergence_delta`` is offered: yes."""
        return True

    def attribute(
        self,
        inputs: Inputs,
        baselines: Baselines = None,
        target: Target = None,
        additional_forward_args: Any = None,
        n_steps: int = 50,
        method: str = "gausslegendre",
        internal_batch_size: int | None = None,
        return_convergence_delta: bool = False,
        *,
        memory_limit: int | None = None,
        show_progress: bool = False,
    ) -> Inputs | tuple[Inputs, Tensor]:
        """The attribution of each example's target score to its inputs.

        Args:
            inputs: a tensor ``(N, ...)`` or a tuple of them; integers are taken as PyTorch's default floating dtype.
            baselines: where the path begins: a number, a tensor shaped as the input or with dimensions of 1, or
                a tuple of these, one for each input; None is 0.
            target: which score: an int for all examples, a list or 1-D tensor of N ints, a tuple as trailing index, a
                list of N tuples; None only where each example has a single score.
            additional_forward_args: passed on behind the inputs; tensors with N rows are repeated as the inputs are.
            n_steps: points of the path.
            method: where they lie and what they weigh: "riemann_left", "riemann_right", "riemann_middle",
                "riemann_trapezoid" or "gausslegendre".
            internal_batch_size: examples times points in one forward, at least N. The result does not depend on it,
                unless the function mixes the examples of a batch. None chooses by what a first pass held in memory.
            return_convergence_delta: also return :meth:`compute_convergence_delta`, which says how far the sampled path
                is from the integral.
            memory_limit: bytes of tensors that a pass may hold, as far as the choice of its points can keep to it: one
                point is always taken. None: 256 MB on a CPU, 4 GB on a GPU.
            show_progress: count the points on stderr, with the time left.

        Returns:
            Tensor or tuple shaped as ``inputs``, same dtype, device and memory format, summed in float32 at least; with
            the deltas ``(N,)`` behind it where they were asked for.

        Raises AssertionError for a baseline or target that does not fit, IndexError for a target out of range,
        ValueError for an unknown method and numbers below 1 (``riemann_trapezoid`` needs 2 steps).
        """
        points = self._points(method, n_steps, internal_batch_size, memory_limit)
        path = _path(inputs, baselines, additional_forward_args)

        def sums(output: Any, xs: tuple[Tensor, ...], weights: list[float]) -> tuple[Tensor, ...]:
            score = select_target(output, repeated_target(target, len(weights)))
            return _weighted(gradients(score, xs), xs, weights)

        found = self._integrated(path, points, sums, internal_batch_size, memory_limit, show_progress)
        attributions = found if isinstance(inputs, tuple) else found[0]
        if not return_convergence_delta:
            return attributions
        (change,) = self._score_changes(path, [target])
        return attributions, _delta(found, change)

    def attribute_many(
        self,
        inputs: Inputs,
        targets: Any,
        baselines: Baselines = None,
        additional_forward_args: Any = None,
        n_steps: int = 50,
        method: str = "gausslegendre",
        internal_batch_size: int | None = None,
        return_convergence_delta: bool = False,
        *,
        targets_per_pass: int | None = None,
        memory_limit: int | None = None,
        show_progress: bool = False,
    ) -> Inputs | tuple[Inputs, Tensor]:
        """:meth:`attribute` for K targets: at each point of the path one forward and batched backward passes.

        Args:
            targets: K targets, each as in :meth:`attribute`; or an integer tensor ``(K,)`` or ``(K, N)``.
            targets_per_pass: targets in one backward pass; None chooses by the number of examples in it.

        Returns:
            ``(K, N, ...)`` for each input; with the deltas ``(K, N)`` behind it where they were asked for.
        """
        points = self._points(method, n_steps, internal_batch_size, memory_limit)
        check_at_once("targets_per_pass", targets_per_pass)
        path = _path(inputs, baselines, additional_forward_args)
        every = target_list(targets)

        def sums(output: Any, xs: tuple[Tensor, ...], weights: list[float]) -> tuple[Tensor, ...]:
            scores = target_scores([repeated_target(target, len(weights)) for target in every])
            # Gradients of all targets at all points would take more memory than the passes that give them.
            step = targets_per_pass or max(1, EXAMPLES_PER_PASS // max(1, len(xs[0])))
            parts = [
                _weighted(many_gradients(output, xs, scores[k : k + step], step), xs, weights)
                for k in range(0, max(1, len(scores)), step)
            ]
            return tuple(torch.cat(part) for part in zip(*parts, strict=True))

        found = self._integrated(path, points, sums, internal_batch_size, memory_limit, show_progress)
        attributions = found if isinstance(inputs, tuple) else found[0]
        if not return_convergence_delta:
            return attributions
        changes = self._score_changes(path, every)
        deltas = [_delta([a[k] for a in found], change) for k, change in enumerate(changes)]
        return attributions, torch.stack(deltas) if deltas else found[0].new_empty((0, len(path.ends[0])))

    def compute_convergence_delta(
        self,
        attributions: Inputs,
        start_point: Baselines,
        end_point: Inputs,
        target: Target = None,
        additional_forward_args: Any = None,
    ) -> Tensor:
        """The sum of each example's attributions minus the difference of its scores, ``(N,)``, in float32 at least.

        Args:
            attributions: what :meth:`attribute` returned for the inputs ``end_point`` and baselines ``start_point``.
            target, additional_forward_args: as they were given there.

        Raises AssertionError for attributions of another number of examples than ``end_point``.
        """
        found = as_tuple(attributions)
        path = _path(end_point, start_point, additional_forward_args)
        for one, end in zip(found, path.ends, strict=False):
            assert len(one) == len(end), (
                "Attributions tensor and the end_point must match on the first dimension but found attribution: "
                f"{len(one)} and end_point: {len(end)}."
            )
        (change,) = self._score_changes(path, [target])
        return _delta(found, change)

    def _points(
        self, method: str, n_steps: int, internal_batch_size: int | None, memory_limit: int | None
    ) -> list[tuple[float, float]]:
        """The points and weights, once the arguments are known to be good."""
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, but it is {method!r}.")
        least = 2 if method == "riemann_trapezoid" else 1
        whole = isinstance(n_steps, numbers.Integral) and not isinstance(n_steps, bool)
        if not whole or n_steps < least:
            raise ValueError(
                f"n_steps must be an int of at least {least} for {method}, but it is {n_steps!r}."
            )
        check_at_once("internal_batch_size", internal_batch_size)
        check_at_once("memory_limit", memory_limit)
        return path_points(method, int(n_steps), self.compat)

    def _integrated(
        self,
        path: _Path,
        points: list[tuple[float, float]],
        sums: Sums,
        internal_batch_size: int | None,
        memory_limit: int | None,
        show_progress: bool,
    ) -> tuple[Tensor, ...]:
        """The attributions to each input, with the leading dims that ``sums`` gives."""
        size = len(path.ends[0])
        device = path.ends[0].device
        explicit = internal_batch_size is not None
        if explicit and internal_batch_size < size:
            warnings.warn(
                f"internal_batch_size is {internal_batch_size}, less than the {size} examples: each pass takes one "
                "point of all of them.",
                UserWarning,
                stacklevel=3,
            )
        examples = internal_batch_size if explicit else EXAMPLES.get(device.type, EXAMPLES["cuda"])
        at_most = max(1, examples // max(1, size))
        # The first pass says what a point takes.
        chunks = Chunks(len(points), at_most if explicit else 1, explicit)
        totals: tuple[Tensor, ...] = ()
        with Progress(len(points), "points", show_progress, "integrated gradients") as progress:
            for start, stop in chunks:
                alphas, weights = zip(*points[start:stop], strict=True)
                measured = start == 0 and at_most > 1 and not explicit
                with chunks, PeakBytes(measured) as peak:
                    found = self._differentiated(
                        path.points(alphas),
                        repeated_args(path.args, len(alphas), size),
                        lambda output, xs, weights=weights: sums(output, xs, weights),
                    )
                if chunks.failed:
                    continue
                for total, one in zip(totals, found, strict=False):
                    total.add_(one)
                totals = totals or found
                if progress.show and device.type == "cuda":
                    torch.cuda.synchronize(device)  # or progress would count what is only queued
                progress.advance(len(alphas))
                if measured:
                    limit = memory_limit or MEMORY_LIMIT.get(device.type, MEMORY_LIMIT["cuda"])
                    chunks.at_once = max(1, min(at_most, limit // max(1, peak.bytes)))
        if self.multiplies_by_inputs:
            totals = tuple(total * step for total, step in zip(totals, path.steps, strict=True))
        return tuple(restore(t.to(x.dtype), x) for t, x in zip(totals, path.ends, strict=True))

    def _score_changes(self, path: _Path, targets: list[Target]) -> list[Tensor]:
        """For each target the scores at the end of the path minus those at its start."""
        # Copies for each call: the function may change its arguments in place, and give its output's memory again.
        with torch.no_grad():
            starts = tuple(s.to(e.dtype).clone() for s, e in zip(path.starts, path.ends, strict=True))
            start = self.forward_func(*starts, *path.args)
            start = start.clone() if isinstance(start, Tensor) else start
            end = self.forward_func(*(e.clone() for e in path.ends), *path.args)
            return [_row_sums(select_scores(end, t)) - _row_sums(select_scores(start, t)) for t in targets]


def _path(inputs: Inputs, baselines: Baselines, args: Any) -> _Path:
    """The path of each input; AssertionError (Captum's) for baselines that do not fit."""
    ends = tuple(real(f"Input tensor {index}", x) for index, x in enumerate(as_tuple(inputs)))
    for index, x in enumerate(ends):
        assert x.dim() > 0, f"Input tensor {index} must have a batch dimension, but it is a scalar."
    if baselines is None:
        baselines = (0,) * len(ends)
    elif not isinstance(baselines, tuple):
        baselines = (baselines,)
    assert len(baselines) == len(ends), (
        f"There must be a baseline for each input: there are {len(ends)} inputs and {len(baselines)} baselines."
    )
    starts = []
    for index, (x, baseline) in enumerate(zip(ends, baselines, strict=True)):
        wide = torch.promote_types(x.dtype, torch.float32)
        if not isinstance(baseline, Tensor):
            assert isinstance(baseline, numbers.Real), (
                f"A baseline must be a torch.Tensor or a number, but it is {baseline!r}."
            )
            baseline = torch.tensor(float(baseline), dtype=torch.float64)
        else:
            sizes = zip(baseline.shape, x.shape, strict=False)
            assert baseline.dim() == x.dim() and all(size in (1, wanted) for size, wanted in sizes), (
                f"The baseline of input {index} must have the input's shape {tuple(x.shape)}, or 1 in some dimensions, "
                f"but its shape is {tuple(baseline.shape)}."
            )
        # Through the input's dtype: the path begins where the function can be evaluated.
        baseline = real(f"The baseline of input {index}", baseline)
        starts.append(baseline.to(x.dtype).to(x.device, wide).expand(x.shape))
    steps = tuple(x.to(s.dtype) - s for x, s in zip(ends, starts, strict=True))
    return _Path(ends, tuple(starts), steps, extra_args(args))


def _weighted(found: tuple[Tensor, ...], xs: tuple[Tensor, ...], weights: list[float]) -> tuple[Tensor, ...]:
    """The weighted sum over the points of gradients ``(..., points * N, ...)``, in float32 at least."""
    totals = []
    for gradient, x in zip(found, xs, strict=True):
        size = (len(weights), len(x) // len(weights))
        parts = gradient.unflatten(gradient.dim() - x.dim(), size).unbind(gradient.dim() - x.dim())
        total = parts[0].to(torch.promote_types(x.dtype, torch.float32)) * weights[0]
        for part, weight in zip(parts[1:], weights[1:], strict=True):
            total.add_(part, alpha=weight)
        totals.append(total)
    return tuple(totals)


def _row_sums(scores: Tensor) -> Tensor:
    """The sum of each row in float32 at least, ``(N,)``; ``(1,)`` of a scalar that stands for the whole batch."""
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return wide.reshape(len(wide), math.prod(wide.shape[1:])).sum(1) if wide.dim() else wide.reshape(1)


def _delta(attributions: tuple[Tensor, ...] | list[Tensor], change: Tensor) -> Tensor:
    total = sum(_row_sums(one).to(change.device) for one in attributions)
    return (total if len(change) == len(total) else total.sum(0, keepdim=True)) - change
