"""How maps answer to changes of the input: max-sensitivity, infidelity, equivariance."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._draws import drawn_as_usual, normal
from .._evaluated import evaluated
from ..attr._gradient import check_at_once
from ..attr._inputs import Inputs, Target, as_tuple, extra_args, select_target
from ..checks import check_callable, check_images, check_int, check_real
from ..experiments.invariance import transform_images
from ..mask_ops import philox
from ..progress import Progress
from ._explain import Explainer, check_method, examples, name_of, recorded, recorded_target
from ._result import Metric, check_finite
from ._similarity import DEFAULT, Similarities, check_similarities, described, similar

WORD = 2.0**-32


# ------------------------------------------------------------------------------------------- what was perturbed


def _uniform(like: Tensor, items: Tensor, stream: int, seed: int) -> Tensor:
    """Uniform numbers in (0, 1), float64, shaped as ``like``: a row for each item, the same wherever it stands."""
    words = philox(items.to(like.device) * 64 + stream, math.prod(like.shape[1:]), seed)
    return words.double().add_(0.5).mul_(WORD).view(like.shape)


def _in_ball(inputs: tuple[Tensor, ...], radius: float, items: Tensor, seed: int) -> tuple[Tensor, ...]:
    return tuple(
        x + _uniform(x, items, which, seed).mul_(2 * radius).sub_(radius).to(_floating(x))
        for which, x in enumerate(inputs)
    )


def _floating(x: Tensor) -> torch.dtype:
    return x.dtype if x.is_floating_point() else torch.get_default_dtype()


def default_perturb_func(inputs: Inputs, perturb_radius: float = 0.02) -> tuple[Tensor, ...]:
    """The inputs with noise, uniform in the L-infinity ball of ``perturb_radius``, as a tuple.

    By itself it draws row n's noise from stream n of seed 0; PyTorch's random state is neither read nor changed.
    """
    tensors = as_tuple(inputs)
    return _in_ball(tensors, perturb_radius, torch.arange(len(tensors[0])), 0)


def _interleaved(value: Any, copies: int) -> Any:
    """A target for a batch in which each example stands ``copies`` times in a row."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if isinstance(value, list):
        return [one for one in value for _ in range(copies)]
    if isinstance(value, Tensor) and value.dim() and value.numel() > 1:
        return value.repeat_interleave(copies, 0)
    return value


def _interleaved_args(args: Any, copies: int, count: int) -> tuple[Any, ...]:
    """Additional arguments for such a batch: tensors with a row for each example repeat."""
    return tuple(
        arg.repeat_interleave(copies, 0)
        if isinstance(arg, Tensor) and arg.dim() and len(arg) == count
        else arg
        for arg in extra_args(args)
    )


def _interleaved_baselines(baselines: Any, inputs: tuple[Tensor, ...], copies: int) -> Any:
    every = baselines if isinstance(baselines, tuple) else (baselines,)
    repeated = tuple(
        b.repeat_interleave(copies, 0) if isinstance(b, Tensor) and b.shape == x.shape and len(x) > 1 else b
        for b, x in zip(every, inputs, strict=False)
    )
    return repeated if isinstance(baselines, tuple) else repeated[0]


def _unwrapped(tensors: tuple[Tensor, ...], single: bool) -> Inputs:
    return tensors[0] if single else tensors


def _rows(tensors: tuple[Tensor, ...], count: int, start: int, stop: int) -> tuple[Tensor, ...]:
    """Samples ``start`` to ``stop`` of each of ``count`` examples whose samples follow each other."""
    return tuple(x.unflatten(0, (count, -1))[:, start:stop].flatten(0, 1) for x in tensors)


def _checked_inputs(inputs: Any) -> tuple[Tensor, ...]:
    tensors = tuple(x.detach() for x in as_tuple(inputs))
    for x in tensors:
        assert x.dim(), f"inputs must have a row for each example, but one is the number {x.item()!r}."
        check_finite("inputs", x)
    return tensors


