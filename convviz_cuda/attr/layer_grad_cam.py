"""Grad-CAM, and the counterfactual map that its authors make of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._cam import ClassActivationMap, Finish, _one, weighed_maps
from ._gradient import check_at_once, gradients, many_gradients, target_scores
from ._inputs import Inputs, Target, select_target
from ._layer import Values, graph_options


class LayerGradCam(ClassActivationMap):
    """Grad-CAM (Selvaraju et al. 2017, section 3), with Captum's signature: channels weighted by their mean gradient.

    As Captum has it, the map is not rectified unless that is asked for; Grad-CAM's paper rectifies it.

    Args:
        forward_func: a model or any callable that returns scores.
        layer: a module, its name, or "auto": the last layer that gives maps.
        device_ids: accepted for Captum's sake, without effect.
    """

    @staticmethod
    def weigh(values: Tensor, gradients: Tensor) -> Tensor:
        return torch.einsum("...nc,ncp->...np", gradients.mean(-1), values)

    def attribute(
        self,
        inputs: Inputs,
        target: Target = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        relu_attributions: bool = False,
        attr_dim_summation: bool = True,
        grad_kwargs: dict[str, Any] | None = None,
        *,
        upsample: str | None = None,
        normalise: str | None = None,
        create_graph: bool = False,
    ) -> Tensor | Values:
        """The map of each example's target score.

        Args:
            inputs: a tensor ``(N, ...)`` or a tuple of them.
            target: which score: an int for all examples, a list or 1-D tensor of N ints, a tuple as trailing index, a
                list of N tuples; None only where each example has a single score.
            additional_forward_args: passed on behind the inputs.
            attribute_to_layer_input: take the layer's input instead of its output.
            relu_attributions: set negative values to 0.
            attr_dim_summation: False leaves the channels apart, ``(N, C, h, w)``.
            grad_kwargs: further arguments of ``torch.autograd.grad``.
            upsample: "bilinear" to the size of the (first) input, with ``align_corners=False``; None: not at all.
            normalise: "minmax" brings each map to [0, 1], a constant one to 0, behind the upsampling; None: not at
                all.
            create_graph: the maps can be differentiated, by the model's parameters and by the inputs that require a
                gradient.

        Returns:
            ``(N, 1, h, w)`` in the layer's dtype, or ``(N, 1)`` for a layer without positions; a tuple where the layer
            gives several tensors.

        Raises AssertionError for a target that does not fit the output and for a layer that does not run, IndexError
        for a target out of range, ValueError for an unknown ``upsample`` or ``normalise``.
        """
        finish = Finish(relu_attributions, False, upsample, normalise)
        options = graph_options(create_graph, grad_kwargs)
        create_graph = options["create_graph"]

        def use(output: Any, values: list[Values]) -> Values:
            (each,) = values
            found = gradients(select_target(output, target), each, **options)
            if not create_graph:
                each = tuple(v.detach() for v in each)
            return _finished(each, found, attr_dim_summation, finish, inputs)

        return _one(
            self._read(
                inputs, additional_forward_args, attribute_to_layer_input, use, from_inputs=create_graph
            )
        )

    def attribute_many(
        self,
        inputs: Inputs,
        targets: Any,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        relu_attributions: bool = False,
        attr_dim_summation: bool = True,
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
            ``(K, ...)`` of what :meth:`attribute` returns.
        """
        check_at_once("targets_per_pass", targets_per_pass)
        scores = target_scores(targets)
        finish = Finish(relu_attributions, False, upsample, normalise)

        def use(output: Any, values: list[Values]) -> Values:
            (each,) = values
            found = many_gradients(output, each, scores, targets_per_pass)
            return _finished(tuple(v.detach() for v in each), found, attr_dim_summation, finish, inputs)

        return _one(self._read(inputs, additional_forward_args, attribute_to_layer_input, use))


def _finished(values: Values, gradients: Values, summed: bool, finish: Finish, inputs: Inputs) -> Values:
    results = []
    for value, gradient in zip(values, gradients, strict=True):
        if summed and value.dim() > 2:
            maps = weighed_maps(LayerGradCam, value, gradient)
        else:
            positions = tuple(range(2 - value.dim(), 0))
            maps = (gradient.mean(positions, keepdim=True) if positions else gradient) * value
            maps = maps.sum(1 - value.dim(), keepdim=True) if summed else maps
        results.append(finish(maps, inputs, value.dim() - 1))
    return tuple(results)


class CounterfactualGradCam(ClassActivationMap):
    """Counterfactual Grad-CAM (Selvaraju et al. 2017, section 3.3): what speaks against a class.

    Channels are weighted by the mean of the negated gradient, and the map is rectified.
    """

    @staticmethod
    def weigh(values: Tensor, gradients: Tensor) -> Tensor:
        return -LayerGradCam.weigh(values, gradients)
