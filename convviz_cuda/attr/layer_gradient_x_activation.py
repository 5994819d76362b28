"""A layer's output times the gradient there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ._gradient import check_at_once, gradients, many_gradients, target_scores
from ._inputs import Inputs, Target, select_target
from ._layer import Layer, Values, graph_options, like_layer
from .layer_activation import LayerActivation


class LayerGradientXActivation(LayerActivation):
    """The gradient of the target score at a layer's output times that output, with Captum's signature.

    Args:
        forward_func: a model or any callable that returns scores.
        layer: a module, its name, "auto" (the last layer that gives maps), or a list of these.
        device_ids, memory_efficient: accepted for Captum's sake, without effect: nothing but the layers' outputs is
            kept anyway.
        multiply_by_inputs: False gives the gradient alone.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: Layer | list[Layer],
        device_ids: list[int] | None = None,
        multiply_by_inputs: bool = True,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__(forward_func, layer, device_ids)
        self.multiplies_by_inputs, self.memory_efficient = multiply_by_inputs, memory_efficient

    def attribute(
        self,
        inputs: Inputs,
        target: Target = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        grad_kwargs: dict[str, Any] | None = None,
        *,
        create_graph: bool = False,
    ) -> Inputs | list[Inputs]:
        """The attribution of each example's target score to the layer.

        Args:
            inputs: a tensor ``(N, ...)`` or a tuple of them.
            target: which score: an int for all examples, a list or 1-D tensor of N ints, a tuple as trailing index, a
                list of N tuples; None only where each example has a single score.
            additional_forward_args: passed on behind the inputs.
            attribute_to_layer_input: attribute to the layer's input instead of its output.
            grad_kwargs: further arguments of ``torch.autograd.grad``.
            create_graph: the attributions can be differentiated, by the model's parameters and by the inputs that
                require a gradient.

        Returns:
            Shaped as what the layer gives, a tensor or a tuple of them; a list for a list of layers.

        Raises AssertionError for a target that does not fit the output and for a layer that does not run, IndexError
        for a target out of range.
        """
        options = graph_options(create_graph, grad_kwargs)
        create_graph = options["create_graph"]

        def use(output: Any, values: list[Values]) -> list[Inputs]:
            every = tuple(v for each in values for v in each)
            found = gradients(select_target(output, target), every, **options)
            if not create_graph:
                values = [tuple(v.detach() for v in each) for each in values]
            return self._results(self.multiply_gradient_acts, values, found, inputs)

        return self._one_or_list(
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
        *,
        targets_per_pass: int | None = None,
    ) -> Inputs | list[Inputs]:
        """:meth:`attribute` for K targets: one forward, batched backward passes.

        Args:
            targets: K targets, each as in :meth:`attribute`; or an integer tensor ``(K,)`` or ``(K, N)``.
            targets_per_pass: targets in one backward pass; None chooses by the batch size.

        Returns:
            ``(K, ...)`` of what :meth:`attribute` returns.
        """
        check_at_once("targets_per_pass", targets_per_pass)
        scores = target_scores(targets)

        def use(output: Any, values: list[Values]) -> list[Inputs]:
            every = tuple(v for each in values for v in each)
            found = many_gradients(output, every, scores, targets_per_pass)
            values = [tuple(v.detach() for v in each) for each in values]
            return self._results(self._of_each_target, values, found, inputs)

        return self._one_or_list(self._read(inputs, additional_forward_args, attribute_to_layer_input, use))

    def multiply_gradient_acts(self, gradients: Values, evals: Values) -> Values:
        """What is made of one layer's gradients and its values, tensors of the same shapes: their products.

        Without ``multiply_by_inputs`` the gradients as they are. Both methods call it for each layer, and
        :meth:`attribute_many` of a class that overrides it for each target.
        """
        if not self.multiplies_by_inputs:
            return tuple(gradients)
        return tuple(gradient * value for gradient, value in zip(gradients, evals, strict=True))

    def _of_each_target(self, gradients: Values, evals: Values) -> Values:
        """The same of gradients (K, ...): at once, as products broadcast, where no subclass changes what is made."""
        method = getattr(self.multiply_gradient_acts, "__func__", None)
        own = method is LayerGradientXActivation.multiply_gradient_acts
        count = len(gradients[0])
        if own or not count:
            return LayerGradientXActivation.multiply_gradient_acts(self, gradients, evals)
        each = [self.multiply_gradient_acts(tuple(g[k] for g in gradients), evals) for k in range(count)]
        return tuple(torch.stack(results) for results in zip(*each, strict=True))

    @staticmethod
    def _results(
        multiply: Callable[[Values, Values], Values],
        values: list[Values],
        gradients: Values,
        inputs: Inputs,
    ) -> list[Inputs]:
        left = iter(gradients)
        return [like_layer(multiply(tuple(next(left) for _ in each), each), inputs) for each in values]