def _checked_rows(function: str, given: Any, count: int) -> tuple[Tensor, ...]:
    """What a caller's function gave, as a tuple; AssertionError unless all are tensors with ``count`` rows."""
    tensors = given if isinstance(given, tuple) else (given,)
    fits = [isinstance(x, Tensor) and x.dim() > 0 and len(x) == count for x in tensors]
    shapes = [f"the shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__ for x in tensors]
    assert fits and all(fits), (
        f"{function} must give tensors with a row for each of {count} examples, but it gave {', '.join(shapes) or ()}."
    )
    return tensors


def _perturbed_at_once(
    tensors: tuple[Tensor, ...], samples: int, most: int | None, all_together: bool
) -> int:
    """Samples of each example in one call of the perturbation."""
    count = max(1, len(tensors[0]))
    if most is not None:
        return min(max(most // count, 1), samples)
    return samples if all_together else max(1, min(samples, examples(tensors) // count))


def _takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a function has a parameter of this name, or takes any."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # of some built-in functions there is none
        return False
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _checked_counts(n_perturb_samples: Any, max_examples_per_batch: Any) -> None:
    if n_perturb_samples is None:
        raise ValueError("n_perturb_samples must be an int of at least 1, but it is None.")
    check_at_once("n_perturb_samples", n_perturb_samples)
    check_at_once("max_examples_per_batch", max_examples_per_batch)


# ----------------------------------------------------------------------------------------------- the metrics


@torch.no_grad()
def sensitivity_max(
    explanation_func: Callable[..., Inputs],
    inputs: Inputs,
    perturb_func: Callable[..., Inputs] = default_perturb_func,
    perturb_radius: float = 0.02,
    n_perturb_samples: int = 10,
    norm_ord: float | str = "fro",
    max_examples_per_batch: int | None = None,
    *,
    perturb_seed: int = 0,
    return_metric: bool = False,
    show_progress: bool = False,
    **kwargs: Any,
) -> Tensor | Metric:
    """The largest relative change of an explanation under small perturbations, with Captum's signature.

    ``max |A(x + d) - A(x)| / |A(x)|`` over samples of d; where A(x) is zero, it is not divided. Source: Yeh et al., "On
    the (in)fidelity and sensitivity of explanations" (NeurIPS 2019), section 3.

    Args:
        explanation_func: gives the explanation (tensor or tuple, a row for each example) of inputs, a method's
            ``attribute`` for instance. A single tensor is passed on as a tensor.
        inputs: a float tensor ``(N, ...)`` or a tuple of them.
        perturb_func: gives perturbed inputs from the inputs, in which each example stands several times in a row, and
            from ``perturb_radius`` if it takes two arguments.
        perturb_radius: of the L-infinity ball of the default, in units of the inputs.
        n_perturb_samples: samples of each example.
        norm_ord: the order of the vector norm over all of an example's explanation, or "fro", which is 2.
        max_examples_per_batch: rows of inputs perturbed and explained together, at least the N. None: all are perturbed
            in one call of a ``perturb_func`` of your own, and as many explained at a time as the device takes well.
        perturb_seed: of the default perturbation. A sample's noise depends on this number, the example's place and the
            sample's number, not on the batches; PyTorch's random state stays as it is.
        return_metric: give a :class:`Metric` with the settings instead of the tensor.
        show_progress: passed on to an ``explanation_func`` that takes it, as from Captum; else the samples are counted
            on stderr, with the time left.
        kwargs: passed on to ``explanation_func``; a ``target``, ``additional_forward_args`` and ``baselines`` that
            belong to single examples are repeated with them.

    Returns:
        ``(N,)``, in the explanation's dtype, float32 at least.

    Raises AssertionError for inputs that are no tensors and for functions that do not give a row for each example,
    TypeError for what is not callable, ValueError for NaN and infinite inputs, counts below 1 and an unknown norm, and
    whatever the functions raise.
    """
    check_callable("explanation_func", explanation_func)
    check_callable("perturb_func", perturb_func)
    tensors = _checked_inputs(inputs)
    single, count = not isinstance(inputs, tuple), len(tensors[0])
    _checked_counts(n_perturb_samples, max_examples_per_batch)
    order = 2.0 if norm_ord == "fro" else norm_ord
    if isinstance(order, bool) or not isinstance(order, numbers.Real) or math.isnan(order):
        raise ValueError(f"norm_ord must be a number or 'fro', but it is {norm_ord!r}.")
    ours = perturb_func is default_perturb_func
    if ours:
        check_real("perturb_radius", perturb_radius)
        if not 0 <= perturb_radius < math.inf:
            raise ValueError(f"perturb_radius must be at least 0 and finite, but it is {perturb_radius!r}.")
    check_int("perturb_seed", perturb_seed, 0, 2**64 - 1)
    forwarded = show_progress and _takes(explanation_func, "show_progress")
    given_options = {**kwargs, "show_progress": show_progress} if forwarded else kwargs
    drawn_at_once = at_once = _perturbed_at_once(tensors, n_perturb_samples, max_examples_per_batch, not ours)
    if max_examples_per_batch is None:
        at_once = max(1, examples(tensors) // max(1, count))

    def explained(given: tuple[Tensor, ...], copies: int) -> Tensor:
        options = dict(given_options)
        if copies and "target" in options:
            options["target"] = _interleaved(options["target"], copies)
        if copies and options.get("additional_forward_args") is not None:
            options["additional_forward_args"] = _interleaved_args(
                options["additional_forward_args"], copies, count
            )
        if copies and options.get("baselines") is not None:
            options["baselines"] = _interleaved_baselines(options["baselines"], tensors, copies)
        found = explanation_func(_unwrapped(tuple(x.clone() for x in given), single), **options)
        rows = len(given[0])
        wide = [
            one.detach().to(torch.promote_types(one.dtype, torch.float32)).reshape(rows, -1)
            for one in _checked_rows("explanation_func", found, rows)
        ]
        return torch.cat(wide, 1)

    def perturbed(start: int, stop: int) -> tuple[Tensor, ...]:
        repeated = tuple(x.repeat_interleave(stop - start, 0) for x in tensors)
        if ours:
            place, sample = torch.meshgrid(torch.arange(count), torch.arange(start, stop), indexing="ij")
            items = (sample * 2**32 + place).flatten()
            return _in_ball(repeated, perturb_radius, items, perturb_seed)
        takes = len(inspect.signature(perturb_func).parameters)
        given = _unwrapped(repeated, len(repeated) == 1)
        with drawn_as_usual():
            found = perturb_func(given, perturb_radius) if takes > 1 else perturb_func(given)
        return _checked_rows("perturb_func", found, len(repeated[0]))

    shown = Progress(count * n_perturb_samples, "samples", show_progress and not forwarded, "sensitivity")
    with evaluated(explanation_func), shown as progress:
        if count:
            original = explained(tensors, 0)
            length = torch.linalg.vector_norm(original, order, 1)
            length = torch.where(length == 0, 1.0, length)
            largest = torch.full_like(length, -math.inf)
        else:
            largest = torch.zeros(0, device=tensors[0].device)
        for start in range(0, n_perturb_samples if count else 0, drawn_at_once):
            stop = min(start + drawn_at_once, n_perturb_samples)
            drawn = perturbed(start, stop)
            for first in range(0, stop - start, at_once):
                copies = min(at_once, stop - start - first)
                found = explained(_rows(drawn, count, first, first + copies), copies)
                change = original.repeat_interleave(copies, 0) - found
                relative = torch.linalg.vector_norm(change, order, 1) / length.repeat_interleave(copies)
                largest = torch.maximum(largest, relative.view(count, copies).amax(1))
                progress.advance(count * copies)
    if not return_metric:
        return largest
    settings = {
        "perturb_func": "uniform in the ball" if ours else name_of(perturb_func),
        "perturb_radius": perturb_radius,
        "n_perturb_samples": n_perturb_samples,
        "norm_ord": norm_ord,
        "perturb_seed": int(perturb_seed) if ours else None,
        "max_examples_per_batch": None if ours else max_examples_per_batch,
        "explanation_func": name_of(explanation_func),
        **recorded_target(kwargs.get("target"), count),
        "arguments": recorded({name: value for name, value in kwargs.items() if name != "target"}),
    }
    return Metric("sensitivity_max", largest.double().cpu(), settings)


@torch.no_grad()
def infidelity(
    forward_func: Callable[..., Any],
    perturb_func: Callable[..., tuple[Inputs, Inputs]],
    inputs: Inputs,
    attributions: Inputs,
    baselines: Any = None,
    additional_forward_args: Any = None,
    target: Target = None,
    n_perturb_samples: int = 10,
    max_examples_per_batch: int | None = None,
    normalize: bool = False,
    *,
    return_metric: bool = False,
    show_progress: bool = False,
) -> Tensor | Metric:
    """The mean square error of ``sum(perturbation * attribution)`` as the fall of the score, with Captum's signature.

    Source: Yeh et al., "On the (in)fidelity and sensitivity of explanations" (NeurIPS 2019), section 2.

    Args:
        forward_func: a model or any callable that returns scores.
        perturb_func: gives (perturbations, perturbed inputs) from the inputs, in which each example stands several
            times in a row, and from the baselines if there are any. See :func:`infidelity_perturb_func_decorator`.
        inputs: a tensor ``(N, ...)`` or a tuple of them.  attributions: in their shapes.
        baselines: a number, tensor or tuple of these, passed on to ``perturb_func``; tensors with more than one row are
            repeated with the inputs.
        additional_forward_args: passed on behind the inputs; tensors with a row for each example are repeated.
        target: which score, with the attribution methods' meanings.
        n_perturb_samples: samples of each example.
        max_examples_per_batch: rows perturbed and evaluated together, at least the N. None: all are perturbed in one
            call, and as many evaluated at a time as the device takes well.
        normalize: scale the attributions by the factor, one for each example, that makes the error least, so that it
            does not depend on their scale.
        return_metric: give a :class:`Metric` with the settings instead of the tensor.
        show_progress: count the samples on stderr, with the time left.

    Returns:
        ``(N,)``, float32 at least.

    Raises AssertionError for attributions, perturbations and targets that do not fit, IndexError for a target out of
    range, TypeError for what is not callable, ValueError for counts below 1 and for NaN and infinite inputs.
    """
    check_callable("forward_func", forward_func)
    check_callable("perturb_func", perturb_func)
    tensors = _checked_inputs(inputs)
    maps = tuple(x.detach() for x in as_tuple(attributions))
    single, count = len(tensors) == 1, len(tensors[0])
    assert len(tensors) == len(maps), (
        "The number of tensors in the inputs and attributions must match. "
        f"There are {len(tensors)} inputs and {len(maps)} attributions."
    )
    for x, one in zip(tensors, maps, strict=True):
        assert x.shape == one.shape, (
            "Inputs and attributions must have matching shapes. "
            f"An input has the shape {tuple(x.shape)} and its attribution {tuple(one.shape)}."
        )
    _checked_counts(n_perturb_samples, max_examples_per_batch)
    fills = None if baselines is None else (baselines if isinstance(baselines, tuple) else (baselines,))
    assert fills is None or len(fills) == len(tensors), (
        f"There must be a baseline for each input: there are {len(tensors)} inputs and {len(fills or ())} baselines."
    )
    drawn_at_once = at_once = _perturbed_at_once(tensors, n_perturb_samples, max_examples_per_batch, True)
    if max_examples_per_batch is None:
        at_once = max(1, examples(tensors) // max(1, count))

    def scores(given: tuple[Tensor, ...], copies: int) -> Tensor:
        args = _interleaved_args(additional_forward_args, copies, count)
        output = forward_func(*(x.clone() for x in given), *args)
        found = select_target(output, _interleaved(target, copies)).detach().reshape(-1)
        assert found.numel() == count * copies, (
            f"forward_func must give a score for each of {count * copies} examples, but it gave {found.numel()}."
        )
        return found.to(torch.promote_types(found.dtype, torch.float32)).view(count, copies)

    def perturbed(copies: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        repeated = tuple(x.repeat_interleave(copies, 0) for x in tensors)
        given: tuple[Any, ...] = (_unwrapped(repeated, single),)
        if fills is not None:
            rows = tuple(
                b
                if not isinstance(b, Tensor)
                else b.repeat_interleave(copies, 0)
                if b.dim() and len(b) == len(x) and len(b) > 1
                else b.clone()  # the function may write to what it is given
                for b, x in zip(fills, tensors, strict=True)
            )
            given += (_unwrapped(rows, single),)
        with drawn_as_usual():
            found = perturb_func(*given)
        assert isinstance(found, Sequence | Tensor) and len(found) == 2, (
            f"perturb_func must give perturbations and perturbed inputs, but it gave {type(found).__name__}."
        )
        change, variants = (_checked_rows("perturb_func", each, len(repeated[0])) for each in found)
        assert len(change) == len(tensors) == len(variants), (
            "perturb_func must give a perturbation and a perturbed tensor for each input. "
            f"There are {len(tensors)} inputs, {len(change)} perturbations and {len(variants)} perturbed inputs."
        )
        for d, x in zip(change, variants, strict=True):
            assert d.shape[1:] == x.shape[1:], (
                "Perturbed input and corresponding perturbation must have the same shape, but the shapes are "
                f"{tuple(x.shape)} and {tuple(d.shape)}."
            )
        return change, variants

    squares: list[Tensor] = []
    shown = Progress(count * n_perturb_samples, "samples", show_progress, "infidelity")
    with evaluated(forward_func), shown as progress:
        if count:
            clean = scores(tensors, 1)
        for start in range(0, n_perturb_samples if count else 0, drawn_at_once):
            drawn = min(drawn_at_once, n_perturb_samples - start)
            change, variants = perturbed(drawn)
            products = sum(
                (d.unflatten(0, (count, -1)) * one[:, None]).flatten(2).sum(2, dtype=_wide(d, one))
                for d, one in zip(change, maps, strict=True)
            )
            for first in range(0, drawn, at_once):
                copies = min(at_once, drawn - first)
                fall = clean - scores(_rows(variants, count, first, first + copies), copies)
                product = products[:, first : first + copies].to(fall.device)
                terms = (product.square(), product * fall, fall.square(), (product - fall).square())
                squares.append(torch.stack([term.sum(1) for term in terms]))
                progress.advance(count * copies)
    if not count:
        values = torch.zeros(0, device=tensors[0].device)
    else:
        of_products, mixed, of_falls, plain = functools.reduce(torch.add, squares)
        values = plain
        if normalize:
            factor = mixed / torch.where(of_products != 0, of_products, 1.0)
            values = factor.square() * of_products - 2 * factor * mixed + of_falls
        values = values / n_perturb_samples
    if not return_metric:
        return values
    settings = {
        "forward_func": name_of(forward_func),
        "perturb_func": name_of(perturb_func),
        "n_perturb_samples": n_perturb_samples,
        "max_examples_per_batch": max_examples_per_batch,
        "normalize": bool(normalize),
        **recorded_target(target, count),
        "baselines": recorded(fills),
        "additional_forward_args": recorded(additional_forward_args),
    }
    return Metric("infidelity", values.double().cpu(), settings)


def infidelity_perturb_func_decorator(multiply_by_inputs: bool = True) -> Callable[..., Any]:
    """Makes a ``perturb_func`` of :func:`infidelity` of a function that gives the perturbed inputs only, as Captum's.

    multiply_by_inputs: for attributions that have the inputs as a factor: the perturbation is the difference divided by
    the input, or by its difference to the baseline; where that is 0, it is not divided. False: the difference.
    """

    def decorate(
        perturb_func: Callable[..., Inputs],
    ) -> Callable[..., tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
        @functools.wraps(perturb_func)
        def both(inputs: Inputs, baselines: Any = None) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
            variants = as_tuple(
                perturb_func(inputs) if baselines is None else perturb_func(inputs, baselines)
            )
            tensors = as_tuple(inputs)
            fills = baselines if isinstance(baselines, tuple) else (baselines,) * len(tensors)
            changes = []
            for x, variant, fill in zip(tensors, variants, fills, strict=True):
                change = x - variant
                if multiply_by_inputs:
                    scale = x if fill is None else x - fill
                    change = change / torch.where(scale != 0, scale, 1.0)
                changes.append(change)
            return tuple(changes), variants

        return both

    return decorate


def equivariance(
    method: Any,
    images: Tensor,
    transform: str,
    values: Sequence[float | tuple[float, float]],
    *,
    target: Target = None,
    additional_forward_args: Any = None,
    similarity: str | Sequence[str] = DEFAULT,
    top: float = 0.1,
    absolute: bool = False,
    fill: str | float = "edge",
    seed: int = 0,
    batch_size: int | None = None,
    show_progress: bool = False,
    **kwargs: Any,
) -> Similarities:
    """How alike the transformed map and the map of the transformed image are: ``sim(T(A(x)), A(T(x)))``.

    Only pixels that the transformation did not bring in from beyond the border count: those whose value comes from
    pixels of the image alone.

    Args:
        method: an object with ``attribute(inputs, target=..., ...)`` or a function called so, that gives maps (N, C,
            H, W) or (N, H, W); other sizes are upsampled bilinearly, channels are summed.
        images: (N, C, H, W), float.
        transform: "noise", Gaussian, which leaves pixels where they are, so that T(A(x)) is A(x); "rotation" about the
            centre, counter-clockwise; "translation".
        values: standard deviations in units of the images; degrees; pixels downwards, or pairs (down, right).
        target, additional_forward_args: of all images, passed on to the method where they are given. The same target is
            explained in the image and in the transformed one, so name it: None is whatever the method takes it for.
        similarity: of "spearman" (rank correlation), "ssim" and "topk_iou".
        top: share of the valid pixels that "topk_iou" compares.
        absolute: compare the channels' summed magnitudes instead of their sum.
        fill: what transformed images show beyond the border: "edge", "reflect" or a number.
        seed: of the noise, which depends on this number, the image's place and the value's only.
        batch_size: images in one call of the method; None: a number for the device.
        show_progress: count the maps on stderr, with the time left.
        kwargs: passed on to the method.

    Returns:
        :class:`Similarities` whose steps are the values. NaN for "spearman" and "topk_iou" where a map is constant over
        the valid pixels, and for all where no pixel (no window of "ssim") is valid.

    Raises ValueError or TypeError for arguments that make no sense, before anything is computed.
    """
    check_images("images", images)
    check_finite("images", images)
    check_method("method", method)
    check_at_once("batch_size", batch_size)
    steps = _checked_values(transform, values)
    if not isinstance(fill, str) and (isinstance(fill, bool) or not isinstance(fill, numbers.Real)):
        raise TypeError(f"fill must be 'edge', 'reflect' or a number, but it is {fill!r}.")
    if isinstance(fill, str) and fill not in ("edge", "reflect"):
        raise ValueError(f"fill must be 'edge', 'reflect' or a number, but it is {fill!r}.")
    if absolute not in (True, False):
        raise TypeError(f"absolute must be True or False, but it is {absolute!r}.")
    absolute = bool(absolute)
    check_int("seed", seed, 0, 2**64 - 1)
    size = images.shape[2:]
    names = check_similarities(similarity, top, size)
    images = images.detach()
    explain = Explainer(target, additional_forward_args, kwargs, len(images), size)
    at_once = examples([images], batch_size)

    def moved(batch: Tensor, value: Any, fill: str | float) -> Tensor:
        if transform == "rotation":
            return transform_images(batch, "rotate", value, fill)
        down, right = value
        batch = transform_images(batch, "translate", down, fill)
        return transform_images(batch.transpose(2, 3), "translate", right, fill).transpose(2, 3)

    def changed(batch: Tensor, value: Any, step: int, start: int) -> Tensor:
        if transform != "noise":
            return moved(batch, value, fill)
        items = torch.arange(start, start + len(batch), device=batch.device) + step * 2**32
        noise = normal(items, batch[0].numel(), seed).view(batch.shape)
        return (batch + value * noise).to(batch.dtype)

    whole = torch.ones((1, 1, *size), dtype=torch.float64, device=images.device)
    valid = [
        torch.ones(tuple(size), dtype=torch.bool, device=images.device)
        if transform == "noise"
        else moved(whole, value, 0.0)[0, 0] > 1 - 1e-9
        for value in steps
    ]
    found = {name: torch.full((len(steps), len(images)), math.nan, dtype=torch.float64) for name in names}
    total = len(images) * (1 + len(steps))
    with evaluated(method), Progress(total, "maps", show_progress, "equivariance") as progress:
        for start in range(0, len(images), at_once):
            part = images[start : start + at_once]
            here = slice(start, start + len(part))
            clean = explain(method, part, start)[absolute]
            progress.advance(len(part))
            for step, value in enumerate(steps):
                after = explain(method, changed(part, value, step, start), start)[absolute]
                before = clean if transform == "noise" else moved(clean[:, None], value, "edge")[:, 0]
                if bool(valid[step].any()):
                    for name in names:
                        found[name][step, here] = similar(name, before, after, valid[step], top)
                progress.advance(len(part))
    settings = {
        "transform": transform,
        **described(names, top),
        "absolute": absolute,
        "fill": fill,
        "seed": int(seed) if transform == "noise" else None,
        **recorded_target(target, len(images)),
        **explain.record,
        "method": name_of(method),
        "additional_forward_args": recorded(additional_forward_args),
        "arguments": recorded(kwargs),
    }
    return Similarities("equivariance", steps, found, settings)


def _checked_values(transform: Any, values: Any) -> list[Any]:
    if transform not in ("noise", "rotation", "translation"):
        raise ValueError(f"transform must be 'noise', 'rotation' or 'translation', but it is {transform!r}.")
    values = values.tolist() if isinstance(values, Tensor | np.ndarray) else values
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise TypeError(f"values must be a list of numbers, but it is {values!r}.")
    if not values:
        raise ValueError("values must hold at least one number, but it is empty.")
    steps: list[Any] = []
    for value in values:
        pair = isinstance(value, tuple | list) and len(value) == 2 and transform == "translation"
        each = tuple(value) if pair else (value,)
        for v in each:
            check_real("each of values", v)
        if not all(map(math.isfinite, each)):
            raise ValueError(f"values must be finite numbers, but one is {value!r}.")
        if transform == "noise" and value < 0:
            raise ValueError(f"values of noise must be at least 0, but one is {value!r}.")
        floats = tuple(map(float, each))
        steps.append((floats + (0.0,))[:2] if transform == "translation" else floats[0])
    return steps


def _wide(*tensors: Tensor) -> torch.dtype:
    return functools.reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)
