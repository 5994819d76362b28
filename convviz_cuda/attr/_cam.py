"""What the class activation maps share: one weighting of a layer's maps each, upsampling and normalisation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._gradient import check_at_once, gradients, many_gradients, target_scores
from ._inputs import Inputs, Target, as_tuple, select_target
from ._layer import LayerAttribution, Values

UPSAMPLES = (None, "bilinear")
NORMALISES = (None, "minmax")
_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


class ClassActivationMap(LayerAttribution):
    """Maps ``(N, 1, h, w)`` from what a layer gives, ``(N, C, h, w)``, and the gradient of a score there.

    A method is its formula, :meth:`weigh`, and whether its paper rectifies the result.
    """

    rectifies = True
    uses_gradients = True

    @staticmethod
    def weigh(values: Tensor, gradients: Tensor) -> Tensor:
        """``(..., N, P)`` from values ``(N, C, P)`` and gradients ``(..., N, C, P)`` at P positions."""
        raise NotImplementedError

    def attribute(
        self,
        inputs: Inputs,
        target: Target = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        relu_attributions: bool | None = None,
        *,
        upsample: str | None = None,
        normalise: str | None = None,
        create_graph: bool = False,
    ) -> Tensor | Values:
        """The map of each example's target score.

        Args:
            inputs: a tensor ``(N, ...)`` or a tuple of them.
            target: which score: an int for all examples, a list or 1-D tensor of N ints, a tuple as trailing index, a
                list of N tuples; None only where each example has a single score. Scores before the softmax are what
                the papers take.
            additional_forward_args: passed on behind the inputs.
            attribute_to_layer_input: take the layer's input instead of its output.
            relu_attributions: whether to set negative values to 0; None: as the method's paper does.
            upsample: "bilinear" to the size of the (first) input, with ``align_corners=False``; None: not at all.
            normalise: "minmax" brings each map to [0, 1], a constant one to 0, behind the upsampling; None: not at
                all.
            create_graph: the maps can be differentiated, by the model's parameters and by the inputs that require a
                gradient.

        Returns:
            ``(N, 1, h, w)`` in the layer's dtype; a tuple of them where the layer gives several tensors. Sums are
            taken at least in float32.

        Raises AssertionError for a target that does not fit the output and for a layer that does not run, IndexError
        for a target out of range, ValueError for an unknown ``upsample`` or ``normalise`` or a layer without maps.
        """
        finish = Finish(relu_attributions, self.rectifies, upsample, normalise)

        def signals(scores: Any, wanted: Values) -> Values:
            return gradients(select_target(scores, target), wanted, create_graph=create_graph)

        def use(output: Any, values: list[Values]) -> Values:
            (each,) = values
            found = self._gradients(output, each, signals, create_graph)
            return self._maps(each, found, finish, inputs, create_graph)

        return _one(
            self._read(
                inputs,
                additional_forward_args,
                attribute_to_layer_input,
                use,
                differentiate=self.uses_gradients,
                from_inputs=create_graph,
            )
        )

    def attribute_many(
        self,
        inputs: Inputs,
        targets: Any,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        relu_attributions: bool | None = None,
        *,
        upsample: str | None = None,
        normalise: str | None = None,
        targets_per_pass: int | None = None,
    ) -> Tensor | Values:
        """:meth:`attribute` for K targets: one forward, batched backward passes down to the layer.

        Args:
            targets: K targets, each as in :meth:`attribute`; or an integer tensor ``(K,)`` or ``(K, N)``.
            targets_per_pass: targets in one backward pass; None chooses by the batch size.

        Returns:
            ``(K, N, 1, h, w)``.
        """
        check_at_once("targets_per_pass", targets_per_pass)
        scores = target_scores(targets)
        finish = Finish(relu_attributions, self.rectifies, upsample, normalise)

        def signals(scores_of: Any, wanted: Values) -> Values:
            return many_gradients(scores_of, wanted, scores, targets_per_pass)

        def use(output: Any, values: list[Values]) -> Values:
            (each,) = values
            maps = self._maps(each, self._gradients(output, each, signals), finish, inputs)
            many = as_tuple(maps)[0].dim() > each[0].dim()
            return maps if many else tuple(m.repeat(len(scores), *[1] * m.dim()) for m in maps)

        return _one(
            self._read(
                inputs,
                additional_forward_args,
                attribute_to_layer_input,
                use,
                differentiate=self.uses_gradients,
            )
        )

    def _gradients(
        self,
        output: Any,
        values: Values,
        signals: Callable[[Any, Values], Values],
        create_graph: bool = False,
    ) -> Sequence[Tensor | None]:
        """What :meth:`weigh` gets beside the values; ``signals(output, wanted)`` gives gradients of the scores."""
        return signals(output, values) if self.uses_gradients else [None] * len(values)

    def _maps(
        self,
        values: Values,
        gradients: Sequence[Tensor | None],
        finish: Finish,
        inputs: Inputs,
        create_graph: bool = False,
    ) -> Values:
        if not create_graph:
            values = tuple(v.detach() for v in values)
        weighed = [weighed_maps(type(self), v, g) for v, g in zip(values, gradients, strict=True)]
        return tuple(finish(m, inputs, v.dim() - 1) for m, v in zip(weighed, values, strict=True))


class Finish:
    """What is done to every map: rectification, upsampling, normalisation, in this order.

    Raises ValueError for an unknown name.
    """

    def __init__(
        self, relu: bool | None, rectifies: bool, upsample: str | None, normalise: str | None
    ) -> None:
        """relu: what was asked for; ``rectifies``: what None means."""
        if relu is not None and not isinstance(relu, bool):
            raise ValueError(f"relu_attributions must be True, False or None, but it is {relu!r}.")
        for name, value, known in (("upsample", upsample, UPSAMPLES), ("normalise", normalise, NORMALISES)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, but it is {value!r}.")
        self.relu = rectifies if relu is None else relu
        self.upsample, self.normalise = upsample, normalise

    def __call__(self, maps: Tensor, inputs: Inputs, dims: int) -> Tensor:
        """``maps``: ``(..., N, 1, h, w)``; ``dims``: how many of them belong to one map, (1, h, w)."""
        if self.relu:
            maps = maps.relu()
        if self.upsample is not None:
            maps = upsampled(maps, as_tuple(inputs)[0].shape[2:])
        return minmax(maps, dims) if self.normalise == "minmax" else maps


def weighed_maps(method: type[ClassActivationMap], values: Tensor, gradients: Tensor | None) -> Tensor:
    """A method's maps ``(..., N, 1, h, w)``, before it is rectified."""
    if values.dim() < 3:
        raise ValueError(
            f"Class activation maps need a layer that gives maps (N, C, ...), but it gave {tuple(values.shape)}."
        )
    wide = torch.promote_types(values.dtype, torch.float32)
    with torch.autocast(values.device.type, enabled=False):
        flat = values.to(wide).flatten(2)
        above = flat if gradients is None else gradients.to(wide).flatten(-(values.dim() - 2))
        maps = method.weigh(flat, above).to(values.dtype)
    return maps.unflatten(-1, values.shape[2:]).unsqueeze(-(values.dim() - 1))


def upsampled(maps: Tensor, size: Sequence[int]) -> Tensor:
    """``(..., 1, h, w)`` maps, linearly interpolated to a size (``align_corners=False``)."""
    dims = len(size)
    if maps.dim() < dims + 2 or dims not in _LINEAR:
        raise ValueError(f"Maps {tuple(maps.shape)} cannot be upsampled to the inputs' size {tuple(size)}.")
    flat = maps.reshape(-1, 1, *maps.shape[-dims:])
    large = F.interpolate(flat, tuple(size), mode=_LINEAR[dims], align_corners=False)
    return large.reshape(*maps.shape[:-dims], *size)


def minmax(maps: Tensor, dims: int = 3) -> Tensor:
    """Each map, the last ``dims`` dims, brought to [0, 1]; one whose values are all the same becomes 0."""
    over = tuple(range(-dims, 0))
    low, high = maps.amin(over, keepdim=True), maps.amax(over, keepdim=True)
    width = high - low
    return (maps - low) / torch.where(width == 0, torch.ones_like(width), width)


def _one(results: Values) -> Tensor | Values:
    return results if len(results) > 1 else results[0]
