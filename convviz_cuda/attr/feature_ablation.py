"""Feature ablation: how much a score falls when a feature, a group of input values, is replaced by a baseline."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..progress import Progress
from ._gradient import check_at_once, warn_in_training
from ._inputs import Inputs, Target, as_tuple, restore
from ._masked import MaskedForward, _repeated, room_for
from ._named import Named
from ._windows import window_fills

Baselines = float | Tensor | tuple[float | Tensor, ...] | None


class FeatureAblation(Named):
    """The fall of a score without each feature, with Captum's signature. Occlusion is its case of sliding windows.

    Args:
        forward_func: a model or any callable that returns scores: a tensor ``(N, ...)``, or one scalar or number for
            the whole batch.

    Raises TypeError for a ``forward_func`` that is not callable.
    """

    multiplies_by_inputs = True  # the difference to a baseline, not a slope

    def __init__(self, forward_func: Callable[..., Any]) -> None:
        if not callable(forward_func):
            raise TypeError(f"forward_func must be callable, but it is {forward_func!r}.")
        self.forward_func = forward_func

    @staticmethod
    def has_convergence_delta() -> bool:
        """Whether ``return_convergence_delta`` is offered: no."""
        return False

    def attribute(
        self,
        inputs: Inputs,
        baselines: Baselines = None,
        target: Target = None,
        additional_forward_args: Any = None,
        feature_mask: Tensor | tuple[Tensor, ...] | None = None,
        perturbations_per_eval: int = 1,
        show_progress: bool = False,
        *,
        memory_limit: int | None = None,
        **kwargs: Any,
    ) -> Inputs:
        """The score of the inputs minus the score without the feature, at each value that belongs to it.

        Args:
            inputs: a tensor ``(N, ...)`` of any dtype or a tuple of them.
            baselines: what stands for an ablated value: a number, a tensor that broadcasts to the input, or a tuple of
                these, one for each input; None is 0. Of floating inputs it takes the dtype; an integer input with a
                floating one is passed on as floating.
            target: which score: an int for all examples, a list or 1-D tensor of N ints, a tuple as trailing index, a
                list of N tuples; None for all scores of the output.
            additional_forward_args: passed on behind the inputs; tensors with N rows are repeated where several
                features are evaluated at once.
            feature_mask: the feature of each value, a tensor of numbers that broadcasts to the input, or a tuple with
                one for each input. Values with the same number are ablated together, also in several inputs. A first
                dimension of N gives each example its own features. None: each value of an example is a feature.
            perturbations_per_eval: features evaluated in one forward. The result does not depend on it. 1 leaves the
                choice to us: several, unless the function mixes the examples of a batch or is random.
            show_progress: count the features on stderr, with the time left.
            memory_limit: bytes of tensors that the evaluation of several features may hold at once, as far as the
                choice of their number can keep to it: one feature is always evaluated. None: a default for the device.
            kwargs: ignored, as Captum does.

        Returns:
            Tensor or tuple shaped as ``inputs``, same device and memory format, in the dtype of the scores. The first
            dimension is 1 where the function gives one scalar for the whole batch, and N * K where K scores of each
            example were left.

        Raises AssertionError for masks, targets or perturbations that do not fit, RuntimeError for a baseline or mask
        that does not broadcast, IndexError for a target out of range, ValueError for a memory_limit that is no positive
        int.
        """
        tensors = as_tuple(inputs)
        for index, tensor in enumerate(tensors):
            assert tensor.dim() > 0, f"Input tensor {index} must have a batch dimension, but it is a scalar."
        features, count = _features(tensors, feature_mask)
        fills = window_fills(tensors, baselines)
        whole = isinstance(perturbations_per_eval, numbers.Integral)
        assert whole and not isinstance(perturbations_per_eval, bool) and perturbations_per_eval >= 1, (
            "Perturbations per evaluation must be an integer and at least 1, "
            f"but perturbations_per_eval is {perturbations_per_eval!r}."
        )
        check_at_once("memory_limit", memory_limit)
        warn_in_training(self.forward_func)
        with torch.no_grad():
            masked = _MaskedFeatures(
                self.forward_func,
                tensors,
                fills,
                features,
                count,
                target,
                additional_forward_args,
                memory_limit,
            )
            explicit = perturbations_per_eval > 1
            copies = int(perturbations_per_eval) if explicit else masked.choose_copies()
            found = masked.attributions(copies, explicit, show_progress)
        results = tuple(restore(a.to(x.device), x) for a, x in zip(found, tensors, strict=True))
        return results if isinstance(inputs, tuple) else results[0]


class _MaskedFeatures(MaskedForward):
    """Features of all inputs are hidden. ``features``: the number of each value's feature, ``(1 or N, ...)``."""

    def __init__(
        self,
        forward_func: Callable[..., Any],
        inputs: Sequence[Tensor],
        fills: Sequence[Tensor],
        features: Sequence[Tensor | None],
        count: int,
        target: Target,
        args: Any,
        memory_limit: int | None,
    ) -> None:
        super().__init__(forward_func, inputs, fills, target, args, memory_limit)
        self.features, self.variants = features, count
        for x, feature in zip(inputs, features, strict=True):
            rows = self.scores_shape[0] if self.scores_shape else 1
            assert feature is None or len(feature) == 1 or rows == len(x), (
                f"Features of their own for each of {len(x)} examples need as many scores, but forward_func gave "
                f"scores of the shape {self.scores_shape}."
            )

    def _hide_some(self, which: int, batch: Tensor) -> None:
        feature, fill = self.features[which], self.fills[which]
        if feature is not None:
            batch.copy_(torch.where(feature == self.variants // 2, fill, batch))

    def attributions(self, copies: int, explicit: bool, show_progress: bool) -> list[Tensor]:
        """For each input (outputs, *shape without the batch): at each value its feature's difference."""
        if not self.variants or not self.clean.numel():
            falls = None
        else:
            with Progress(self.variants, "features", show_progress, "feature ablation") as progress:
                falls = self.differences(self.variants, self._prepared, copies, explicit, progress)
                falls = falls.t().to(self.scores_dtype)
        outputs = self.clean.shape[1]
        results = []
        for x, feature in zip(self.inputs, self.features, strict=True):
            if falls is None or feature is None:
                zeros = torch.zeros((outputs, *x.shape[1:]), dtype=self.scores_dtype, device=x.device)
                results.append(zeros)
            elif len(feature) == 1:
                results.append(falls[:, feature[0].to(falls.device)])
            else:  # the scores of an example follow each other, and each is looked up in the example's own features
                own = feature.reshape(len(x), 1, -1).to(falls.device)
                each = falls.unflatten(0, (len(x), outputs // len(x)))
                found = each.gather(2, own.expand(-1, each.shape[1], -1))
                results.append(found.reshape(outputs, *x.shape[1:]))
        return results

    def _prepared(self, copies: int) -> Callable[[int, int], list[Tensor]]:
        """A function from features ``start`` to ``stop``, at most ``copies``, to the inputs without them."""
        every = list(zip(self.inputs, self.fills, self.features, self.layouts, strict=True))
        rooms = [room_for(x, copies, fill.dtype, layout) for x, fill, _, layout in every]

        def variants(start: int, stop: int) -> list[Tensor]:
            given = []
            for (x, fill, feature, _), room in zip(every, rooms, strict=True):
                if feature is None:
                    batches = _repeated(x, room, stop - start)
                else:
                    number = torch.arange(start, stop, device=x.device).view(-1, *(1,) * x.dim())
                    batches = room[: (stop - start) * len(x)].unflatten(0, (stop - start, len(x)))
                    torch.where(feature == number, fill, x, out=batches)
                given.append(batches.flatten(0, 1))
            return given

        return variants


def _features(inputs: tuple[Tensor, ...], masks: Any) -> tuple[list[Tensor | None], int]:
    """For each input the feature of each value, ``(1 or N, ...)``, None if it is empty; and the number of features."""
    features: list[Tensor | None] = []
    if masks is None:
        count = 0
        for x in inputs:
            size = x[:1].numel()
            number = torch.arange(count, count + size, device=x.device)
            features.append(number.view(1, *x.shape[1:]) if size else None)
            count += size
        return features, count
    masks = masks if isinstance(masks, tuple) else (masks,)
    assert len(masks) == len(inputs), (
        f"There must be a feature mask for each input: there are {len(inputs)} inputs and {len(masks)} masks."
    )
    wide = [_wide(index, x, mask) for index, (x, mask) in enumerate(zip(inputs, masks, strict=True))]
    # A number stands for one feature in all inputs; those of empty inputs change nothing.
    known = [mask.flatten().to(inputs[0].device) for x, mask in zip(inputs, wide, strict=True) if x.numel()]
    if not known:
        return [None] * len(inputs), 0
    ids, numbered = torch.unique(torch.cat(known), return_inverse=True)
    parts = iter(numbered.split([len(mask) for mask in known]))
    for x, mask in zip(inputs, wide, strict=True):
        number = next(parts).view(mask.shape).to(x.device) if x.numel() else None
        features.append(None if number is None else number.expand(-1, *x.shape[1:]))
    return features, len(ids)


def _wide(index: int, x: Tensor, mask: Any) -> Tensor:
    """A mask with as many dims as its input."""
    assert isinstance(mask, Tensor), f"A feature mask must be a torch.Tensor, but it is {mask!r}."
    try:
        fits = torch.broadcast_shapes(mask.shape, x.shape) == x.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise RuntimeError(
            f"The feature mask of input {index} has the shape {tuple(mask.shape)}, which does not broadcast to the "
            f"input's {tuple(x.shape)}."
        )
    return mask.detach().reshape((1,) * (x.dim() - mask.dim()) + mask.shape)
