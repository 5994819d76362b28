"""Saliency: the gradient of a class score by the image's pixels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._gradient import GradientAttribution, check_at_once, gradients, many_gradients, target_scores
from ._inputs import Inputs, Target, select_target


class Saliency(GradientAttribution):
    """Vanilla gradients (Simonyan, Vedaldi & Zisserman 2013, section 3), with Captum's signature.

    Args:
        forward_func: a model or any callable that returns scores, ``(N, ...)``.
    """

    def attribute(
        self, inputs: Inputs, target: Target = None, abs: bool = True, additional_forward_args: Any = None
    ) -> Inputs:
        """The gradient of each example's target score by its inputs.

        Args:
            inputs: a float tensor ``(N, ...)`` or a tuple of them.
            target: which score: an int for all examples, a list or 1-D tensor of N ints, a tuple as trailing index, a
                list of N tuples; None only where each example has a single score.
            abs: return absolute values. There is no reduction over channels: see
                :func:`convviz_cuda.ops.max_abs_channels`.
            additional_forward_args: passed on behind the inputs.

        Returns:
            Tensor or tuple shaped as ``inputs``, same dtype, device and memory format.

        Raises AssertionError for a target that does not fit the output, IndexError for one out of range.
        """
        return self._attribute(
            inputs,
            additional_forward_args,
            lambda output, xs: gradients(select_target(output, target), xs),
            result=_absolute if abs else None,
        )

    def attribute_many(
        self,
        inputs: Inputs,
        targets: Any,
        abs: bool = True,
        additional_forward_args: Any = None,
        *,
        targets_per_pass: int | None = None,
    ) -> Inputs:
        """:meth:`attribute` for K targets: one forward, batched backward passes.

        Args:
            targets: K targets, each as in :meth:`attribute`; or an integer tensor ``(K,)`` or ``(K, N)``.
            targets_per_pass: targets in one backward pass; None chooses by the batch size.

        Returns:
            ``(K, N, ...)`` for each input.
        """
        check_at_once("targets_per_pass", targets_per_pass)
        scores = target_scores(targets)
        return self._attribute(
            inputs,
            additional_forward_args,
            lambda output, xs: many_gradients(output, xs, scores, targets_per_pass),
            result=_absolute if abs else None,
        )


def _absolute(gradient: Tensor, _: Tensor) -> Tensor:
    return gradient.abs()
